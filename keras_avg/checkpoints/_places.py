"""Finds the variables of a model to which the arrays in a file belong."""

from collections.abc import Mapping, Sequence
from typing import Any

from keras_avg import _keras_internals
from keras_avg._wrapping import belonging


def places_in(
    model: Any, arrays: Mapping[int, Any], otherwise: Sequence[int]
) -> dict[int, int] | None:
    """A dict from the number of each array to the place of its variable in a model.

    Arrays and variables are matched by the paths in the file. The paths differ if Keras gave the
    model new names. Then the first array belongs to the first place in `otherwise`, and so on.

    Args:
        model: A model.
        arrays: Dict of data sets by their numbers.
        otherwise: List of places in `model.variables`, for files whose paths differ.

    Returns:
        The dict, or None if the arrays do not fit the model.
    """
    variables = model.variables
    theirs = {n: str(array.attrs.get("path")) for n, array in arrays.items()}
    ours = {i: _keras_internals.path_of(v) for i, v in enumerate(variables)}
    found = belonging.by_path(theirs, ours)
    if found is None and len(otherwise) == len(arrays):
        found = dict(zip(sorted(arrays), otherwise, strict=True))
    if found is None or any(
        tuple(arrays[n].shape) != tuple(variables[i].shape) for n, i in found.items()
    ):
        return None
    return found
