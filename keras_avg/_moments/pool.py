"""Mean and variance of all elements that a BatchNormalization layer has normalized."""

import warnings
from typing import Any, NamedTuple

import numpy as np
from keras import ops


class Moments(NamedTuple):
    """The moments of one call of a layer.

    Attributes:
        number: The number of the layer.
        shape: The shape of the inputs that the layer has normalized.
        mask: Bool array with all axes of the inputs but the last, or None.
        mean: The mean for each channel.
        variance: The biased variance for each channel.
    """

    number: Any
    shape: Any
    mask: Any
    mean: Any
    variance: Any


class Pool:
    """Mean and variance, per channel, of all elements that one layer has normalized so far.

    Args:
        layer: The BatchNormalization layer.
    """

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self._count: Any = 0.0
        self._mean: Any = 0.0
        self._squares: Any = 0.0  # sum of squared deviations from the mean

    # The variance,  sum(n_b * (v_b + m_b**2)) / N - mean**2,  is a small difference of large
    # numbers if the mean is far from zero. So the pool keeps the sum of squared deviations from the
    # mean, which needs no such difference. Let N be the number of elements so far, and let a call
    # have n elements. With  d = m_b - mean,  the call moves the mean by  d * n / (N + n).  The new
    # sum of squared deviations from the new mean is
    #     squares + n * v_b + d**2 * N * n / (N + n).

    def add(self, found: Moments) -> None:
        """Add the elements of one call."""
        count, mean, variance = self._elements(found), _array(found.mean), _array(found.variance)
        share = count / np.maximum(self._count + count, 1)
        difference = np.where(count > 0, mean - self._mean, 0)  # Without elements, moments are NaN.
        self._mean = self._mean + difference * share
        self._squares = self._squares + np.where(count > 0, count * variance, 0)
        self._squares = self._squares + difference**2 * self._count * share
        self._count = self._count + count

    def _elements(self, found: Moments) -> Any:
        """The number of elements in a call for each channel."""
        shape = tuple(map(int, ops.convert_to_numpy(found.shape)))
        axis = self._layer.axis % len(shape)
        if found.mask is None:
            return np.prod(shape[:axis] + shape[axis + 1 :], dtype=np.float64)
        counted = ops.convert_to_numpy(found.mask).astype(bool)[..., np.newaxis]
        others = tuple(i for i in range(len(shape)) if i != axis)
        return np.broadcast_to(counted, shape).sum(axis=others, dtype=np.float64)

    def assign(self) -> None:
        """Assign the statistics to the layer, except for channels without elements."""
        layer = self._layer
        if not np.all(self._count):
            warnings.warn(
                f"No data reached {layer.path!r}, or not all of its channels, or in compiled code "
                "only: it keeps its statistics there.",
                stacklevel=3,
            )
        if not np.any(self._count):
            return
        variance = self._squares / np.maximum(self._count, 1)
        _assign(layer.moving_mean, self._mean, self._count)
        _assign(layer.moving_variance, variance, self._count)
        if getattr(layer, "renorm", False):
            # At the next training step, the layer computes its variance from this one.
            _assign(layer.moving_stddev, np.sqrt(variance + layer.epsilon), self._count)


def _array(tensor: Any) -> Any:
    return ops.convert_to_numpy(tensor).astype(np.float64).reshape(-1)


def _assign(variable: Any, value: Any, count: Any) -> None:
    before = ops.convert_to_numpy(variable.value).astype(np.float64)
    variable.assign(np.where(count > 0, value, before))
