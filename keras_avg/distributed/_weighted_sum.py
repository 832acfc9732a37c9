"""The weighted sum over workers. It is used to average, to broadcast, and to wait for others."""

import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_avg import _backend
from keras_avg.distributed.communicator import Communicator

#: The weight of a worker that is training, but has nothing to add. It is too small to change the
#: rounded sum of the weights, but tells the others that this worker is still training.
PRESENT = 2.0**-40


def weighted_sum(
    communicator: Communicator, arrays: Sequence[Any], weight: float
) -> tuple[list[Any], float]:
    """The sum of each array over the workers, where each worker has a weight.

    The sum divided by the sum of the weights is the weighted mean:

        mean = sum(weight_r * array_r) / sum(weight_r)      over the ranks r

    If all workers have weight 1, this is the plain mean. If one worker has weight 1 and all others
    have 0, its arrays are broadcast, bit for bit except for the sign of zeros. If all workers have
    weight 0, there is no mean. The arrays of a worker with weight 0 or `PRESENT` are not read, so
    their NaN and infinite values do not enter the sum.

    Args:
        communicator: The communicator. All workers must call this function.
        arrays: List of float arrays, as for `Communicator.all_reduce_sum`.
        weight: Number >= 0, the weight of this worker.

    Returns:
        The list of sums, in float32 or float64, and the sum of the weights.
    """
    if not 0 <= weight < math.inf:
        raise ValueError(
            f"`weight` must be a finite number >= 0, of this worker. Received: weight={weight!r}."
        )
    *sums, total = communicator.all_reduce_sum(
        [*_weighted(arrays, weight), np.array(weight, "float32")]
    )
    return sums, float(keras.ops.convert_to_numpy(total))


def _weighted(arrays: Sequence[Any], weight: float) -> list[Any]:
    if weight in (0, PRESENT):
        return [np.zeros(tuple(array.shape), _wide(array)) for array in arrays]
    tensors = _backend.detached(arrays)
    # The name of a dtype takes its time, so it is looked up once for each.
    names = {dtype: keras.backend.standardize_dtype(dtype) for dtype in {t.dtype for t in tensors}}
    return [_times(weight, tensor, names[tensor.dtype]) for tensor in tensors]


def _times(weight: float, tensor: Any, dtype: str) -> Any:
    is_wide = dtype in ("float32", "float64")
    wide = tensor if is_wide else keras.ops.cast(tensor, "float32")
    return wide if weight == 1 else wide * weight


def _wide(array: Any) -> str:
    dtype = keras.backend.standardize_dtype(array.dtype)
    return "float64" if dtype == "float64" else "float32"
