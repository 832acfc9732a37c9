"""The communicator of a worker that is alone."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_avg.distributed import _payload
from keras_avg.distributed.communicator import Communicator


class LocalCommunicator(Communicator):
    """A job of one worker: sums are copies, and nobody has to be waited for.

    So programs for several workers run alone without a change.

    Raises:
        ValueError: By `all_reduce_sum`, if an array is not of floats.

    Example:

    ```python
    communicator = keras_avg.distributed.LocalCommunicator()
    communicator.all_reduce_sum(model.trainable_variables)  # their values, in float32
    ```

    Reference:
        `MPI_COMM_SELF` of the Message Passing Interface.
    """

    rank = 0
    size = 1

    def all_reduce_sum(self, arrays: Sequence[Any]) -> list[Any]:
        """Copies, in float32 or float64, as `Communicator.all_reduce_sum` gives them."""
        dtype = _payload.payload_dtype(arrays)
        return [np.array(keras.ops.convert_to_numpy(array), dtype) for array in arrays]

    def barrier(self) -> None:
        """Return at once."""
