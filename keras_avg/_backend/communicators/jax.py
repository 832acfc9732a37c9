"""The engine is jax.distributed. The launcher sets the variables of keras.distribution.

`keras.distribution.initialize` is not called, because one cannot pass timeouts to it. When another
worker dies, JAX would by default end this process from C++, and its weights would be lost. It would
also wait for the dead worker at exit. So the option `jax_enable_recoverability` is set. With it JAX
does neither, and this file must notice the death itself. One case remains: the coordination service
runs in worker 0, and when worker 0 dies, JAX ends the others.
"""

import atexit
import contextlib
import json
import os
import threading
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any

import jax
import numpy as np
from jax._src import distributed
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from keras_avg import _backend
from keras_avg._backend.communicators import (
    TooLateError,
    UnreachableError,
    host_memory,
    place,
    variables,
)

ADDRESSES = "KERAS_DISTRIBUTION_JOB_ADDRESSES"
SIZE = "KERAS_DISTRIBUTION_NUM_PROCESSES"
RANK = "KERAS_DISTRIBUTION_PROCESS_ID"
LONGEST_SILENCE = 100  # seconds without a heartbeat. This is the default of JAX.
MARGIN = 2  # seconds. A call with a timeout of its own gets this much more time to end by itself.


def launched() -> tuple[int, int] | None:
    if jax.distributed.is_initialized():  # The user has done that.
        return jax.process_index(), jax.process_count()
    found = variables(ADDRESSES, SIZE, RANK)
    if found is None:
        return None
    return place(RANK, found[RANK], SIZE, found[SIZE])


class Engine:
    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        if not jax.distributed.is_initialized():
            _start(timeout)
        self.rank, self.size = jax.process_index(), jax.process_count()
        # JAX has no public name for meetings and heartbeats.
        self._client: Any = distributed.global_state.client
        self._meetings = 0
        self._missing: set[int] = set()
        one_each = {device.process_index: device for device in reversed(jax.devices())}
        mesh = Mesh(np.array([one_each[rank] for rank in range(self.size)]), ("worker",))
        self._device = one_each[self.rank]
        self._one_row_each = NamedSharding(mesh, PartitionSpec("worker"))
        everywhere = NamedSharding(mesh, PartitionSpec())
        self._sum_rows = jax.jit(lambda rows: rows.sum(0), out_shardings=everywhere)
        if self.rank == 0:
            atexit.register(self._outlive_the_others)

    def meet(self, numbers: Sequence[int]) -> list[list[int]]:
        self._meetings += 1
        folder = f"keras_avg/{self._meetings}/"
        try:
            self._client.key_value_set(f"{folder}{self.rank}", json.dumps(numbers))
            if self._meetings > 2:  # All workers have read the numbers of that meeting.
                self._client.key_value_delete(f"keras_avg/{self._meetings - 2}/{self.rank}")
            self._within(self._client.wait_at_barrier, folder, round(1000 * self._timeout))
            brought = self._brought(folder)
        except Exception as error:
            raise UnreachableError(error, self._note_missing(folder)) from error
        return [brought[rank] for rank in range(self.size)]

    def sum(self, arrays: Sequence[Any], dtype: str) -> list[np.ndarray]:
        # The arrays are packed on the host, for two reasons. A compiled concatenation of two
        # hundred arrays takes seconds to compile. And after arrays from a global mesh, JAX would
        # compile the train step again.
        values = [np.asarray(array) for array in _backend.detached(arrays)]
        flat = host_memory(sum(value.size for value in values), dtype)
        np.concatenate([value.reshape(-1) for value in values], out=flat)
        try:
            return _parts(self._within(self._sum, flat), values)
        except Exception as error:
            raise UnreachableError(error) from error

    def _sum(self, flat: np.ndarray) -> np.ndarray:
        wide = jax.enable_x64(True) if flat.dtype == np.float64 else contextlib.nullcontext()
        with wide:
            row = jax.device_put(flat[np.newaxis], self._device)
            rows = jax.make_array_from_single_device_arrays(
                (self.size, flat.size), self._one_row_each, [row]
            )
            return np.asarray(self._sum_rows(rows).addressable_data(0))

    def _brought(self, folder: str) -> dict[int, list[int]]:
        pairs = self._client.key_value_dir_get(folder)
        return {int(key.rpartition("/")[2]): json.loads(numbers) for key, numbers in pairs}

    def _note_missing(self, folder: str) -> tuple[int, ...]:
        with contextlib.suppress(Exception):
            self._missing = set(range(self.size)) - self._brought(folder).keys()
        return tuple(sorted(self._missing))

    def _within(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function of JAX in a thread, and raise if it does not return in time.

        Some functions of JAX wait for ever. The program can go on even if the thread cannot.
        """
        result: futures.Future = futures.Future()

        def run() -> None:
            try:
                result.set_result(call(*arguments))
            except Exception as error:
                result.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        patience = self._timeout + MARGIN
        try:
            return result.result(patience)
        except futures.TimeoutError:
            raise TimeoutError(f"no answer in {patience:g} s") from None

    def _outlive_the_others(self) -> None:
        """Keep the coordination service running until the others have ended.

        They may still save their weights. Without the service JAX would end them.
        """
        others = [rank for rank in range(self.size) if rank not in self._missing]
        with contextlib.suppress(Exception):
            self._within(self._client.get_live_nodes, others)


def _parts(flat: np.ndarray, like: list[np.ndarray]) -> list[np.ndarray]:
    ends = np.cumsum([array.size for array in like])
    pairs = zip(np.split(flat, ends[:-1]), like, strict=True)
    return [part.reshape(array.shape) for part, array in pairs]


def _start(timeout: float) -> None:
    found = variables(ADDRESSES, SIZE, RANK) or {}
    coordinator = found[ADDRESSES].split(",")[0]
    silence = max(2, min(LONGEST_SILENCE, round(timeout)))
    if not hasattr(jax, "enable_x64"):
        raise RuntimeError(f"Several workers on JAX need jax >= 0.8. Received: {jax.__version__}.")
    jax.config.update("jax_enable_recoverability", True)
    try:
        jax.distributed.initialize(
            coordinator,
            int(found[SIZE]),
            int(found[RANK]),
            initialization_timeout=max(1, round(timeout)),
            heartbeat_timeout_seconds=silence,
            # By default JAX would listen on every interface of the machine.
            coordinator_bind_address=os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", coordinator),
        )
    except RuntimeError as error:
        late = "must be called before" in str(error)
        raise (TooLateError(error) if late else UnreachableError(error)) from error
