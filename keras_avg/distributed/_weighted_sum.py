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
    payload = [_weighted(array, weight) for array in arrays]
    *sums, total = communicator.all_reduce_sum([*payload, np.array(weight, "float32")])
    return sums, float(keras.ops.convert_to_numpy(total))


def _weighted(array: Any, weight: float) -> Any:
    dtype = array.dtype
    if dtype != "float32":  # most are, and the name of another takes its time
        dtype = keras.backend.standardize_dtype(dtype)
    wide = "float64" if dtype == "float64" else "float32"
    if weight in (0, PRESENT):
        return np.zeros(tuple(array.shape), wide)
    if weight == 1 and dtype == wide:
        return _backend.detached(array)
    return _backend.detached(keras.ops.convert_to_tensor(array, wide)) * weight
