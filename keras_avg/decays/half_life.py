"""A constant decay that is given by its half-life."""

import math

import keras

from keras_avg import _checks
from keras_avg._types import Config, Tensor
from keras_avg.decays.decay import Decay


@keras.saving.register_keras_serializable(package="keras_avg")
class HalfLife(Decay):
    """A constant decay. After `steps` steps, a value has half of its first weight in the average.

        weight = 1 - 2 ** (-period / steps)

    Args:
        steps: Number > 0, the half-life in steps. It need not be an integer.

    Raises:
        ValueError: If `steps` is not a finite number > 0.

    Example:

    ```python
    optimizer = keras_avg.MovingAverage("adam", average_decay=keras_avg.decays.HalfLife(500))
    ```

    Reference:
        Karras et al., Analyzing and Improving the Image Quality of StyleGAN,
        https://arxiv.org/abs/1912.04958, whose averages are given by their half-life.
    """

    def __init__(self, steps: float) -> None:
        number = _checks.number(steps)
        if not 0.0 < number < math.inf:
            raise ValueError(
                f"`steps`, the half-life, must be a finite number > 0, in steps. Received: "
                f"steps={steps!r}."
            )
        self.steps = number

    # A decay d with half-life h satisfies  d ** h = 1 / 2.  So over a period of k steps the average
    # keeps the share  d ** k = 2 ** (-k / h).  The weight  1 - 2 ** (-k / h)  is a small difference
    # of large numbers. It is computed as  -expm1(-k * ln 2 / h),  in Python floats, to be exact.

    def value_weight(self, t: Tensor, period: int) -> float:
        """The weight of the new value, in [0, 1]."""
        return -math.expm1(-period * math.log(2.0) / self.steps)

    def get_config(self) -> Config:
        """The arguments that construct an equal decay."""
        return {"steps": self.steps}
