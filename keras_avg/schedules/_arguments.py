"""What the schedules' constructors accept. A check returns the value to keep or says what to do."""

import math
from collections.abc import Sequence
from typing import Any

LONGEST_STEP_SIZE = 2**29  # A cycle is two of them, and steps are int32 on most backends.


def number(value: Any) -> float:
    """`value` as a float, and NaN for what is none. A string or a bool is a slip, not a number."""
    if isinstance(value, bool | str):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def rate(argument: str, value: Any) -> float:
    learning_rate = number(value)
    if not 0.0 <= learning_rate < math.inf:
        raise ValueError(f"`{argument}` must be a number >= 0. Received: {argument}={value!r}.")
    return learning_rate


def one_of(argument: str, value: Any, choices: Sequence[str]) -> str:
    if not isinstance(value, str) or value not in choices:
        allowed = " or ".join(repr(choice) for choice in choices)
        raise ValueError(f"`{argument}` must be {allowed}. Received: {argument}={value!r}.")
    return value


def step_size(value: Any) -> int | float:
    steps = number(value)
    if not 1.0 <= steps <= LONGEST_STEP_SIZE:
        raise ValueError(
            "`step_size`, half a cycle, must be a number of steps in the range "
            f"[1, {LONGEST_STEP_SIZE}]. Received: step_size={value!r}."
        )
    return int(steps) if steps.is_integer() else steps
