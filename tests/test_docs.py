"""Each test that the docs name as a proof exists."""

import ast
import pathlib
import re

import pytest

HERE = pathlib.Path(__file__).parent
PAGES = sorted((HERE.parent / "docs").glob("*.md"))
# `test_file.py::test_name`. It may have a folder, a class, and a parameter in brackets.
PROOF = re.compile(
    r"`((?:integration_tests/|tests/)?test_\w+\.py)::(?:\w+::)*(\w+)(?:\[([^\]]+)\])?`"
)


def path_of(file):
    return HERE.parent / file if "/" in file else HERE / file


def names_and_strings(file):
    """The functions and classes of a test file, and all strings that may name a parameter in it."""
    nodes = list(ast.walk(ast.parse(path_of(file).read_text())))
    defined = {n.name for n in nodes if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    nodes += ast.walk(ast.parse((HERE / "wrappers.py").read_text()))  # parameters of the contract
    strings = {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    return defined, defined | strings


def missing(text):
    for file, test, parameter in PROOF.findall(text):
        if not path_of(file).exists():
            yield f"{file} does not exist"
            continue
        defined, parameters = names_and_strings(file)
        if test not in defined:
            yield f"{file} has no {test}"
        elif parameter and parameter not in parameters:
            yield f"{file} has no parameter {parameter}"


@pytest.mark.slow_on("jax", "tensorflow")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_test_named_in_the_docs_exists(page):
    assert list(missing(page.read_text())) == []


def test_each_cell_in_the_table_of_features_names_a_test_or_a_reason():
    text = (HERE.parent / "docs" / "features.md").read_text()
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) > 30
    for feature, *cells in rows:
        assert len(cells) == 3, feature
        assert all(cell.strip() for cell in cells), feature
        if feature.strip() != "feature":
            assert any(PROOF.search(cell) for cell in cells), f"{feature} is not proven anywhere"


@pytest.mark.slow_on("jax", "tensorflow")
def test_the_first_snippet_of_the_readme_makes_averages(tmp_path, monkeypatch):
    snippet = re.search(r"```python\n(.*?)```", (HERE.parent / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(snippet[1].replace("validation_split", "verbose=0, validation_split"), names)
    optimizer = names["model"].optimizer
    assert int(optimizer.iterations) == 20 * names["steps"]
    assert optimizer.num_snapshots == (20 - 5) * names["steps"] // 10 + 1
    assert optimizer.averages_in_model
    assert (tmp_path / "averaged.keras").exists()


def test_the_search_finds_names_of_tests():
    text = "`test_no.py::test_a` `test_docs.py::test_b` `test_docs.py::missing[1 2]` `a.py::b`"
    assert list(missing(text)) == [
        "test_no.py does not exist",
        "test_docs.py has no test_b",
        "test_docs.py has no parameter 1 2",
    ]
