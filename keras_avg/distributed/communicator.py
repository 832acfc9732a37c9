"""What an average over several workers needs: a place among them, a sum and a meeting."""

import abc
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np


class Communicator(abc.ABC):
    """Lets the workers of one job sum up arrays.

    A worker is a process with its own copy of the model and its own share of the data. All workers
    make the same calls in the same order. `keras_avg.distributed.initialize` gives the communicator
    of the job that a launcher has started; `LocalCommunicator` is that of a worker alone. For any
    other way to reach each other, subclass this: set `rank` and `size`, write `all_reduce_sum`.

    Raises:
        TypeError: If this class itself, or a subclass without `all_reduce_sum`, is constructed.

    Example:

    ```python
    communicator = keras_avg.distributed.initialize()
    (total,) = communicator.all_reduce_sum([numpy.ones(3)])
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
        """Whether this is worker 0, whose weights all start from."""
        return self.rank == 0

    @abc.abstractmethod
    def all_reduce_sum(self, arrays: Sequence[Any]) -> list[Any]:
        """Sum each array over the workers.

        Args:
            arrays: List of float arrays: Keras variables, tensors of the backend, or NumPy arrays.
                The same shapes, in the same order, on every worker.

        Returns:
            A list of tensors or NumPy arrays with these shapes, the same bits on every worker, and
            none of them shares memory with an argument. All are float32; float64 if any argument
            on this worker is, which must then be so on every worker.

        Raises:
            ValueError: On every worker, if the arrays differ in number, shape or dtype from worker
                to worker. Nothing was summed then, and the workers can go on. On this worker, if an
                array is not of floats: float32 does not hold every integer.
            RuntimeError: If a worker is dead or stalled: within the timeout of the communicator,
                on all others. The arguments are as they were.
        """

    def barrier(self) -> None:
        """Wait until every worker has come here. By itself this is a sum of nothing.

        Raises:
            RuntimeError: If a worker is dead or stalled: within the timeout of the communicator,
                on all others.
        """
        self.all_reduce_sum([np.zeros((), "float32")])
