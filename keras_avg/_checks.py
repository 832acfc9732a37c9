"""Checks of plain arguments. A check returns the value to keep, or raises an error."""

import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any

import keras


def number(value: Any) -> float:
    """A number as a float, or NaN if it is no number. Strings and bools are no numbers here."""
    if isinstance(value, keras.Variable):  # On torch, `float` of a trained variable warns.
        value = keras.ops.convert_to_numpy(value)
    try:
        return math.nan if isinstance(value, bool | str) else float(value)
    except (TypeError, ValueError):
        return math.nan


def whole_number(
    argument: str, value: Any, minimum: int, unit: str = "steps", below: int = 2**31
) -> int:
    """An integer in int32, because most backends count steps in int32."""
    try:
        found = operator.index(value)
    except TypeError:
        found = None
    limit = "2**31" if below == 2**31 else below
    if found is None or isinstance(value, bool) or not minimum <= found < below:
        raise ValueError(
            f"`{argument}` must be an integer >= {minimum} and < {limit}, in {unit}. "
            f"Received: {argument}={value!r}.{_in_steps(value) if unit == 'steps' else ''}"
        )
    return found


def _in_steps(value: Any) -> str:
    if not 0.0 < number(value) < 1.0:
        return ""
    return f" For a share of the whole run pass int({value!r} * epochs * steps_per_epoch)."


def fraction(argument: str, value: Any) -> float:
    """A number in the range [0, 1]."""
    found = number(value)
    if not 0.0 <= found <= 1.0:
        raise ValueError(
            f"`{argument}` must be a number in the range [0, 1]. Received: {argument}={value!r}."
        )
    return found


def non_negative(argument: str, value: Any) -> float:
    """A finite number >= 0."""
    found = number(value)
    if not 0.0 <= found < math.inf:
        raise ValueError(f"`{argument}` must be a number >= 0. Received: {argument}={value!r}.")
    return found


def truth(argument: str, value: Any, meant: str = "") -> bool:
    """True or False. If it is a number, the error asks whether the argument `meant` was meant."""
    if isinstance(value, bool):
        return value
    hint = ""
    if meant and isinstance(value, numbers.Real):
        hint = f" Did you mean {meant}={value!r}? Pass it by name."
    raise TypeError(f"`{argument}` must be True or False. Received: {argument}={value!r}.{hint}")


def one_of(argument: str, value: Any, choices: Sequence[str]) -> str:
    """One of several strings."""
    if isinstance(value, str) and value in choices:
        return value
    allowed = " or ".join(repr(choice) for choice in choices)
    raise ValueError(f"`{argument}` must be {allowed}. Received: {argument}={value!r}.")


def verbosity(value: Any) -> int:
    """Keras' `verbose` for `keras.utils.Progbar`: a bar for `"auto"`."""
    if value not in ("auto", 0, 1, 2):
        raise ValueError(f"`verbose` must be 'auto', 0, 1 or 2. Received: verbose={value!r}.")
    return 1 if value == "auto" else int(value)


def scope_name(value: Any) -> str | None:
    """The name of a scope for variables, or None."""
    if value is None or (isinstance(value, str) and value and "/" not in value):
        return value
    raise ValueError(f"`name` must be a non-empty string without '/'. Received: name={value!r}.")
