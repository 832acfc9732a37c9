"""Which of a model's variables the arrays in a file belong to."""

from collections.abc import Mapping, Sequence
from typing import Any

from keras_avg import _keras_internals
from keras_avg._wrapping import belonging


def places_in(
    model: Any, arrays: Mapping[int, Any], otherwise: Sequence[int]
) -> dict[int, int] | None:
    """For each array's number the place of its variable in a model; None if they do not fit.

    They are matched by the paths that were written beside them. Where paths are not the same, as of
    models that Keras named anew, the first array belongs to the first of `otherwise`, and so on.

    Args:
        model: A model.
        arrays: Dict of data sets by their numbers.
        otherwise: List of places in `model.variables`.
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
