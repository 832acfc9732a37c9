"""Bias-corrected exponential moving average: it does not lag behind the weights."""

from typing import TYPE_CHECKING, Any

import keras
from keras import ops

from keras_avg import _backend, _checks
from keras_avg._optimizers.averaged_optimizer_wrapper import AveragedOptimizerWrapper
from keras_avg._types import Config, OptimizerLike, Tensor, WrapperKeywords

if TYPE_CHECKING:
    from typing_extensions import Unpack


@keras.saving.register_keras_serializable(package="keras_avg")
class BEMA(AveragedOptimizerWrapper):
    """Bias-corrected EMA: a moving average with a correction for its lag.

    Let `t` (1, 2, ...) be the number of updates since `start_step`, `theta` the variable, `start`
    its value when averaging began, and `age = lag + multiplier * t`. Then

        EMA     <- EMA + age ** -power * (theta - EMA)
        average  = EMA + age ** -bias_power * (theta - start)

    An averaging takes place when `(i + 1) % average_period == 0`, and uses the value that the
    variable has then. Both EMA and start begin with the variable's value before the first update.
    While `i < start_step` they follow the variable.

    BEMA is meant for fine-tuning. There the weights move away from their start, and a plain average
    lags behind them. `MovingAverage` has no such correction, and its decay does not change.

    `get_slot(variable, "average")` is the EMA, `"start"` is the start, and `"read"` is the average
    that the swapped model holds. Memory: three copies of the parameters.

    Args:
        optimizer: The optimizer that takes the steps: a Keras optimizer, its name, or its config.
        power: Number >= 0. How fast the EMA's weights get smaller. Default 0.5.
        bias_power: Number >= 0. How fast the correction gets smaller. Default 0.2.
        lag: Number >= 0, in steps. Default 10.
        multiplier: Number >= 0. `lag + multiplier` must be at least 1, because otherwise a weight
            would be larger than 1. Default 1.
        start_step: Integer in [0, 2**31), in steps. Default 0.
        average_period: Integer in [1, 2**31), in steps. Default 1.
        name: String. Default `"BEMA"`.
        **kwargs: `sequential_update`, `average_dtype`, `skip_nonfinite`, `exclude`,
            `gradient_transformers`, `gradient_aggregator`, `clipnorm`, `clipvalue`,
            `global_clipnorm`, `learning_rate`, `lr`, `decay`: see `AveragedOptimizerWrapper`.

    Raises:
        TypeError: If `optimizer` is None.
        ValueError: If an argument is out of range, or as for `AveragedOptimizerWrapper`.

    Example:

    ```python
    model.compile(optimizer=keras_avg.BEMA("adamw", average_period=50), loss="mse")
    model.fit(x, y, epochs=3)
    keras_avg.assign_average_vars(model)
    ```

    Reference:
        Block et al., EMA Without the Lag: Bias-Corrected Iterate Averaging Schemes,
        https://arxiv.org/abs/2508.00180, Algorithm 1. `BEMACallback` of TRL.
    """

    def __init__(
        self,
        optimizer: OptimizerLike,
        power: float = 0.5,
        bias_power: float = 0.2,
        lag: float = 10.0,
        multiplier: float = 1.0,
        start_step: int = 0,
        average_period: int = 1,
        name: str | None = "BEMA",
        **kwargs: "Unpack[WrapperKeywords]",
    ) -> None:
        power = _checks.non_negative("power", power)
        bias_power = _checks.non_negative("bias_power", bias_power)
        lag = _checks.non_negative("lag", lag)
        multiplier = _checks.non_negative("multiplier", multiplier)
        if lag + multiplier < 1.0:
            raise ValueError(
                "`lag + multiplier` must be at least 1, or the first weight would be larger than "
                f"1. Received: lag={lag!r}, multiplier={multiplier!r}."
            )
        start = _checks.whole_number("start_step", start_step, minimum=0)
        period = _checks.whole_number("average_period", average_period, minimum=1)
        super().__init__(optimizer, name=name, **kwargs)
        self.power = power
        self.bias_power = bias_power
        self.lag = lag
        self.multiplier = multiplier
        self.start_step = start
        self.average_period = period

    # Algorithm 1 has  beta_t = (rho + gamma t) ** -kappa  and  alpha_t = (rho + gamma t) ** -eta,
    # and returns  alpha_t (theta_t - theta_0) + EMA_t  at the steps at which it updates. So the
    # result is stored at these steps, in "read". Averaging begins after the update before
    # start_step. This update is always due, with any period, because it sets EMA and start to the
    # variable.

    def stores(self) -> dict[str, str]:
        return {"average": "variable", "start": "variable", "read": "variable"}

    def is_due(self, step: Tensor) -> bool | Tensor:
        is_due = (step + 1) % self.average_period == 0
        return is_due | (step + 1 == self.start_step) if self.start_step else is_due

    def value_weight(self, step: Tensor) -> float | Tensor:
        return self._unless_following(step, self._age(step) ** -self.power, 1.0)

    def accumulate(self, due: bool | Tensor, step: Tensor) -> None:
        average, start, read = (self.kept[name] for name in ("average", "start", "read"))
        average.lerp_if(due, lambda: _backend.scalar(lambda: self.value_weight(step)))
        if self.start_step:
            follows = _backend.scalar(lambda: ops.logical_and(due, step < self.start_step))
            start.lerp_if(follows, lambda: 1.0)
        share = _backend.scalar(
            lambda: self._unless_following(step, self._age(step) ** -self.bias_power, 0.0)
        )

        def corrected(read: Any, theta: Any, average: Any, start: Any) -> Any:
            return average + ops.cast(share, read.dtype) * (theta - start)

        read.assign_if(due, corrected, average, start)

    def averages(self) -> list[Tensor]:
        return self.kept["read"].values()

    def get_config(self) -> Config:
        return super().get_config() | {
            "power": self.power,
            "bias_power": self.bias_power,
            "lag": self.lag,
            "multiplier": self.multiplier,
            "start_step": self.start_step,
            "average_period": self.average_period,
        }

    def _age(self, step: Any) -> Any:
        updates = ops.maximum(step + 1 - self.start_step, 1)
        return self.lag + self.multiplier * ops.cast(updates, _backend.widest_float())

    def _unless_following(self, step: Any, value: Any, while_following: float) -> Any:
        if not self.start_step:
            return value
        instead = ops.convert_to_tensor(while_following, _backend.widest_float())
        return ops.where(step < self.start_step, instead, value)
