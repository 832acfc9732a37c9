"""docs/seed-api.md names every member of the original API, and its counterpart here."""

import pathlib
import re

import keras
import pytest

import keras_avg

ROOT = pathlib.Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "seed-api.md"

SHARED = {
    *("add_slot", "add_weight", "apply_gradients", "from_config", "get_config", "get_gradients"),
    *("get_slot", "get_slot_names", "get_updates", "get_weights", "iterations", "minimize"),
    *("set_weights", "variables", "weights", "__init__"),
}
# The members on each of the five pages, by the heading of its table.
MEMBERS = {
    "tf.keras.optimizers.Optimizer": SHARED
    | {"clipnorm", "clipvalue", "global_clipnorm", "gradient_aggregator", "gradient_transformers"},
    "tfa.optimizers.AveragedOptimizerWrapper": SHARED
    | {"assign_average_vars", "average_op", "learning_rate", "lr", "decay"},
    "tfa.optimizers.MovingAverage": {"__init__", "average_op", "get_config"},
    "tfa.optimizers.SWA": {"__init__", "average_op", "get_config"},
    "tf.contrib.opt.ModelAverageOptimizer": {
        *("__init__", "apply_gradients", "compute_gradients", "get_init_op", "get_name"),
        *("get_slot", "get_slot_names", "make_session_run_hook", "minimize", "variables"),
        *("GATE_GRAPH", "GATE_OP"),
    },
}
ROW = re.compile(
    r"^\| `(?P<name>\w+)[^|]*` \| (?P<here>[^|]+) \| (?P<test>[^|]+) \|$", re.MULTILINE
)


def tables():
    _, *sections = re.split(r"^## ", DOCUMENT.read_text(), flags=re.MULTILINE)
    return {
        section.partition("\n")[0].strip("` "): {row["name"]: row for row in ROW.finditer(section)}
        for section in sections
    }


ROWS = [
    pytest.param(row, id=f"{heading}.{name}")
    for heading, rows in tables().items()
    for name, row in rows.items()
]


def test_each_page_of_the_original_has_a_table():
    assert tables().keys() == MEMBERS.keys()


@pytest.mark.parametrize("heading", MEMBERS)
def test_each_member_on_a_page_is_in_its_table(heading):
    assert tables()[heading].keys() == MEMBERS[heading]


@pytest.mark.parametrize("row", ROWS)
def test_each_row_names_a_test_or_says_that_the_member_does_not_exist(row):
    if row["here"].startswith("none"):
        assert row["test"] == "-"
    else:
        assert re.fullmatch(
            r"`tests/test_\w+\.py(::\w+)+`", row["test"]
        )  # test_docs.py checks that the test exists.


@pytest.mark.parametrize(
    "name", sorted(SHARED | MEMBERS["tfa.optimizers.AveragedOptimizerWrapper"])
)
def test_each_member_of_the_original_exists_here(name):
    arguments = {"decay", "gradient_aggregator", "gradient_transformers"}
    optimizer = keras_avg.SWA(keras.optimizers.SGD())
    assert name in arguments or hasattr(optimizer, name)
