"""Computes weights for files that imitate an annealing of the learning rate."""

import itertools
import math
from collections.abc import Callable
from typing import Any

from keras_avg import _checks

CURVES: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1.0 - x,
    "cosine": lambda x: (1.0 + math.cos(math.pi * x)) / 2.0,
    "1-sqrt": lambda x: 1.0 - math.sqrt(x),
}
ROUNDING = 1e-6  # A user's curve may be computed in float32.


def merge_weights(number: int, decay: str | Callable[[float], float] = "linear") -> list[float]:
    """Weights for the last files of a run at a constant rate. They imitate an annealed rate.

    Let `w(x)` be the curve of the annealed rate over the time of the files. It falls from 1 at
    `x = 0` to 0 at `x = 1`. Let `k = number - 1` and `w_j = w(j / (k + 1))`. Then file `j` (the
    oldest is 0) has the weight

        c_0 = 1 - w_1,   c_j = w_j - w_(j+1),   c_k = w_k

    So the change between two files has the factor that the lower rate would have given it. The sum
    of the weights is 1. `"linear"` gives the plain mean.

    Args:
        number: Integer >= 1, the number of files.
        decay: `"linear"`, `"cosine"`, `"1-sqrt"`, or a function of a float in [0, 1]. The function
            begins at 1, decreases, and is never below 0. Default `"linear"`.

    Returns:
        List of `number` floats, oldest file first.

    Raises:
        ValueError: If `number` is not an integer >= 1. If `decay` is none of these: it does not
            begin at 1, increases, never decreases, or leaves the range [0, 1].

    Example:

    ```python
    weights = keras_avg.checkpoints.merge_weights(len(files), "1-sqrt")
    keras_avg.checkpoints.average(model, files, weights)
    ```

    Reference:
        Tian et al., WSM: Decay-Free Learning Rate Schedule via Checkpoint Merging for LLM
        Pre-training, https://arxiv.org/abs/2507.17634.
    """
    number = _checks.whole_number("number", number, minimum=1, unit="files")
    curve = _curve(decay)
    if decay == "linear":
        return [1.0 / number] * number
    values = [_at(curve, decay, j / number) for j in range(number)]
    _refuse_unless_it_goes_down(decay, values)

    # Let d_1, d_2, ... be the updates between the files. The paper multiplies the constant rate by
    # w_1, w_2, ... Such a run would have ended at  file_0 + w_1 d_1 + ... + w_k d_k.  Because d_j
    # is file_j - file_(j-1), file_j has the factor w_j from d_j, and - w_(j+1) from d_(j+1).
    values[0] = 1.0
    return [w - after for w, after in zip(values, [*values[1:], 0.0], strict=True)]


def _curve(decay: Any) -> Callable[[float], Any]:
    if isinstance(decay, str) and decay in CURVES:
        return CURVES[decay]
    if not callable(decay):
        raise ValueError(
            f"`decay` must be {', '.join(map(repr, CURVES))}, or a function of a number in the "
            f"range [0, 1]. Received: decay={decay!r}."
        )
    return decay


def _at(curve: Callable[[float], Any], decay: Any, x: float) -> float:
    received = curve(x)
    value = _checks.number(received)
    if not 0.0 <= value <= 1.0 + ROUNDING:
        raise ValueError(
            f"`decay` must have values in the range [0, 1]. Received: decay={decay!r}, which is "
            f"{received!r} at {x}. Divide a learning rate by the one that it begins at."
        )
    return value


def _refuse_unless_it_goes_down(decay: Any, values: list[float]) -> None:
    if abs(values[0] - 1.0) > ROUNDING:
        raise ValueError(
            f"`decay` must begin at 1. Received: decay={decay!r}, which is {values[0]} at 0. "
            "Divide a learning rate by the one that it begins at."
        )
    steps = list(itertools.pairwise(values))
    rises = [j for j, (value, after) in enumerate(steps, start=1) if after > value]
    if rises or (steps and values[-1] == values[0]):
        at = rises[0] if rises else len(values) - 1
        raise ValueError(
            f"`decay` must be decreasing. Received: decay={decay!r}, which is {values[at - 1]} at "
            f"{(at - 1) / len(values):.4g} and {values[at]} at {at / len(values):.4g}."
        )
