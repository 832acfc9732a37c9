"""Finds the variable for each number in a file's names, and whether the model still has it.

The names of arrays in a file end with a number: the place of the variable among those with which
the optimizer was built. A loaded model may list its variables in another order (float8 layers do
that), or may no longer have some of them. So each array in a file has attributes: the path of its
variable, and further facts that the reader needs. Files of version 0.1 have no attributes.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from keras_avg import _keras_internals

COUNTERS = ("updates", "snapshots", "averages_in_model")
NUMBER = "0|[1-9][0-9]{0,8}"  # The package writes numbers so: each number has one name.
RAW = re.compile(rf"raw_({NUMBER})")
LISTED = 8  # the largest number of paths in a message

# Why a file may have no averages. The text is part of the error when somebody asks for them.
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
    """The facts about the variables of the averages that a file contains.

    Attributes:
        gone: Paths of variables that have averages, but are no longer in the saved model.
        may_not_fit: Whether the model, when saved, trained other variables than the optimizer had.
        why_none: Key of `WHY` if the file has no averages, otherwise "".
    """

    gone: tuple[str, ...] = ()
    may_not_fit: bool = False
    why_none: str = ""

    def attributes(self) -> dict[str, str]:
        """The labels as attributes of an array. Empty ones are left out."""
        listed = "\n".join(self.gone[:LISTED])
        said = {"gone": listed, "may_not_fit": "yes" * self.may_not_fit, "why_none": self.why_none}
        return {name: value for name, value in said.items() if value}


def labels(optimizer: Any, averaged: Sequence[int], model: Any) -> Labels:
    """The labels of an optimizer for the file of `model`, which is None if it is not known."""
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
    """The numbers of the averaged variables that are not in `model` (None if it is not known)."""
    if model is None:
        return []
    there = {_keras_internals.variable_index(optimizer, v) for v in model.variables}
    return [i for i in averaged if i not in there]


def read(index: Mapping[str, Any]) -> Labels:
    """The labels from the attributes in a file. An unknown or missing one takes its default."""
    said = index[COUNTERS[0]].attributes if COUNTERS[0] in index else {}
    why = said.get("why_none", "")
    return Labels(
        tuple(filter(None, said.get("gone", "").split("\n")))[:LISTED],
        bool(said.get("may_not_fit", "")),
        why if why in WHY else "",
    )


class Places(NamedTuple):
    """Translates the numbers in a file's names to the numbers of the variables here.

    Attributes:
        stores: Names of the stores.
        here: Dict from the number in the file to the number of the same variable here.
    """

    stores: tuple[str, ...]
    here: dict[int, int]

    def renamed(self, name: str) -> str:
        """The name here for a name in the file."""
        found = numbered(name, self.stores)
        if found is not None:
            kind, number = found
            return f"{kind}{self.here.get(number, number)}"
        raw = RAW.fullmatch(name)
        if raw is not None and int(raw[1]) < len(self.here):
            # Raw values are numbered among the averaged variables only.
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
    """The name here for each name in the file, or None if averages and variables do not match.

    An average goes to the variable that has its path. Paths may differ, because Keras gave the
    model another name, or because the file is of version 0.1. Then the order decides: the first
    average goes to the first averaged variable, and so on.

    Args:
        optimizer: The optimizer whose state is in the file.
        averaged: The numbers of its variables that have an average.
        stores: Names of its stores.
        index: The entries of the file, by name.
        by_path_only: Bool. Whether only paths may decide, because the order may be wrong.
    """
    if not stores:
        return {name: name for name in index}
    first = re.compile(rf"{re.escape(stores[0])}_({NUMBER})")
    theirs = sorted(int(found[1]) for name in index if (found := first.fullmatch(name)))
    if len(averaged) != len(theirs):
        return None
    built = _keras_internals.built_variables(optimizer)
    here = by_path(
        {n: str(index[f"{stores[0]}_{n}"].attributes.get("path")) for n in theirs},
        {i: _keras_internals.path_of(built[i]) for i in averaged},
    )
    if here is None and by_path_only:
        return None
    places = Places(stores, here or dict(zip(theirs, averaged, strict=True)))
    names = {name: places.renamed(name) for name in index}
    return names if len(set(names.values())) == len(names) else None


def numbered(name: str, stores: tuple[str, ...]) -> tuple[str, int] | None:
    """The beginning and the number in the name of a store's variable or an added slot."""
    kinds = "|".join([*map(re.escape, stores), "slot_.+"])
    found = re.fullmatch(rf"((?:{kinds})_)({NUMBER})", name)
    return (found[1], int(found[2])) if found else None


def by_path(theirs: dict[int, str], ours: dict[int, str]) -> dict[int, int] | None:
    """The number here for each number in the file, or None if the paths do not decide it.

    The path of one and the same variable may begin with its model's name or not. That depends on
    how the layer was built. So the ends of the paths are compared too.
    """
    for parts in (None, 3, 2):
        at = {_end(path, parts): i for i, path in ours.items()}
        ends = {n: _end(path, parts) for n, path in theirs.items()}
        are_unique = len(at) == len(ours) and len(set(ends.values())) == len(ends)
        if are_unique and at.keys() >= set(ends.values()):
            return {n: at[end] for n, end in ends.items()}
    return None


def _end(path: str, parts: int | None) -> str:
    return path if parts is None else "/".join(path.split("/")[-parts:])
