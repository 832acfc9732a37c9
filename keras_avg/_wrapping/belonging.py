"""Which variable each number in a file's names belongs to, and whether it is still there.

In a file, what is kept is numbered as the variables that the optimizer was built with. A loaded
model may list its variables in another order (float8 layers do), and may have lost some. So arrays
in a file have attributes: the path of the variable, and what else a reader has to know. Files of
0.1 have none.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from keras_avg import _keras_internals

COUNTERS = ("updates", "snapshots", "averages_in_model")
NUMBER = "0|[1-9][0-9]{0,8}"  # as this package writes it: one number has one name
RAW = re.compile(rf"raw_({NUMBER})")
LISTED = 8  # paths in a message

# Why a file may have no averages. Said to whom it may concern when they are asked for.
WHY = {
    "merged": "a layer stores something else than its variables, as layers with LoRA do: Keras "
    "merges the factors into the kernel when it saves, and averages of the factors do not fit a "
    "merged kernel. To keep the averages in a file, put them into the model before saving: "
    "`keras_avg.swap_weights(model)`, then `model.save(...)`.",
    "replaced": "the variables that they belonged to were replaced before the file was written, as "
    "by `quantize`. To deploy averages, put them into the model first: "
    "`keras_avg.assign_average_vars(model)`, then quantize and save.",
}


class Labels(NamedTuple):
    """What a file says about the variables of its averages.

    Attributes:
        gone: Paths of variables that had averages, and that the saved model no longer had.
        may_not_fit: Whether the optimizer's variables were no longer those that the model trains.
        why_none: Key of `WHY` if the file has no averages, else "".
    """

    gone: tuple[str, ...] = ()
    may_not_fit: bool = False
    why_none: str = ""

    def attributes(self) -> dict[str, str]:
        """As attributes of an array, without those that say nothing."""
        listed = "\n".join(self.gone[:LISTED])
        said = {"gone": listed, "may_not_fit": "yes" * self.may_not_fit, "why_none": self.why_none}
        return {name: value for name, value in said.items() if value}


def labels(optimizer: Any, averaged: Sequence[int], model: Any) -> Labels:
    """What to write about an optimizer's variables, into the file of `model` (None: not known)."""
    if model is None:
        return Labels()
    built = _keras_internals.built_variables(optimizer)
    path_of = _keras_internals.path_of
    gone = [path_of(built[i]) for i in gone_from(optimizer, averaged, model)]
    trained = {_keras_internals.variable_index(optimizer, v) for v in model.trainable_variables}
    why = ""
    if set(gone) & set(map(path_of, model.variables)):
        why = "replaced"
    elif not _keras_internals.are_stored_as_they_are(model, [built[i] for i in averaged]):
        why = "merged"
    return Labels(tuple(gone), not trained.issuperset(range(len(built))), why)


def gone_from(optimizer: Any, averaged: Sequence[int], model: Any) -> list[int]:
    """The numbers of averaged variables that a model (None: not known) does not have."""
    if model is None:
        return []
    there = {_keras_internals.variable_index(optimizer, v) for v in model.variables}
    return [i for i in averaged if i not in there]


def read(index: Mapping[str, Any]) -> Labels:
    """What the attributes in a file say; the usual where they say nothing that is known."""
    said = index[COUNTERS[0]].attributes if COUNTERS[0] in index else {}
    why = said.get("why_none", "")
    return Labels(
        tuple(filter(None, said.get("gone", "").split("\n")))[:LISTED],
        bool(said.get("may_not_fit", "")),
        why if why in WHY else "",
    )


class Places(NamedTuple):
    """What is kept in a file, and to which variables here it goes.

    Attributes:
        stores: Names of the stores.
        here: The number of the variable here, by the number in the file.
    """

    stores: tuple[str, ...]
    here: dict[int, int]

    def renamed(self, name: str) -> str:
        """What a name in the file is called here."""
        found = numbered(name, self.stores)
        if found is not None:
            kind, number = found
            return f"{kind}{self.here.get(number, number)}"
        raw = RAW.fullmatch(name)
        if raw is not None and int(raw[1]) < len(self.here):
            # Raw values are counted among the variables that have an average.
            there = sorted(self.here)[int(raw[1])]
            return f"raw_{sorted(self.here.values()).index(self.here[there])}"
        return name


def names_here(
    optimizer: Any,
    averaged: Sequence[int],
    stores: tuple[str, ...],
    index: Mapping[str, Any],
    by_path_only: bool,
) -> dict[str, str] | None:
    """For each name in a file what it is called here; None if averages and variables do not match.

    What is kept goes to the variable of its path. Where paths are not the same (models that Keras
    named anew, files of 0.1), the first goes to the first variable that has an average, and so on.

    Args:
        optimizer: The optimizer whose state is in the file.
        averaged: The numbers of its variables that have an average.
        stores: Names of what it keeps beside each of them.
        index: What the file holds, by name.
        by_path_only: Bool. Whether the order must not be trusted.
    """
    if not stores:
        return {name: name for name in index}
    first = re.compile(rf"{re.escape(stores[0])}_({NUMBER})")
    theirs = sorted(int(found[1]) for name in index if (found := first.fullmatch(name)))
    if len(averaged) != len(theirs):
        return None
    built = _keras_internals.built_variables(optimizer)
    here = _by_path(
        {n: str(index[f"{stores[0]}_{n}"].attributes.get("path")) for n in theirs},
        {i: _keras_internals.path_of(built[i]) for i in averaged},
    )
    if here is None and by_path_only:
        return None
    places = Places(stores, here or dict(zip(theirs, averaged, strict=True)))
    names = {name: places.renamed(name) for name in index}
    return names if len(set(names.values())) == len(names) else None


def numbered(name: str, stores: tuple[str, ...]) -> tuple[str, int] | None:
    """The beginning and the number of what is kept, or was added, beside a variable."""
    kinds = "|".join([*map(re.escape, stores), "slot_.+"])
    found = re.fullmatch(rf"((?:{kinds})_)({NUMBER})", name)
    return (found[1], int(found[2])) if found else None


def _by_path(theirs: dict[int, str], ours: dict[int, str]) -> dict[int, int] | None:
    """For each number in the file that here, if paths or their ends tell the variables apart.

    The same layer's path may begin with its model's name or not: it depends on who built it.
    """
    for parts in (None, 3, 2):
        at = {_end(path, parts): i for i, path in ours.items()}
        ends = {n: _end(path, parts) for n, path in theirs.items()}
        if len(at) == len(ours) == len(set(ends.values())) and at.keys() == set(ends.values()):
            return {n: at[end] for n, end in ends.items()}
    return None


def _end(path: str, parts: int | None) -> str:
    return path if parts is None else "/".join(path.split("/")[-parts:])
