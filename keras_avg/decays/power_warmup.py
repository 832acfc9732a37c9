"""A decay that grows with a power of the step number."""

import math
from typing import Any

import keras
from keras import ops

from keras_avg import _backend, _checks
from keras_avg._types import Config, Tensor
from keras_avg.decays.decay import Decay


@keras.saving.register_keras_serializable(package="keras_avg")
class PowerWarmup(Decay):
    """A decay that grows from 0 to a constant, as in ema-pytorch, timm and diffusers.

        decay(1) = 0
        decay(t) = clip(1 - (1 + (t - 1) / inv_gamma) ** -power, min_decay, decay)

    With an averaging every `k` steps, the average keeps the share `decay(t) ** k`.

    These libraries count steps from 0, so their step is `t - 1`. With the defaults the decay is
    0.999 after 31,600 steps. `power=3/4` is better for shorter runs.

    Args:
        decay: Number in the range [0, 1]. The decay at the end of the warm-up.
        inv_gamma: Number > 0, in steps. A larger one makes the warm-up slower. Default 1.
        power: Number > 0. A larger one makes the warm-up faster. Default 2/3.
        min_decay: Number in the range [0, decay]. The smallest decay from the second update on.
            Default 0.

    Raises:
        ValueError: If an argument is out of range.

    Example:

    ```python
    decay = keras_avg.decays.PowerWarmup(0.9999, power=3 / 4)
    optimizer = keras_avg.MovingAverage("adam", average_decay=decay)
    ```

    Reference:
        `EMAModel` of Hugging Face diffusers, https://github.com/huggingface/diffusers,
        `training_utils.py`; `EMA` of https://github.com/lucidrains/ema-pytorch.
    """

    def __init__(
        self, decay: float, inv_gamma: float = 1.0, power: float = 2 / 3, min_decay: float = 0.0
    ) -> None:
        self.decay = _checks.fraction("decay", decay)
        self.inv_gamma = _positive("inv_gamma", inv_gamma)
        self.power = _positive("power", power)
        self.min_decay = _checks.fraction("min_decay", min_decay)
        if self.min_decay > self.decay:
            raise ValueError(
                f"`min_decay` must not be larger than `decay`. Received: min_decay={min_decay!r}, "
                f"decay={decay!r}."
            )

    # The libraries clip the decay d. Then the weight 1 - d is a small difference in float32. So the
    # weight w is clipped here, between bounds that are computed in Python floats:
    #     w = clip((1 + (t - 1) / inv_gamma) ** -power, 1 - decay, 1 - min_decay).
    # Over k steps the average keeps the share  (1 - w) ** k.  So the weight for a period of k is
    #     1 - (1 - w) ** k = -expm1(k * log1p(-w)).

    def value_weight(self, t: Tensor, period: int) -> float | Tensor:
        """The weight of the new value, in [0, 1]."""
        dtype = _backend.widest_float()
        before = ops.cast(ops.maximum(t, 1) - 1, dtype)
        growing = (1.0 + before / self.inv_gamma) ** (-self.power)
        lowest = ops.convert_to_tensor(1.0 - self.decay, dtype)
        highest = ops.convert_to_tensor(1.0 - self.min_decay, dtype)
        weight = ops.where(growing < lowest, lowest, growing)
        weight = ops.where(weight > highest, highest, weight)
        weight = ops.where(before == 0, ops.ones((), dtype), weight)
        return weight if period == 1 else -ops.expm1(period * ops.log1p(-weight))

    def get_config(self) -> Config:
        """The arguments that construct an equal decay."""
        return {
            "decay": self.decay,
            "inv_gamma": self.inv_gamma,
            "power": self.power,
            "min_decay": self.min_decay,
        }


def _positive(argument: str, value: Any) -> float:
    number = _checks.number(value)
    if not 0.0 < number < math.inf:
        raise ValueError(
            f"`{argument}` must be a finite number > 0. Received: {argument}={value!r}."
        )
    return number
