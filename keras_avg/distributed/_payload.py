"""The arrays that workers sum: arrays of floats, in float32 or wider."""

import math
import zlib
from collections.abc import Sequence
from typing import Any

import keras


def payload_dtype(arrays: Sequence[Any]) -> str:
    """The dtype in which the arrays are summed. Raises ValueError if one is not of floats."""
    one_of_each = {getattr(array, "dtype", None): array for array in arrays}
    dtypes = {_float_dtype(array) for array in one_of_each.values()}
    return "float64" if "float64" in dtypes else "float32"


def description(arrays: Sequence[Any], dtype: str) -> list[int]:
    """Numbers that must be equal on all workers: of arrays, of elements, of bits, and shapes."""
    bits = int(dtype.removeprefix("float"))
    shapes = [tuple(array.shape) for array in arrays]
    return [len(shapes), sum(map(math.prod, shapes)), bits, zlib.crc32(repr(shapes).encode())]


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
