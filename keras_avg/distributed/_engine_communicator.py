"""The communicator of a job. It uses the engine of the backend."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_avg._backend import communicators
from keras_avg.distributed import _payload
from keras_avg.distributed.communicator import Communicator

BARRIER = [0, 0, 0, 0]


class EngineCommunicator(Communicator):
    """Lets all workers meet before each collective.

    If a worker is missing or brings other arrays, an engine may abort the process or wait for ever.
    The meeting finds that out first, and raises an error.
    """

    def __init__(self, engine: Any, timeout: float) -> None:
        self._engine = engine
        self._timeout = timeout
        self._failure: str | None = None
        self.rank, self.size = engine.rank, engine.size

    def all_reduce_sum(self, arrays: Sequence[Any]) -> list[Any]:
        dtype = _payload.payload_dtype(arrays)
        description = _payload.description(arrays, dtype)
        self._meet(description)
        if description[1] == 0:  # elements
            return [np.zeros(tuple(array.shape), dtype) for array in arrays]
        return self._ask(self._engine.sum, arrays, dtype)

    def barrier(self) -> None:
        self._meet(BARRIER)

    def _meet(self, description: list[int]) -> None:
        brought = self._ask(self._engine.meet, description)
        if any(other != description for other in brought):
            every = "; ".join(f"worker {rank}: {_words(b)}" for rank, b in enumerate(brought))
            raise ValueError(
                "The workers do not bring the same arrays in the same order, so nothing was "
                f"summed. Received: {every}. Build the same model, and make the same calls, on "
                "all of them."
            )

    def _ask(self, call: Any, *arguments: Any) -> Any:
        if self._failure:
            raise RuntimeError(f"This communicator has failed before. {self._failure}")
        try:
            return call(*arguments)
        except communicators.UnreachableError as error:
            self._failure = self._explanation(error)
            raise RuntimeError(self._failure) from error

    def _explanation(self, error: communicators.UnreachableError) -> str:
        missing = ", ".join(str(rank) for rank in error.missing if rank != self.rank)
        who = f"worker(s) {missing}" if missing else "some worker (the engine does not say which)"
        return (
            f"Worker {self.rank} of {self.size} has lost {who}: dead, or without an answer for "
            f"{self._timeout:g} s. The weights of this worker are as they were before the call and "
            "can be saved. Then end this program, and let the launcher start the job again. The "
            f"engine said: {error}"
        )


def _words(description: list[int]) -> str:
    if description == BARRIER:
        return "a barrier"
    arrays, size, bits, shapes = description
    return f"{arrays} arrays of {size} float{bits} in all (shapes {shapes:08x})"
