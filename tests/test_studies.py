"""Each study in the docs runs in a small setting. Its page has the numbers of its file."""

import importlib
import json
import pathlib
import runpy
import sys

import numpy as np
import pytest

STUDIES = pathlib.Path(__file__).parents[1] / "docs" / "studies"
SMALL = {
    "averages_on_digits.py": ["--epochs", "1", "--rounds", "1"],
    "schedule_free_beside_cosine.py": ["--lengths", "1", "2"],
    "swag_on_digits.py": ["--epochs", "2", "--samples", "2"],
}
# Sums of products are computed in another order, over a few steps.
ROUNDING = 1e-5


@pytest.fixture
def module(monkeypatch):
    """Function of the name of a file of the studies: the module."""
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(STUDIES)
    return importlib.import_module


@pytest.mark.thorough
@pytest.mark.parametrize("name", SMALL)
def test_a_study_writes_a_value_for_each_seed(name, tmp_path, monkeypatch, module):
    pytest.importorskip("matplotlib").use("Agg")
    results = tmp_path / "results.json"
    arguments = [*SMALL[name], "--seeds", "2", "--out", str(results)]
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(STUDIES / name), run_name="__main__")
    found = json.loads(results.read_text())
    assert found["seeds"] == 2
    lists = list(lists_in(found["values"]))
    assert lists
    assert all(len(values) == 2 for values in lists)
    assert results.with_suffix(".md").read_text().startswith("# ")


@pytest.mark.slow_on("jax", "tensorflow")
@pytest.mark.parametrize("kind", ["ema_and_swa", "schedule_free"])
def test_a_network_learns_beside_others_as_it_learns_alone(kind, module):
    digits = module("digits")
    make = {
        "ema_and_swa": lambda: digits.ema_and_swa(0.1, steps=4),
        "schedule_free": lambda: digits.schedule_free(1.0),
    }[kind]
    known, unseen = digits.to_train_on_all()
    both, alone = digits.compiled(make(), 2), digits.compiled(make(), 1)
    alone.set_weights([weights[1:] for weights in both.get_weights()])
    x, y = digits.in_own_order(known, 2, first_seed=0)
    for step in range(0, 160, 32):
        batch = slice(step, step + 32)
        both.train_on_batch(x[batch], y[batch])
        alone.train_on_batch(x[batch, 1:], y[batch, 1:])
    for one, other in zip(both.get_weights(), alone.get_weights(), strict=True):
        np.testing.assert_allclose(one[1:], other, atol=ROUNDING)
        assert np.abs(one[:1] - other).max() > 100 * ROUNDING
    for score, values in digits.average_scores(both, unseen).items():
        (other,) = digits.average_scores(alone, unseen)[score]
        assert values[1] == pytest.approx(other, rel=1e-3)


def test_the_interval_agrees_with_a_table_of_students_t(module):
    mean, half = module("report").interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.303 / 3**0.5, rel=1e-4)  # 4.303: of 2 degrees of freedom


@pytest.mark.parametrize("page", sorted(STUDIES.glob("*_*.md")), ids=lambda page: page.stem)
def test_a_page_has_the_numbers_of_its_file(page, module):
    report, found = module("report"), json.loads(page.with_suffix(".json").read_text())
    text = page.read_text()
    for methods in found["values"].values():
        for scores in methods.values():
            for score, values in scores.items():
                assert len(values) == found["seeds"]
                assert f"| {report.cell(score, values)} |" in text


def lists_in(values):
    if isinstance(values, list):
        yield values
        return
    for each in values.values():
        yield from lists_in(each)
