"""Memory that is used over again: fresh pages cost ten times the copying."""

import sys

import numpy as np

ALIGNMENT = 64  # bytes, at which frameworks take an array as it is

_kept: list[np.ndarray] = []  # one at most


def host_memory(size: int, dtype: str) -> np.ndarray:
    """Aligned memory for so many elements: that of the last time, once no result uses it."""
    nbytes = size * np.dtype(dtype).itemsize + ALIGNMENT
    block = _kept.pop() if _kept else None
    in_use = sys.getrefcount(block) > 2  # by views, beside this name and the argument
    if block is None or in_use or block.nbytes != nbytes:
        block = np.empty(nbytes, "uint8")
    _kept.append(block)
    start = -block.ctypes.data % ALIGNMENT
    return block[start : start + nbytes - ALIGNMENT].view(dtype)
