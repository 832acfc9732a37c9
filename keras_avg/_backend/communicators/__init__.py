"""The functions that use each framework's communication engine. Each file has the same names.

* `launched()`: the rank and the number of workers that the framework's launcher has put into the
  environment, or None without a launcher. It raises ValueError if only some of the variables are
  set: such a worker would train alone, and nobody would notice.
* `Engine(timeout)`: joins the job, and waits up to `timeout` seconds for the other workers. It has
  `rank` and `size`.
* `Engine.meet(numbers)`: waits for all workers, and returns the numbers of each worker, by rank.
  All workers bring equally many. A meeting comes before each sum. Without it, most engines abort
  the process, or wait for ever, when another worker is gone or brings arrays of another size.
* `Engine.sum(arrays, dtype)`: the sums over the workers of variables, tensors or NumPy arrays. The
  arrays are sent as one flat buffer, because one collective on it costs a hundredth of two hundred
  collectives on small arrays.

Failures raise `UnreachableError`, with the engine's message, and with the missing ranks if the
engine knows them. If the framework was used before the engine was started, `TooLateError` is
raised.
"""

import importlib
import os
import weakref
from types import ModuleType
from typing import Any

import keras
import numpy as np

ALIGNMENT = 64  # bytes. Frameworks use an array without a copy if it is aligned to this.

# At most one block of memory, with a weak reference to the array that used it last.
_kept_memory: list[tuple[Any, Any]] = []


class UnreachableError(Exception):
    """A worker is dead or does not answer. `missing` has the ranks that the engine knows."""

    def __init__(self, error: object, missing: tuple[int, ...] = ()) -> None:
        super().__init__(str(error).strip())
        self.missing = missing


class TooLateError(Exception):
    """The framework was used before the engine was started."""


def has_engine() -> bool:
    """Whether Keras can train on this backend. On NumPy and OpenVINO it only loads models."""
    return keras.backend.backend() in ("jax", "tensorflow", "torch")


def of_backend() -> ModuleType:
    """The file for Keras' backend. It is imported when it is needed, and not with the package."""
    return importlib.import_module(f"{__name__}.{keras.backend.backend()}")


def variables(*names: str) -> dict[str, str] | None:
    """These environment variables, or None if none of them is set. Raises if only some are set."""
    found = {name: os.environ[name] for name in names if os.environ.get(name)}
    missing = [name for name in names if name not in found]
    if found and missing:
        raise ValueError(
            "The environment names a job of several workers in part only. "
            f"Received: {', '.join(f'{k}={v}' for k, v in found.items())}; not set: "
            f"{', '.join(missing)}. Start the program by its launcher, which sets all of them, or "
            "unset them to train alone."
        )
    return found or None


def place(rank_name: str, rank: str, size_name: str, size: str) -> tuple[int, int]:
    """Rank and size as integers. Raises if the rank is not in the range of the size."""
    try:
        numbers = int(rank), int(size)
    except ValueError:
        numbers = -1, -1
    if not 0 <= numbers[0] < numbers[1]:
        raise ValueError(
            f"`{rank_name}` must be a whole number from 0 up to, and without, `{size_name}`. "
            f"Received: {rank_name}={rank}, {size_name}={size}."
        )
    return numbers


def host_memory(size: int, dtype: str) -> np.ndarray:
    """Aligned memory for `size` elements. It is the same memory as before if nothing uses it now.

    The first write to new memory takes ten times as long as the copy itself.
    """
    nbytes = size * np.dtype(dtype).itemsize + ALIGNMENT
    block, last_use = _kept_memory.pop() if _kept_memory else (memoryview(b""), lambda: None)
    if last_use() is not None or block.nbytes != nbytes:
        block = memoryview(np.empty(nbytes, "uint8"))
    start = -np.frombuffer(block, "uint8").ctypes.data % ALIGNMENT
    memory = np.frombuffer(block, dtype, size, start)
    # All views of `memory` keep it alive, so the reference says whether one of them still exists.
    _kept_memory.append((block, weakref.ref(memory)))
    return memory
