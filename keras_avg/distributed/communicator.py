"""The interface for averages over several workers: rank and size, a sum, and a barrier."""

import abc
import functools
from collections.abc import Sequence

import numpy as np

from keras_avg._types import Tensor


class Communicator(abc.ABC):
    """Lets the workers of one job sum arrays.

    A worker is a process with its own copy of the model and its own share of the data. All workers
    must make the same calls in the same order. `keras_avg.distributed.initialize` returns the
    communicator of the job that a launcher has started. `LocalCommunicator` is for one worker
    alone. If your workers communicate in another way, subclass this class: set `rank` and `size`,
    and define `all_reduce_sum`.

    Raises:
        TypeError: If this class itself, or a subclass without `all_reduce_sum`, is constructed.

    Example:

    ```python
    communicator = keras_avg.distributed.initialize()
    (total,) = communicator.all_reduce_sum([keras.ops.ones(3)])
    print(total)  # on each of two workers: [2. 2. 2.]
    ```

    Reference:
        `tf.contrib.opt.ModelAverageOptimizer`, whose workers met at a parameter server.
    """

    #: This worker's number, from 0 to `size - 1`.
    rank: int

    #: The number of workers.
    size: int

    @functools.cached_property
    def is_chief(self) -> bool:
        """Whether this is worker 0. All workers start from its weights."""
        return self.rank == 0

    @abc.abstractmethod
    def all_reduce_sum(self, arrays: Sequence[np.ndarray | Tensor]) -> list[np.ndarray]:
        """Sum each array over the workers.

        Args:
            arrays: List of float arrays: Keras variables, tensors of the backend, or NumPy arrays.
                Every worker must bring the same shapes in the same order.

        Returns:
            A list of tensors or NumPy arrays with these shapes. They have the same bits on every
            worker, and share no memory with an argument. All are float32. If any argument is
            float64, all are float64; then every worker must bring a float64 array.

        Raises:
            ValueError: If the number, the shapes or the dtypes of the arrays differ between
                workers. Then every worker raises, nothing was summed, and the workers can go on. If
                an array is not of floats, because float32 cannot hold every integer. Then only this
                worker raises.
            RuntimeError: If a worker is dead or does not answer. All other workers raise within the
                timeout of the communicator. The arguments have not changed.
        """

    def barrier(self) -> None:
        """Wait until every worker has called this. The default sums one number.

        Raises:
            RuntimeError: If a worker is dead or does not answer. All other workers raise within the
                timeout of the communicator.
        """
        self.all_reduce_sum([np.zeros((), "float32")])
