"""Computes a weighted sum of values in float64."""

from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops


class WeightedSum:
    """The weighted sum of lists of values. The lists are added one after the other.

    A mean is the sum divided by the sum of the weights. It is rounded once to the variable's dtype.
    Values that are not floating-point numbers have no mean, so the last value is used.

    Args:
        variables: List of a model's variables.
    """

    def __init__(self, variables: Sequence[Any]) -> None:
        self._dtypes = [keras.backend.standardize_dtype(v.dtype) for v in variables]
        self._sums: list[Any] = [None] * len(self._dtypes)

    def add(self, values: Sequence[Any], weight: float = 1.0) -> None:
        """Add a list with one value for each variable. None stands for no value."""
        for i, value in enumerate(values):
            if value is None:
                continue
            if not keras.backend.is_float_dtype(self._dtypes[i]):
                self._sums[i] = np.array(ops.convert_to_numpy(value), copy=True)
            elif weight != 0.0:  # 0 * inf is NaN.
                self._sums[i] = _plus(self._sums[i], _float64(value), weight)

    def mean(self, total: float, more: Sequence[Any] | None = None) -> Iterator[Any]:
        """Yield the sum divided by `total` for each variable. None if there was no value.

        Args:
            total: Float. The sum of the weights.
            more: List of further values. They are part of this mean with weight 1, but are not
                added to the sum. Default None: no further values.
        """
        values: Sequence[Any] = more or [None] * len(self._sums)
        for dtype, kept, value in zip(self._dtypes, self._sums, values, strict=True):
            if not keras.backend.is_float_dtype(dtype):
                yield kept if value is None else value
                continue
            if value is not None:
                kept = _float64(value) if kept is None else kept + _float64(value)
            with np.errstate(over="ignore", invalid="ignore"):
                yield None if kept is None else (kept / total).astype(dtype)


def _float64(value: Any) -> Any:
    return ops.convert_to_numpy(value).astype(np.float64)


def _plus(kept: Any, value: Any, weight: float) -> Any:
    """`kept + weight * value`, computed in place. It may overwrite both `kept` and `value`."""
    if weight != 1.0:
        value *= weight
    if kept is None:
        return value
    kept += value
    return kept
