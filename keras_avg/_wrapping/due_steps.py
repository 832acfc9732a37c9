"""Finds the steps that are due. It asks a rule about many steps at once, outside of training."""

from typing import Any

import numpy as np
from keras import ops

LOOK_AHEAD = 2**22  # The largest number of steps in one question to a rule.


def first_due(wrapper: Any, steps: np.ndarray) -> int | None:
    """The first of the given steps after which a wrapper averages.

    Args:
        wrapper: An averaging wrapper.
        steps: Array of steps in ascending order.

    Returns:
        A step, or None if none of them is due.

    Raises:
        TypeError, ValueError, RuntimeError: If the rule takes no array of steps.
    """
    due = wrapper.is_due(steps)
    if due is True:
        return int(steps[0]) if len(steps) else None
    found = np.flatnonzero(ops.convert_to_numpy(due))
    return int(steps[found[0]]) if len(found) else None


def next_due(wrapper: Any) -> int | None:
    """The next step after which a wrapper averages. None if it is far away or cannot be found."""
    done = wrapper.updates_so_far()
    try:
        return first_due(wrapper, np.arange(done, done + LOOK_AHEAD, dtype="int32"))
    except (TypeError, ValueError, RuntimeError):
        return None
