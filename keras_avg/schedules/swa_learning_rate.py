"""The learning rate of stochastic weight averaging: it is constant once averaging has begun."""

import copy
import math
from typing import Any

import keras
from keras import ops
from keras.optimizers.schedules import LearningRateSchedule

from keras_avg import _checks
from keras_avg._types import Config, Tensor


@keras.saving.register_keras_serializable(package="keras_avg")
class SWALearningRate(LearningRateSchedule):
    """Follows a schedule up to `start_step`, then moves to a constant rate and stays there.

    With step `i` counted from 0,

        rate(i) = (1 - a) * schedule(min(i, start_step)) + a * swa_learning_rate
        a = shape(min(1, (i - start_step) / anneal_steps))       (0 while i < start_step)
        shape(t) = t  for "linear",  (1 - cos(pi * t)) / 2  for "cos"

    Step `start_step` still has the schedule's rate, and from there on the schedule stays at this
    rate. Step `start_step + anneal_steps` is the first with `swa_learning_rate`. With
    `anneal_steps=0` the rate is `swa_learning_rate` from `start_step` on.

    This is `torch.optim.swa_utils.SWALR`, but it counts every step, and you need not call it. The
    rate of torch after its k-th `step()` is the rate at step `start_step + k`.

    With gradient accumulation, Keras' schedules count micro-steps, while `SWA` counts updates. So
    multiply `start_step` and `anneal_steps` by `gradient_accumulation_steps`.

    Args:
        schedule: A `keras.optimizers.schedules.LearningRateSchedule` or a number >= 0. The rate
            before `start_step`.
        swa_learning_rate: Number >= 0. The rate at the end. It is often higher than the last rate
            of the schedule.
        start_step: Integer in [0, 2**31), in steps. Step 0 is the first. Annealing begins at the
            rate of this step.
        anneal_steps: Integer in [0, 2**31), in steps. How long annealing takes.
        anneal_strategy: `"cos"` or `"linear"`. Default `"cos"`.

    Raises:
        ValueError: If an argument is out of range or of the wrong type.

    Example:

    ```python
    rate = keras_avg.schedules.SWALearningRate(
        keras.optimizers.schedules.CosineDecay(0.1, decay_steps=1000),
        swa_learning_rate=0.05,
        start_step=750,
        anneal_steps=50,
    )
    optimizer = keras_avg.SWA(keras.optimizers.SGD(rate), start_averaging=800)
    ```

    Reference:
        Izmailov et al., Averaging Weights Leads to Wider Optima and Better Generalization,
        https://arxiv.org/abs/1803.05407, section 3.2.
    """

    def __init__(
        self,
        schedule: float | LearningRateSchedule,
        swa_learning_rate: float,
        start_step: int,
        anneal_steps: int,
        anneal_strategy: str = "cos",
    ) -> None:
        self.schedule = _schedule(schedule)
        self.swa_learning_rate = _checks.non_negative("swa_learning_rate", swa_learning_rate)
        self.start_step = _checks.whole_number("start_step", start_step, minimum=0)
        self.anneal_steps = _checks.whole_number("anneal_steps", anneal_steps, minimum=0)
        self.anneal_strategy = _checks.one_of("anneal_strategy", anneal_strategy, ("cos", "linear"))

    def __call__(self, step: int | Tensor) -> Tensor:
        """The rate of one step.

        Args:
            step: Integer scalar, a tensor or a Python number. The first step is 0.

        Returns:
            A float32 scalar tensor.
        """
        step = ops.convert_to_tensor(step)
        before = self.schedule
        if isinstance(before, LearningRateSchedule):
            before = before(ops.minimum(step, self.start_step))
        before = ops.convert_to_tensor(before, "float32")
        annealed = self._annealed(step)
        # Not before + a * (after - before): with a = 1 it differs from `after` by a rounding error.
        return (1.0 - annealed) * before + annealed * self.swa_learning_rate

    # float32 cannot count beyond 2**24, so steps stay integers until their number is small.
    # (1 - cos(pi * t)) / 2  loses the digits of a small t, because it subtracts from 1. The equal
    #     sin(pi * t / 2)**2
    # subtracts nothing.

    def _annealed(self, step: Any) -> Any:
        since = step - self.start_step
        if self.anneal_steps == 0:
            return ops.cast(since >= 0, "float32")
        fraction = ops.cast(ops.clip(since, 0, self.anneal_steps), "float32") / self.anneal_steps
        if self.anneal_strategy == "linear":
            return fraction
        return ops.square(ops.sin(math.pi / 2 * fraction))

    def get_config(self) -> Config:
        """The arguments that construct an equal schedule, in serializable form.

        Returns:
            A dict.
        """
        schedule = self.schedule
        if isinstance(schedule, LearningRateSchedule):
            schedule = keras.saving.serialize_keras_object(schedule)
        return {
            "schedule": schedule,
            "swa_learning_rate": self.swa_learning_rate,
            "start_step": self.start_step,
            "anneal_steps": self.anneal_steps,
            "anneal_strategy": self.anneal_strategy,
        }

    @classmethod
    def from_config(cls, config: Config) -> "SWALearningRate":
        """Construct a schedule from what `get_config` returned.

        Args:
            config: Dict. It is not changed.

        Returns:
            A new schedule.
        """
        schedule = config["schedule"]
        if isinstance(schedule, dict):
            schedule = keras.saving.deserialize_keras_object(copy.deepcopy(schedule))
        return cls(**(config | {"schedule": schedule}))


def _schedule(value: Any) -> Any:
    if isinstance(value, LearningRateSchedule):
        return value
    if math.isnan(_checks.number(value)):
        raise ValueError(
            "`schedule` must be a LearningRateSchedule or a number >= 0. "
            f"Received: schedule={value!r}."
        )
    return _checks.non_negative("schedule", value)
