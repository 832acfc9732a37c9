"""All files name the same version."""

import pathlib
import re

import keras_avg

ROOT = pathlib.Path(__file__).parents[1]


def found(pattern, file):
    return re.search(pattern, (ROOT / file).read_text(), re.MULTILINE)[1]


def test_the_changelog_and_the_package_have_the_same_version():
    assert found(r"^## \[(\d[^\]]*)\]", "CHANGELOG.md") == keras_avg.__version__


def test_the_citation_and_the_package_have_the_same_version():
    assert found(r"^version: (.*)$", "CITATION.cff") == keras_avg.__version__


def test_every_version_in_the_changelog_has_a_link():
    text = (ROOT / "CHANGELOG.md").read_text()
    headings = re.findall(r"^## \[([^\]]*)\]", text, re.MULTILINE)
    assert headings == re.findall(r"^\[([^\]]*)\]: https://", text, re.MULTILINE)
