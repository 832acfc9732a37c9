"""The one sum over workers that serves averaging, broadcasting and keeping company."""

import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_avg.distributed.communicator import Communicator


def weighted_sum(
    communicator: Communicator, arrays: Sequence[Any], weight: float, is_training: bool = True
) -> tuple[list[Any], float, int]:
    """The sum over the workers of each array, each worker's with its weight.

    Over the sum of the weights it is the mean:

        mean = sum(weight_r * array_r) / sum(weight_r)      over the ranks r

    Weight 1 everywhere gives the plain mean. Weight 1 on one worker and 0 on the others broadcasts
    the arrays of that one, bit for bit but for the sign of zeros. Weight 0 everywhere gives no
    mean. The arrays of a worker with weight 0 are not looked at: what is NaN or infinite there
    stays.

    Args:
        communicator: The workers; all of them call this.
        arrays: List of float arrays, as for `Communicator.all_reduce_sum`.
        weight: Number >= 0, of this worker.
        is_training: Bool. False for a worker that only keeps the others company.

    Returns:
        The sums, in float32 or float64; the sum of the weights; and how many workers are training.
    """
    if not 0 <= weight < math.inf:
        raise ValueError(
            f"`weight` must be a finite number >= 0, of this worker. Received: weight={weight!r}."
        )
    payload = [_weighted(array, weight) for array in arrays]
    counts = np.array([weight, is_training], "float32")
    *sums, counts = communicator.all_reduce_sum([*payload, counts])
    total, training = keras.ops.convert_to_numpy(counts).tolist()
    return sums, total, int(training)


def _weighted(array: Any, weight: float) -> Any:
    if weight == 1:
        return array
    wide = "float64" if keras.backend.standardize_dtype(array.dtype) == "float64" else "float32"
    if weight == 0:
        return np.zeros(array.shape, wide)
    if isinstance(array, np.ndarray | np.generic):
        return array.astype(wide) * weight
    return keras.ops.cast(array, wide) * weight
