"""Several workers in one process. Each is a thread, and all threads meet at each collective.

Results do not depend on how the threads are scheduled. Between two meetings each thread uses only
its own objects, and sums are computed in the order of ranks. Keras keeps its seed and its dtype
policy for each thread, so set them in `work`.
"""

import threading

import keras
import numpy as np

from keras_avg.distributed import Communicator


class FakeCommunicator(Communicator):
    """The communicator of one worker. The workers share `job`. `sums` counts the collectives."""

    def __init__(self, rank, job):
        self.rank, self.size = rank, job.size
        self._job, self.sums = job, 0

    def all_reduce_sum(self, arrays):
        self.sums += 1
        brought = self._job.exchange(self.rank, [_wide(array) for array in arrays])
        forms = [[(a.shape, a.dtype) for a in arrays] for arrays in brought]
        if any(form != forms[0] for form in forms):
            raise ValueError(f"The workers do not bring the same arrays. Received: {forms}.")
        return [np.sum(same, axis=0, dtype=same[0].dtype) for same in zip(*brought, strict=True)]

    def barrier(self):
        self._job.exchange(self.rank, None)


class Twin:
    """A communicator with a second worker that always brings the same arrays, until it is lost."""

    rank, size, is_chief, is_lost = 1, 2, False, False

    def all_reduce_sum(self, arrays):
        if self.is_lost:
            raise RuntimeError("A worker is lost.")
        return [2 * keras.ops.convert_to_numpy(array) for array in arrays]

    def barrier(self):
        pass


def _wide(array):
    array = np.array(keras.ops.convert_to_numpy(array), copy=True)
    return array if array.dtype == "float64" else array.astype("float32")


class Job:
    def __init__(self, size, timeout):
        self.size, self._brought = size, [None] * size
        self._barrier = threading.Barrier(size, timeout=timeout)

    def exchange(self, rank, things):
        """Wait for all workers, and return what each brought. Raise if one does not come."""
        self._brought[rank] = things
        self._wait()
        brought = list(self._brought)
        self._wait()
        return brought

    def abort(self):
        self._barrier.abort()

    def _wait(self):
        try:
            self._barrier.wait()
        except threading.BrokenBarrierError:
            raise RuntimeError("A worker is dead or stalled.") from None


def run(size, work, timeout=60):
    """Call `work(communicator)` in a thread for each worker. Return the results, by rank.

    The first exception of a worker is raised here. The other workers then stop waiting.
    """
    job, results, errors = Job(size, timeout), [None] * size, []

    def worker(rank):
        try:
            results[rank] = work(FakeCommunicator(rank, job))
        except BaseException as error:
            errors.append(error)
            job.abort()

    threads = [threading.Thread(target=worker, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout)
    if errors:
        raise errors[0]
    if any(thread.is_alive() for thread in threads):
        raise RuntimeError(f"A worker did not end within {timeout} s.")
    return results
