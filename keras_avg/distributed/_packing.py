"""Many arrays as one flat buffer, in float32 or wider."""

import math
import zlib
from collections.abc import Sequence
from typing import Any

import keras

from keras_avg._backend import communicators


class Packed:
    """A copy of the arrays in one buffer of the backend.

    Args:
        arrays: List of float arrays: Keras variables, tensors or NumPy arrays.
    """

    def __init__(self, arrays: Sequence[Any]) -> None:
        dtypes = [_float_dtype(array) for array in arrays]
        self.dtype = "float64" if "float64" in dtypes else "float32"
        self.shapes = [tuple(array.shape) for array in arrays]
        self.size = sum(map(math.prod, self.shapes))
        self.flat = communicators.of_backend().pack(arrays, self.dtype) if arrays else None

    def description(self) -> list[int]:
        """Numbers that are equal where arrays can be summed: how many, elements, bits, shapes."""
        shapes = zlib.crc32(repr(self.shapes).encode())
        return [len(self.shapes), self.size, int(self.dtype.removeprefix("float")), shapes]

    def unpack(self) -> list[Any]:
        """The buffer as arrays of the shapes that were packed."""
        if not self.shapes:
            return []
        return communicators.of_backend().unpack(self.flat, self.shapes)


def _float_dtype(array: Any) -> str:
    dtype = getattr(array, "dtype", None)
    name = None if dtype is None else keras.backend.standardize_dtype(dtype)
    if name is None or not keras.backend.is_float_dtype(name):
        raise ValueError(
            "Only arrays of floats are summed over the workers, in float32 or wider, which does "
            f"not hold every integer. Received: {type(array).__name__} with dtype={name}. "
            "Cast it to a float dtype that holds its values."
        )
    return name
