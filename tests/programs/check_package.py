"""Looks into a wheel and an sdist: `python check_package.py dist/x.whl dist/x.tar.gz`."""

import pathlib
import re
import sys
import tarfile
import zipfile

ROOT = pathlib.Path(__file__).parents[2]


def in_wheel(path):
    """The package whole, its metadata, and nothing else."""
    archive = zipfile.ZipFile(path)
    names = set(archive.namelist())
    (about,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
    package = {name for name in names if not name.startswith(f"{about}/")}
    source = {str(p.relative_to(ROOT)) for p in (ROOT / "keras_avg").rglob("*") if p.is_file()}
    source = {name for name in source if "__pycache__" not in name}
    assert package == source, package ^ source
    assert "keras_avg/py.typed" in package
    assert f"{about}/licenses/LICENSE" in names, names
    text = archive.read(f"{about}/METADATA").decode()
    dead = re.findall(r"\]\((?!https?://)[^)]*\)", text)
    assert not dead, f"These links of the README lead nowhere on PyPI: {dead}"
    assert "Project-URL: " in text, text
    return names


def in_sdist(path):
    """What is needed to build and to test, and no files of a service."""
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for wanted in ("pyproject.toml", "README.md", "LICENSE", "keras_avg/py.typed", "noxfile.py"):
        assert wanted in names, wanted
    assert any(name.startswith("tests/") for name in names)
    services = (".ci", ".github", ".nox", ".venv", "build", "dist")
    assert not [name for name in names if name.split("/")[0] in services]
    return names


if __name__ == "__main__":
    for path in sys.argv[1:]:
        found = in_wheel(path) if path.endswith(".whl") else in_sdist(path)
        print(f"{path}: {len(found)} files, as they should be")
