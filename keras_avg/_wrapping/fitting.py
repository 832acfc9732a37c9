"""Checks that loaded values fit their variables. All checks run before a value is assigned."""

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_avg import _backend

LARGEST = 8  # bytes of a number
LOW_PRECISION = ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")


def check_fit(name: str, variables: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Refuse values whose number, names or shapes differ from those of the variables."""
    if len(values) != len(variables):
        _refuse(name, f"it has {len(variables)} variables. Received: {len(values)} variables.")
    for key, variable in variables.items():
        if key not in values:
            _refuse(name, f"it has a variable '{key}'. Received: {sorted(values)}.")
        value = values[key]
        shape = tuple(value.shape if hasattr(value, "shape") else np.shape(value))
        if shape != tuple(variable.shape):
            _refuse(
                name,
                f"its variable {_named(variable, key)} has shape {tuple(variable.shape)}. "
                f"Received: shape {shape}.",
            )


def check_dtypes(name: str, variables: Mapping[str, Any], entries: Mapping[str, Any]) -> None:
    """Refuse by a file's index what holds no plain numbers, before it is read.

    One element of another kind may be of any size: an array, a text, a record.
    """
    for key, entry in entries.items():
        if not _is_of_numbers(entry.dtype):
            variable = variables.get(key)
            dtype = getattr(variable, "dtype", "float32")
            _refuse(
                name,
                f"its variable {_named(variable, key)} has dtype {dtype}. "
                f"Received: dtype {entry.dtype}.",
            )


def _is_of_numbers(dtype: Any) -> bool:
    if isinstance(dtype, str):
        return dtype in LOW_PRECISION
    found = np.dtype(dtype)
    return found.name in LOW_PRECISION or (found.kind in "biuf" and found.itemsize <= LARGEST)


def check_numbers(name: str, variables: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Refuse text, and counter values that are negative, fractional, NaN or too large."""
    for key, variable in variables.items():
        value = np.asarray(ops.convert_to_numpy(values[key]))
        dtype = keras.backend.standardize_dtype(variable.dtype)
        if value.dtype.kind not in "biuf" and value.dtype.name not in LOW_PRECISION:
            _refuse(
                name,
                f"its variable {_named(variable, key)} has dtype {dtype}. "
                f"Received: dtype {value.dtype}.",
            )
        if counts(variable) and not _are_counts(value, np.iinfo(dtype).max):
            _refuse(name, f"its variable {_named(variable, key)} counts. Received: {value}.")


def counts(variable: Any) -> bool:
    """Whether the variable is a counter, so that only whole numbers fit."""
    return "int" in keras.backend.standardize_dtype(variable.dtype)


def _are_counts(value: np.ndarray, largest: int) -> bool:
    in_range = np.logical_and(value >= 0, value <= largest)  # False for NaN
    return bool(np.all(in_range)) and bool(np.all(value == np.floor(value)))


def _named(variable: Any, key: str) -> str:
    return repr(getattr(variable, "path", key))


def _refuse(name: str, difference: str) -> None:
    raise ValueError(
        f"The state does not fit optimizer '{name}': {difference} None of its own "
        "variables was changed. To start from another optimizer's file, load it with "
        "`skip_mismatch=True`."
    )


def assign(variables: dict[str, Any], values: dict[str, Any]) -> None:
    """Assign to each variable the value of its key. The value is copied, so no buffer is shared."""
    for key, variable in variables.items():
        variable.assign(_backend.copy(tensor(values[key], variable)))


def tensor(value: Any, variable: Any) -> Any:
    """A value as a tensor of the variable's dtype."""
    return ops.convert_to_tensor(value, variable.dtype)
