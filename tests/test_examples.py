"""Each example runs in a small setting, and draws one picture into the given file."""

import pathlib
import runpy
import sys

import pytest

FOLDER = pathlib.Path(__file__).parents[1] / "examples"
PNG = b"\x89PNG\r\n\x1a\n"
SMALL = {
    "averages_side_by_side.py": ["--epochs", "1"],
    "classifier_swa.py": ["--epochs", "2"],
    "diffusion_ema.py": ["--epochs", "1"],
    "noisy_quadratic.py": ["--coordinates", "50"],
    "swag_uncertainty.py": ["--epochs", "2", "--samples", "2"],
}
WITH_FILES = {"merge_checkpoints.py": "loss.png", "post_hoc_ema.py": "lengths.png"}
pytestmark = pytest.mark.thorough


def run(path, arguments, monkeypatch):
    """Run a program in this process, as `python path` does."""
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib").use("Agg")
    monkeypatch.setattr(sys, "argv", [path.name, *map(str, arguments)])
    runpy.run_path(str(path), run_name="__main__")


@pytest.mark.parametrize("name", SMALL)
def test_an_example_draws_its_picture(name, tmp_path, monkeypatch, capsys):
    picture = tmp_path / "picture.png"
    run(FOLDER / name, [*SMALL[name], "--out", picture], monkeypatch)
    assert picture.read_bytes().startswith(PNG)
    assert f"Picture: {picture}" in capsys.readouterr().out


def test_the_example_in_the_form_of_keras_io_draws_its_picture(tmp_path, monkeypatch):
    monkeypatch.setenv("EPOCHS", "1")
    run(FOLDER / "mean_teacher.py", [tmp_path / "picture.png"], monkeypatch)
    assert (tmp_path / "picture.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize(("name", "picture"), WITH_FILES.items())
def test_an_example_with_files_draws_its_picture(name, picture, tmp_path, monkeypatch, capsys):
    run(FOLDER / name, ["--out", tmp_path], monkeypatch)
    assert (tmp_path / picture).read_bytes().startswith(PNG)
    assert f"Picture: {tmp_path / picture}" in capsys.readouterr().out


def test_every_example_has_a_test():
    elsewhere = {"quickstart.py", "model_average.py", "mean_teacher.py"}
    assert {path.name for path in FOLDER.glob("*.py")} == {*SMALL, *WITH_FILES, *elsewhere}


@pytest.mark.parametrize("name", SMALL)
def test_an_example_says_how_to_run_it(name):
    text = (FOLDER / name).read_text()
    assert f"python examples/{name}" in text.split('"""')[1]
