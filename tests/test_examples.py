"""Each example runs in a small setting, and leaves one picture where it is told to.

So does each study, and leaves its results.
"""

import json
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
pytestmark = pytest.mark.thorough

STUDIES = FOLDER.parent / "docs" / "studies"
FEW = ["--seeds", "2"]
SMALL_STUDIES = {
    "averages_on_digits.py": [*FEW, "--epochs", "1", "--rounds", "1"],
    "schedule_free_beside_cosine.py": [*FEW, "--lengths", "1", "2"],
    "swag_on_digits.py": [*FEW, "--epochs", "2", "--samples", "2"],
}


def run(path, arguments, monkeypatch):
    """As `python path` does, in this process."""
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib").use("Agg")
    monkeypatch.setattr(sys, "argv", [path.name, *map(str, arguments)])
    monkeypatch.syspath_prepend(path.parent)
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


@pytest.mark.thorough
@pytest.mark.parametrize("name", SMALL_STUDIES)
def test_a_study_writes_a_value_for_each_seed(name, tmp_path, monkeypatch):
    results = tmp_path / "results.json"
    run(STUDIES / name, [*SMALL_STUDIES[name], "--out", results], monkeypatch)
    found = json.loads(results.read_text())
    assert found["seeds"] == 2
    lists = list(lists_in(found["values"]))
    assert lists
    assert all(len(values) == 2 for values in lists)


def lists_in(values):
    if isinstance(values, list):
        yield values
        return
    for each in values.values():
        yield from lists_in(each)


def test_every_example_is_run_here_or_elsewhere():
    elsewhere = {"quickstart.py", "model_average.py", "mean_teacher.py"}
    assert {path.name for path in FOLDER.glob("*.py")} == set(SMALL) | elsewhere


@pytest.mark.parametrize("name", SMALL)
def test_an_example_says_how_to_run_it(name):
    text = (FOLDER / name).read_text()
    assert f"python examples/{name}" in text.split('"""')[1]
