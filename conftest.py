"""Which combinations of a test are quick, in all folders of tests."""

import pytest


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what is thorough
def pytest_collection_modifyitems(items):
    """Of a test marked `sample(n)`, `n` evenly spread combinations are quick, the rest thorough."""
    combinations = {}
    for item in items:
        if marker := item.get_closest_marker("sample"):
            key = item.nodeid.partition("[")[0]
            combinations.setdefault(key, (marker.args[0], []))[1].append(item)
    for number, found in combinations.values():
        chosen = {round(i * (len(found) - 1) / max(number - 1, 1)) for i in range(number)}
        for place, item in enumerate(found):
            if place not in chosen:
                item.add_marker(pytest.mark.thorough)
