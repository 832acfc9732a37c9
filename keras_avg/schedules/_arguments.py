"""Checks of the schedules' arguments. A check returns the value to keep, or raises an error."""

from typing import Any

from keras_avg import _checks

LONGEST_STEP_SIZE = 2**29  # Most backends count steps in int32, and a cycle has two step sizes.


def step_size(value: Any) -> int | float:
    steps = _checks.number(value)
    if not 1.0 <= steps <= LONGEST_STEP_SIZE:
        raise ValueError(
            "`step_size`, half a cycle, must be a number of steps in the range "
            f"[1, {LONGEST_STEP_SIZE}]. Received: step_size={value!r}."
        )
    return int(steps) if steps.is_integer() else steps
