"""The one sum over workers that serves averaging, broadcasting and keeping company."""

import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_avg import _backend
from keras_avg.distributed.communicator import Communicator

#: The weight of a worker that is training, but has nothing to add: too small to change any sum.
PRESENT = 2.0**-40


def weighted_sum(
    communicator: Communicator, arrays: Sequence[Any], weight: float
) -> tuple[list[Any], float]:
    """The sum over the workers of each array, each worker's with its weight.

    Over the sum of the weights it is the mean:

        mean = sum(weight_r * array_r) / sum(weight_r)      over the ranks r

    Weight 1 everywhere gives the plain mean. Weight 1 on one worker and 0 on the others broadcasts
    the arrays of that one, bit for bit but for the sign of zeros. Weight 0 everywhere gives no
    mean. The arrays of a worker with weight 0 or `PRESENT` are not looked at: what is NaN or
    infinite there stays.

    Args:
        communicator: The workers; all of them call this.
        arrays: List of float arrays, as for `Communicator.all_reduce_sum`.
        weight: Number >= 0, of this worker.

    Returns:
        The sums, in float32 or float64; and the sum of the weights.
    """
    if not 0 <= weight < math.inf:
        raise ValueError(
            f"`weight` must be a finite number >= 0, of this worker. Received: weight={weight!r}."
        )
    payload = [_weighted(array, weight) for array in arrays]
    *sums, total = communicator.all_reduce_sum([*payload, np.array(weight, "float32")])
    return sums, float(keras.ops.convert_to_numpy(total))


def _weighted(array: Any, weight: float) -> Any:
    dtype = keras.backend.standardize_dtype(array.dtype)
    wide = "float64" if dtype == "float64" else "float32"
    if weight in (0, PRESENT):
        return np.zeros(tuple(array.shape), wide)
    if weight == 1 and dtype == wide:
        return _backend.detached(array)
    return _backend.detached(keras.ops.convert_to_tensor(array, wide)) * weight
