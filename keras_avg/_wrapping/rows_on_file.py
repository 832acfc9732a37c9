"""Writes a ring as one array for each row, and reads it back as one.

In memory, a ring is one variable with a row for each value. In a file, row 2 of the ring
`deviation` beside model variable 0 is the array `deviation_2_0`. So no array in a file is larger
than the model's variables, and sharded files are possible wherever they are possible for the model.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from keras_avg._wrapping.belonging import NUMBER


class Rows(NamedTuple):
    """The entry of a whole ring in a file's index.

    Attributes:
        shape: The shape of the ring's variable.
        dtype: The dtype of its rows.
        attributes: The attributes of its first row.
        names: The names of its rows, in order.
    """

    shape: tuple[int, ...]
    dtype: Any
    attributes: dict[str, str]
    names: list[str]


def written(name: str, array: np.ndarray, rings: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Yield the names and arrays with which a variable's value is written.

    Args:
        name: The variable's name.
        array: Its value.
        rings: Names of the rings.
    """
    ring, _, number = name.rpartition("_")
    if ring not in rings:
        yield name, array
        return
    for place in range(len(array)):
        yield f"{ring}_{place}_{number}", array[place, ...]


def joined(index: Mapping[str, Any], rings: tuple[str, ...]) -> dict[str, Any]:
    """The index of a file as if each ring were one array.

    Rows that are incomplete, or unlike each other, stay as they are: nothing expects such arrays.
    """
    rows: dict[str, dict[int, str]] = {}
    pattern = re.compile(rf"({'|'.join(map(re.escape, rings))})_({NUMBER})_({NUMBER})")
    for name in index if rings else ():
        if found := pattern.fullmatch(name):
            rows.setdefault(f"{found[1]}_{found[3]}", {})[int(found[2])] = name
    entries = dict(index)
    for ring, by_place in rows.items():
        names = [by_place[place] for place in sorted(by_place)]
        kinds = {(index[name].shape, str(index[name].dtype)) for name in names}
        if sorted(by_place) == list(range(len(names))) and len(kinds) == 1 and ring not in index:
            first = index[names[0]]
            entries[ring] = Rows((len(names), *first.shape), first.dtype, first.attributes, names)
            for name in names:
                del entries[name]
    return entries


def read(store: Mapping[str, Any], name: str, entry: Any) -> Any:
    """The array with this name and entry in the joined index."""
    if not isinstance(entry, Rows):
        return store[name][...]
    return np.stack([store[row][...] for row in entry.names])
