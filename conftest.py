"""Decides which tests are quick, in all folders of tests. CONTRIBUTING.md explains the tiers."""

import math
import os
import zlib

import pytest

BACKEND = os.environ.get("KERAS_BACKEND", "tensorflow")
# Of the thorough combinations of one test, this part is thorough, and the rest is exhaustive. Where
# each combination is compiled, all of them would take longer than CI may.
THOROUGH_PART = 1 if BACKEND == "torch" else 1 / 4


@pytest.hookimpl(tryfirst=True)  # It must run before pytest deselects thorough tests.
def pytest_collection_modifyitems(items):
    """Mark tests as thorough or exhaustive.

    A test marked `slow_on` this backend is thorough. Of a test marked `sample(n)`, `n` evenly
    spread combinations are quick, and all others are thorough. A test marked `complete` has no
    exhaustive combinations.
    """
    for combinations in by_function(items):
        mark_thorough(combinations)
        if combinations[0].get_closest_marker("complete"):
            continue
        thorough = [item for item in combinations if item.get_closest_marker("thorough")]
        for item in shuffled(thorough)[math.ceil(THOROUGH_PART * len(thorough)) :]:
            item.add_marker(pytest.mark.exhaustive)


def by_function(items):
    """Lists of the items that are combinations of one test."""
    found = {}
    for item in items:
        found.setdefault(item.nodeid.partition("[")[0], []).append(item)
    return found.values()


def mark_thorough(combinations):
    open_ones = [item for item in combinations if not item.get_closest_marker("thorough")]
    chosen = range(len(open_ones))
    if marker := combinations[0].get_closest_marker("sample"):
        number = marker.kwargs.get(BACKEND, *marker.args)
        chosen = {round(i * (len(open_ones) - 1) / max(number - 1, 1)) for i in range(number)}
    for place, item in enumerate(open_ones):
        if place not in chosen or is_slow(item):
            item.add_marker(pytest.mark.thorough)


def is_slow(item):
    return any(BACKEND in marker.args for marker in item.iter_markers("slow_on"))


def shuffled(items):
    """The same order each time, but not that of the parameters."""
    return sorted(items, key=lambda item: zlib.crc32(item.nodeid.encode()))
