"""Decides which tests are quick, in all folders of tests. CONTRIBUTING.md explains the tiers."""

import os

import pytest

BACKEND = os.environ.get("KERAS_BACKEND", "tensorflow")


@pytest.hookimpl(tryfirst=True)  # It must run before pytest deselects thorough tests.
def pytest_collection_modifyitems(items):
    """Mark tests as thorough.

    A test marked `slow_on` this backend is thorough. Of a test marked `sample(n)`, `n` evenly
    spread combinations are quick, and all others are thorough.
    """
    combinations = {}
    for item in items:
        if any(BACKEND in marker.args for marker in item.iter_markers("slow_on")):
            item.add_marker(pytest.mark.thorough)
        elif marker := item.get_closest_marker("sample"):
            if item.get_closest_marker("thorough") or item.get_closest_marker("exhaustive"):
                continue
            key = item.nodeid.partition("[")[0]
            number = marker.kwargs.get(BACKEND, *marker.args)
            combinations.setdefault(key, (number, []))[1].append(item)
    for number, found in combinations.values():
        chosen = {round(i * (len(found) - 1) / max(number - 1, 1)) for i in range(number)}
        for place, item in enumerate(found):
            if place not in chosen:
                item.add_marker(pytest.mark.thorough)
