"""The communicator of a job with one worker."""

from collections.abc import Sequence

import keras
import numpy as np

from keras_avg._types import Tensor
from keras_avg.distributed import _payload
from keras_avg.distributed.communicator import Communicator


class LocalCommunicator(Communicator):
    """The communicator of a job with one worker. Its sums are copies, and it never waits.

    With it, a program for several workers also runs as one process, without a change.

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

    def all_reduce_sum(self, arrays: Sequence[np.ndarray | Tensor]) -> list[np.ndarray]:
        """Copies of the arrays, in float32 or float64, as for `Communicator.all_reduce_sum`."""
        dtype = _payload.payload_dtype(arrays)
        return [np.array(keras.ops.convert_to_numpy(array), dtype) for array in arrays]

    def barrier(self) -> None:
        """Return at once."""
