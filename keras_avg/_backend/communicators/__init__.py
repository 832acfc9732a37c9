"""What workers of one job ask of the framework's own engine. One file each, the same names.

* `launched()`: the rank and the number of workers that the framework's launcher has put into the
  environment; None without a launcher. ValueError where it names a job only in part: such a worker
  would train alone and nobody would notice.
* `Engine(timeout)`: joins the job, and waits up to `timeout` seconds for the other workers. Has
  `rank` and `size`.
* `Engine.meet(numbers)`: waits for all workers, and gives the numbers that each brought, as many
  from each, by rank. A meeting comes before each sum, because most engines abort the process, or
  wait without end, when a peer is gone or brings another size.
* `Engine.sum(arrays, dtype)`: the sums over the workers of variables, tensors or NumPy arrays. They
  travel as one flat buffer: a collective on that costs a hundredth of two hundred on small ones.

What fails raises `UnreachableError`, with the engine's own words and the ranks that are missing
where it knows them; `TooLateError` where the framework was used before the engine was started.
"""

import importlib
import os
import weakref
from types import ModuleType
from typing import Any

import keras
import numpy as np

ALIGNMENT = 64  # bytes, at which frameworks take an array as it is

_kept_memory: list[tuple[Any, Any]] = []  # one block at most, and who had it last


class UnreachableError(Exception):
    """Some worker is dead or stalled; `missing` are the ranks, as far as the engine knows them."""

    def __init__(self, error: object, missing: tuple[int, ...] = ()) -> None:
        super().__init__(str(error).strip())
        self.missing = missing


class TooLateError(Exception):
    """The engine has to be started before the framework is used."""


def has_engine() -> bool:
    """Whether Keras trains on this backend at all; on NumPy and OpenVINO it loads models only."""
    return keras.backend.backend() in ("jax", "tensorflow", "torch")


def of_backend() -> ModuleType:
    """The file for Keras' backend, loaded when it is needed and not with the package."""
    return importlib.import_module(f"{__name__}.{keras.backend.backend()}")


def variables(*names: str) -> dict[str, str] | None:
    """These environment variables: all of them, or None where none is set."""
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
    """Rank and size as numbers that go together."""
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
    """Aligned memory for so many elements: that of the last time, once nothing uses it.

    Fresh pages cost ten times the copying.
    """
    nbytes = size * np.dtype(dtype).itemsize + ALIGNMENT
    block, last_use = _kept_memory.pop() if _kept_memory else (memoryview(b""), lambda: None)
    if last_use() is not None or block.nbytes != nbytes:
        block = memoryview(np.empty(nbytes, "uint8"))
    start = -np.frombuffer(block, "uint8").ctypes.data % ALIGNMENT
    memory = np.frombuffer(block, dtype, size, start)
    _kept_memory.append((block, weakref.ref(memory)))  # which all views of it keep alive
    return memory
