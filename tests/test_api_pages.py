"""Each public symbol has a page in the documentation. There are no other pages."""

import pathlib
import re

from test_public_api import PUBLIC

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "api.md"
DIRECTIVE = re.compile(r"^```\{eval-rst\}\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def listed(text):
    """Full names of the symbols for which Sphinx makes pages."""
    for directive in DIRECTIVE.findall(text):
        module = re.search(r"currentmodule:: (\S+)", directive)[1]
        for name in re.findall(r"^   (\w+)$", directive, re.MULTILINE):
            yield f"{module}.{name}"


def test_every_public_symbol_has_one_page():
    names = list(listed(PAGE.read_text()))
    missing = sorted(PUBLIC.keys() - set(names))
    assert not missing, f"docs/api.md does not list {missing}."
    assert sorted(names) == sorted(PUBLIC), "docs/api.md lists what is not public, or lists twice."


def test_the_check_finds_a_symbol_that_is_not_listed():
    text = PAGE.read_text().replace("   HalfLife\n", "")
    assert PUBLIC.keys() - set(listed(text)) == {"keras_avg.decays.HalfLife"}
