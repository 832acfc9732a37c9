"""The exponential moving average of the weights."""

from typing import TYPE_CHECKING, Any

import keras
from keras import ops

from keras_avg import _backend, _checks
from keras_avg._optimizers.averaged_optimizer_wrapper import AveragedOptimizerWrapper
from keras_avg._types import Config, DecayingAverageKeywords, OptimizerLike, Tensor
from keras_avg.decays import Decay

if TYPE_CHECKING:
    from typing_extensions import Unpack

LearningRateSchedule = keras.optimizers.schedules.LearningRateSchedule


@keras.saving.register_keras_serializable(package="keras_avg")
class MovingAverage(AveragedOptimizerWrapper):
    """Exponential moving average of the weights (Polyak averaging with forgetting).

    With step `i` counted from 0, after each update

        average <- decay(i) * average + (1 - decay(i)) * value

    The average begins with the values that the variables have just before the first update. While
    `i < start_step`, `decay(i)` is 0, so the average equals the variable. After that `decay(i)` is
    `average_decay`. With `dynamic_decay` and `s = i - start_step` it is
    `min(average_decay, (1 + s) / (10 + s))`.

    A `keras_avg.decays.Decay` computes `1 - decay(i)` directly, without rounding. It describes a
    half-life, a share of the run so far, or a warm-up. To keep several averages at once, nest the
    wrappers.

    With `average_period=k` an averaging takes place only when `(i + 1) % k == 0`, and uses
    `decay(i) ** k` as its decay. So the half-life, counted in steps, does not depend on `k`.

    Use `MovingAverage` for an average that follows training, and `SWA` for the plain mean of
    snapshots. Keras' own `use_ema` differs in three ways. It begins with the weights after the
    first step. It counts the micro-steps of gradient accumulation. It keeps the average in the
    variables' dtype, where a bfloat16 average with decay 0.999 never moves.

    Args:
        optimizer: The optimizer that takes the steps: a Keras optimizer, its name, or its config.
        sequential_update: Bool. See `AveragedOptimizerWrapper`.
        average_decay: Float in [0, 1]; or a `keras_avg.decays.Decay`; or a
            `keras.optimizers.schedules.LearningRateSchedule` whose value at step `i` is the decay
            (as the momentum ramps of BYOL and DINO). All values of a schedule must be in [0, 1],
            but only its value at step 0 is checked. Default 0.99.
        num_updates: Integer in [0, 2**31) or None. If given, the constructor replaces
            `average_decay` by `min(average_decay, (1 + num_updates) / (10 + num_updates))`.
        name: String. Default `"MovingAverage"`.
        start_step: Integer in [0, 2**31), in steps. Default 0.
        dynamic_decay: Bool. Whether the decay warms up. Default False.
        average_period: Integer in [1, 2**31), in steps. Default 1.
        **kwargs: `average_dtype`, `skip_nonfinite`, `gradient_transformers`,
            `gradient_aggregator`, `exclude`, `clipnorm`, `clipvalue`, `global_clipnorm`,
            `learning_rate`, `lr`: see `AveragedOptimizerWrapper`. `decay` is refused, because it
            could mean the average's decay or the learning rate's.

    Raises:
        TypeError: If `optimizer` is None, `sequential_update` is not a bool, `num_updates` not an
            integer, or `decay` is given.
        ValueError: If an argument is out of range; if `num_updates` is given together with a
            schedule or a `Decay`, or `dynamic_decay` with a `Decay`; or as for
            `AveragedOptimizerWrapper`.

    Example:

    ```python
    model.compile(optimizer=keras_avg.MovingAverage("adam", average_decay=0.999), loss="mse")
    model.fit(x, y, epochs=20)
    model.optimizer.assign_average_vars(model.variables)
    ```

    Reference:
        Polyak and Juditsky, Acceleration of Stochastic Approximation by Averaging,
        https://doi.org/10.1137/0330046; the warm-up is that of `tf.train.ExponentialMovingAverage`.
    """

    def __init__(
        self,
        optimizer: OptimizerLike,
        sequential_update: bool = True,
        average_decay: float | Decay | LearningRateSchedule = 0.99,
        num_updates: int | None = None,
        name: str | None = "MovingAverage",
        *,
        start_step: int = 0,
        dynamic_decay: bool = False,
        average_period: int = 1,
        **kwargs: "Unpack[DecayingAverageKeywords]",
    ) -> None:
        sequential_update = _checks.truth("sequential_update", sequential_update, "average_decay")
        average_decay = _capped(_decay(average_decay), num_updates)
        start_step = _checks.whole_number("start_step", start_step, minimum=0)
        dynamic_decay = _dynamic(dynamic_decay, average_decay)
        average_period = _checks.whole_number("average_period", average_period, minimum=1)
        super().__init__(optimizer, sequential_update, name, **kwargs)
        self.average_decay: Any = average_decay
        self.num_updates = None if num_updates is None else int(num_updates)
        self.start_step = start_step
        self.dynamic_decay = dynamic_decay
        self.average_period = average_period

    def is_due(self, step: Tensor) -> bool | Tensor:
        return self.average_period == 1 or (step + 1) % self.average_period == 0

    # The textbook writes  average = d * average + (1 - d) * value.  This adds a rounding error of
    # d * average at each step. The equal line  average + (1 - d) * (value - average)  avoids it. It
    # is a step of weight 1 - d.
    # With an averaging only at every k-th step, one value counts for k steps, as if it had been the
    # same in all of them:  average = d**k * average + (1 - d**k) * value.
    # In float32, 1 - d is wrong in the third digit for d = 0.99999. So constants are computed in
    # Python floats. The warm-up is computed without a subtraction from 1:
    #     1 - min(d, (1 + s) / (10 + s)) = max(1 - d, 9 / (10 + s))

    def value_weight(self, step: Tensor) -> float | Tensor:
        weight = self._weight_over_period(step)
        if self.start_step == 0:
            return weight
        dtype = _backend.widest_float()
        return ops.where(step < self.start_step, ops.ones((), dtype), _tensor(weight))

    def _weight_over_period(self, step: Any) -> Any:
        if isinstance(self.average_decay, Decay):
            updates = ops.maximum(step + 1 - self.start_step, 1)
            return self.average_decay.value_weight(updates, self.average_period)
        if isinstance(self.average_decay, float) and not self.dynamic_decay:
            return 1.0 - self.average_decay**self.average_period
        weight = self._weight_of_one_step(step)
        if self.average_period == 1:
            return weight
        # This is 1 - (1 - weight)**k, computed without a subtraction from 1.
        return -ops.expm1(self.average_period * ops.log1p(-weight))

    def _weight_of_one_step(self, step: Any) -> Any:
        if isinstance(self.average_decay, LearningRateSchedule):
            weight = 1.0 - _tensor(self.average_decay(step))
        else:
            weight = _tensor(1.0 - self.average_decay)
        if self.dynamic_decay:
            steps = ops.cast(ops.maximum(step - self.start_step, 0), _backend.widest_float())
            warming = 9.0 / (10.0 + steps)
            # Not `ops.maximum`: on torch it turns two float64 tensors into a float32 one.
            weight = ops.where(weight > warming, weight, warming)
        return weight

    def get_config(self) -> Config:
        decay = self.average_decay
        if not isinstance(decay, float):
            decay = keras.saving.serialize_keras_object(decay)
        return super().get_config() | {
            "average_decay": decay,
            "num_updates": self.num_updates,
            "start_step": self.start_step,
            "dynamic_decay": self.dynamic_decay,
            "average_period": self.average_period,
        }


def _tensor(weight: Any) -> Any:
    # Not `ops.cast`: it rounds a Python float to float32 first.
    return ops.convert_to_tensor(weight, _backend.widest_float())


def _dynamic(dynamic_decay: Any, decay: Any) -> bool:
    if _checks.truth("dynamic_decay", dynamic_decay) and isinstance(decay, Decay):
        raise ValueError(
            "A `Decay` says by itself how it warms up. Received: dynamic_decay=True and "
            f"average_decay={decay!r}. Leave `dynamic_decay` out, or use "
            "keras_avg.decays.PowerWarmup."
        )
    return dynamic_decay


def _decay(value: Any) -> Any:
    if isinstance(value, Decay):
        return value
    if callable(value) and not isinstance(value, LearningRateSchedule):
        raise ValueError(
            "`average_decay` must be a number in the range [0, 1], a keras_avg.decays.Decay, or a "
            "LearningRateSchedule for a decay that depends on the step. Received: "
            f"average_decay={value!r}. Put the function into a subclass of "
            "keras.optimizers.schedules.LearningRateSchedule: its `__call__(step)` gives the decay."
        )
    if not isinstance(value, LearningRateSchedule):
        return _checks.fraction("average_decay", value)
    first = _checks.number(value(ops.convert_to_tensor(0)))  # NaN inside compiled code
    if first < 0.0 or first > 1.0:
        raise ValueError(
            "`average_decay` must have values in the range [0, 1]. Received: "
            f"average_decay={value!r}, which is {first} at step 0."
        )
    return value


def _capped(decay: Any, num_updates: Any) -> Any:
    if num_updates is None:
        return decay
    if isinstance(num_updates, bool) or not hasattr(num_updates, "__index__"):
        raise TypeError(
            f"`num_updates` must be an integer or None. Received: num_updates={num_updates!r}. For "
            "a decay that warms up while training, use dynamic_decay=True."
        )
    num_updates = _checks.whole_number("num_updates", num_updates, minimum=0, unit="updates")
    if not isinstance(decay, float):
        raise ValueError(
            "`num_updates` caps a constant decay, once. Received: "
            f"num_updates={num_updates} and average_decay={decay!r}. Leave one of them out."
        )
    return min(decay, (1 + num_updates) / (10 + num_updates))
