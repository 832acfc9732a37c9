"""What is said about the version says the same everywhere."""

import pathlib
import re

import keras_avg

ROOT = pathlib.Path(__file__).parents[1]


def found(pattern, file):
    return re.search(pattern, (ROOT / file).read_text(), re.MULTILINE)[1]


def test_the_newest_version_in_the_changelog_is_that_of_the_package():
    assert found(r"^## \[(\d[^\]]*)\]", "CHANGELOG.md") == keras_avg.__version__


def test_the_citation_is_of_this_version():
    assert found(r"^version: (.*)$", "CITATION.cff") == keras_avg.__version__


def test_every_version_in_the_changelog_has_its_link():
    text = (ROOT / "CHANGELOG.md").read_text()
    headings = re.findall(r"^## \[([^\]]*)\]", text, re.MULTILINE)
    assert headings == re.findall(r"^\[([^\]]*)\]: https://", text, re.MULTILINE)
