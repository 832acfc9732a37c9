"""Learning rates that go up and down between two bounds."""

import fractions
import math
from collections.abc import Callable
from typing import Any

import keras
from keras import ops
from keras.optimizers.schedules import LearningRateSchedule

from keras_avg import _checks, _registered_functions
from keras_avg._types import Config, Tensor
from keras_avg.schedules import _arguments


class _Cyclical(LearningRateSchedule):
    """Triangles between two rates. The hook `_scale` scales their heights.

    Smith counts cycles from 1. For step `t` and step size `s` he writes

        cycle = floor(1 + t / (2 s)),  x = |t / s - 2 cycle + 1|
        rate = initial + (maximal - initial) * max(0, 1 - x) * scale

    In float32 this is too coarse. From step 2**24 on, float32 cannot tell one step from the next,
    and the position in a cycle loses its digits long before. So the code uses integers. Let the
    period 2 s be the fraction P / Q. Divide each step into Q parts. Let n be the number of parts
    that have passed in this cycle, n = (t Q) mod P. The code does not compute t Q, because it may
    be too large. Then

        t / s - 2 (cycle - 1) = 2 n / P,   1 - x = 1 - |2 n / P - 1| = (P - |2 n - P|) / P

    The last value is in [0, 1]. Only its division is not exact.
    """

    def __init__(
        self,
        initial_learning_rate: float,
        maximal_learning_rate: float,
        step_size: float,
        scale_mode: str,
        name: str | None,
    ) -> None:
        initial = _checks.non_negative("initial_learning_rate", initial_learning_rate)
        maximal = _checks.non_negative("maximal_learning_rate", maximal_learning_rate)
        self.initial_learning_rate = initial
        self.maximal_learning_rate = maximal
        self.step_size = _arguments.step_size(step_size)
        self.scale_mode = _checks.one_of("scale_mode", scale_mode, ("cycle", "iterations"))
        self.name = _checks.scope_name(name)
        self._period = _period(self.step_size)

    def __call__(self, step: int | Tensor) -> Tensor:
        """The rate of one step.

        Args:
            step: Integer scalar, a tensor or a Python number. The first step is 0.

        Returns:
            A float32 scalar tensor.
        """
        with keras.name_scope(self.name or type(self).__name__):
            step = ops.convert_to_tensor(step)
            cycle, height = self._cycle_and_height(step)
            scaled_by = cycle if self.scale_mode == "cycle" else step
            scale = ops.convert_to_tensor(self._scale(ops.cast(scaled_by, "float32")), "float32")
            amplitude = self.maximal_learning_rate - self.initial_learning_rate
            return self.initial_learning_rate + amplitude * (height * scale)

    def _cycle_and_height(self, step: Any) -> tuple[Any, Any]:
        whole, parts = self._period.numerator, self._period.denominator
        passed = (step % whole) * parts
        cycle = 1 + (step // whole) * parts + passed // whole
        distance = ops.absolute(2 * (passed % whole) - whole)
        return cycle, ops.cast(whole - distance, "float32") / whole

    def _scale(self, x: Any) -> Any:
        raise NotImplementedError

    def get_config(self) -> Config:
        """The arguments that construct an equal schedule, in serializable form.

        Returns:
            A dict.
        """
        return {
            "initial_learning_rate": self.initial_learning_rate,
            "maximal_learning_rate": self.maximal_learning_rate,
            "step_size": self.step_size,
            "scale_mode": self.scale_mode,
            "name": self.name,
        }


@keras.saving.register_keras_serializable(package="keras_avg")
class CyclicalLearningRate(_Cyclical):
    """Goes up and down between two rates. A function of yours scales the height of the triangles.

    With step `i` counted from 0 and cycles of `2 * step_size` steps counted from 1,

        rate(i) = initial + (maximal - initial) * height(i) * scale_fn(cycle or i)

    where `height` goes from 0 to 1 in `step_size` steps, and back to 0 in the next `step_size`.

    Args:
        initial_learning_rate: Number >= 0. The rate at both ends of a cycle.
        maximal_learning_rate: Number >= 0. The rate in the middle of a cycle, before scaling. If it
            is below `initial_learning_rate`, a cycle goes down first.
        step_size: Number in [1, 2**29], half a cycle, in steps. It need not be an integer:
            `2 * samples / batch_size` is allowed.
        scale_fn: Function of a float32 scalar tensor that returns a scalar. `get_config` needs a
            function that is registered with `keras.saving.register_keras_serializable`.
        scale_mode: What `scale_fn` takes: `"cycle"`, the number of the cycle, where 1 is the first;
            or `"iterations"`, the step, where 0 is the first. Default `"cycle"`.
        name: String. Default `"CyclicalLearningRate"`.

    Raises:
        TypeError: If `scale_fn` is not callable.
        ValueError: If another argument is out of range or of the wrong type. `get_config` raises it
            if `scale_fn` is not registered with Keras.

    Example:

    ```python
    @keras.saving.register_keras_serializable(package="my_training")
    def one_over(cycle):
        return 1.0 / cycle

    rate = keras_avg.schedules.CyclicalLearningRate(0.001, 0.1, step_size=500, scale_fn=one_over)
    optimizer = keras.optimizers.SGD(rate)
    ```

    Reference:
        Smith, Cyclical Learning Rates for Training Neural Networks,
        https://arxiv.org/abs/1506.01186, section 3.1.
    """

    def __init__(
        self,
        initial_learning_rate: float,
        maximal_learning_rate: float,
        step_size: float,
        scale_fn: Callable[[Tensor], float | Tensor],
        scale_mode: str = "cycle",
        name: str | None = "CyclicalLearningRate",
    ) -> None:
        super().__init__(initial_learning_rate, maximal_learning_rate, step_size, scale_mode, name)
        if not callable(scale_fn):
            raise TypeError(
                "`scale_fn` must be a function of the cycle or the step. "
                f"Received: scale_fn={scale_fn!r}."
            )
        self.scale_fn = scale_fn

    def _scale(self, x: Any) -> Any:
        return self.scale_fn(x)

    def get_config(self) -> Config:
        """The arguments that construct an equal schedule, in serializable form.

        Returns:
            A dict.

        Raises:
            ValueError: If `scale_fn` is not registered with Keras.
        """
        return super().get_config() | {
            "scale_fn": _registered_functions.serialize("scale_fn", self.scale_fn)
        }

    @classmethod
    def from_config(cls, config: Config) -> "CyclicalLearningRate":
        """Construct a schedule from what `get_config` returned.

        Args:
            config: Dict. It is not changed.

        Returns:
            A new schedule.
        """
        scale_fn = _registered_functions.deserialize("scale_fn", config["scale_fn"])
        return cls(**(config | {"scale_fn": scale_fn}))


@keras.saving.register_keras_serializable(package="keras_avg")
class TriangularCyclicalLearningRate(_Cyclical):
    """Goes up and down between two rates in straight lines. All cycles are equal.

    It is a `CyclicalLearningRate` whose `scale_fn` is always 1.

    Args:
        initial_learning_rate: Number >= 0. The rate at both ends of a cycle.
        maximal_learning_rate: Number >= 0. The rate in the middle of a cycle. If it is below
            `initial_learning_rate`, a cycle goes down first.
        step_size: Number in [1, 2**29], half a cycle, in steps.
        scale_mode: `"cycle"` or `"iterations"`. It makes no difference here. Default `"cycle"`.
        name: String. Default `"TriangularCyclicalLearningRate"`.

    Raises:
        ValueError: If an argument is out of range or of the wrong type.

    Example:

    ```python
    rate = keras_avg.schedules.TriangularCyclicalLearningRate(0.001, 0.1, step_size=50)
    # A snapshot at the end of each cycle, where the rate is lowest.
    optimizer = keras_avg.SWA(
        keras.optimizers.SGD(rate), start_averaging=100, average_period=100
    )
    ```

    Reference:
        Smith, Cyclical Learning Rates for Training Neural Networks,
        https://arxiv.org/abs/1506.01186, section 3.1, "triangular".
    """

    def __init__(
        self,
        initial_learning_rate: float,
        maximal_learning_rate: float,
        step_size: float,
        scale_mode: str = "cycle",
        name: str | None = "TriangularCyclicalLearningRate",
    ) -> None:
        super().__init__(initial_learning_rate, maximal_learning_rate, step_size, scale_mode, name)

    def _scale(self, x: Any) -> Any:
        return 1.0


@keras.saving.register_keras_serializable(package="keras_avg")
class Triangular2CyclicalLearningRate(_Cyclical):
    """Goes up and down between two rates in straight lines. Each cycle is half the one before.

    It is a `CyclicalLearningRate` whose `scale_fn` is `1 / 2**(x - 1)`.

    Args:
        initial_learning_rate: Number >= 0. The rate at both ends of a cycle.
        maximal_learning_rate: Number >= 0. The rate in the middle of the first cycle. If it is
            below `initial_learning_rate`, a cycle goes down first.
        step_size: Number in [1, 2**29], half a cycle, in steps.
        scale_mode: `"cycle"` halves the height with each cycle, `"iterations"` with each step.
            Default `"cycle"`.
        name: String. Default `"Triangular2CyclicalLearningRate"`.

    Raises:
        ValueError: If an argument is out of range or of the wrong type.

    Example:

    ```python
    rate = keras_avg.schedules.Triangular2CyclicalLearningRate(0.001, 0.1, step_size=500)
    optimizer = keras.optimizers.SGD(rate)
    ```

    Reference:
        Smith, Cyclical Learning Rates for Training Neural Networks,
        https://arxiv.org/abs/1506.01186, section 3.1, "triangular2".
    """

    def __init__(
        self,
        initial_learning_rate: float,
        maximal_learning_rate: float,
        step_size: float,
        scale_mode: str = "cycle",
        name: str | None = "Triangular2CyclicalLearningRate",
    ) -> None:
        super().__init__(initial_learning_rate, maximal_learning_rate, step_size, scale_mode, name)

    def _scale(self, x: Any) -> Any:
        return ops.exp2(1.0 - x)


@keras.saving.register_keras_serializable(package="keras_avg")
class ExponentialCyclicalLearningRate(_Cyclical):
    """Goes up and down between two rates in triangles whose height decays exponentially.

    It is a `CyclicalLearningRate` whose `scale_fn` is `gamma**x`.

    Args:
        initial_learning_rate: Number >= 0. The rate at both ends of a cycle.
        maximal_learning_rate: Number >= 0. The rate in the middle of a cycle, before scaling. If it
            is below `initial_learning_rate`, a cycle goes down first.
        step_size: Number in [1, 2**29], half a cycle, in steps.
        scale_mode: What `x` is: `"iterations"`, the step, where 0 is the first; or `"cycle"`, the
            number of the cycle, where 1 is the first. Default `"iterations"`.
        gamma: Number, 0 < gamma <= 1. Default 1: the height does not decay.
        name: String. Default `"ExponentialCyclicalLearningRate"`.

    Raises:
        ValueError: If an argument is out of range or of the wrong type.

    Example:

    ```python
    rate = keras_avg.schedules.ExponentialCyclicalLearningRate(
        0.001, 0.1, step_size=500, gamma=0.9999
    )
    optimizer = keras.optimizers.SGD(rate)
    ```

    Reference:
        Smith, Cyclical Learning Rates for Training Neural Networks,
        https://arxiv.org/abs/1506.01186, section 3.1, "exp_range".
    """

    def __init__(
        self,
        initial_learning_rate: float,
        maximal_learning_rate: float,
        step_size: float,
        scale_mode: str = "iterations",
        gamma: float = 1.0,
        name: str | None = "ExponentialCyclicalLearningRate",
    ) -> None:
        super().__init__(initial_learning_rate, maximal_learning_rate, step_size, scale_mode, name)
        if not 0.0 < _checks.number(gamma) <= 1.0:
            raise ValueError(
                "`gamma` must be a number with 0 < gamma <= 1, which the height of the cycle is "
                f"multiplied by at each step or cycle. Received: gamma={gamma!r}."
            )
        self.gamma = float(gamma)

    def _scale(self, x: Any) -> Any:
        # Not gamma**x in float32: the rounding error of gamma would be multiplied by x.
        return ops.exp(math.log(self.gamma) * x)

    def get_config(self) -> Config:
        """The arguments that construct an equal schedule, in serializable form.

        Returns:
            A dict.
        """
        return super().get_config() | {"gamma": self.gamma}


def _period(step_size: int | float) -> fractions.Fraction:
    """The steps of a cycle, as the nearest fraction with which the integers stay below 2**31."""
    period = 2 * fractions.Fraction(step_size)
    return period.limit_denominator(math.isqrt(2**30 // math.ceil(period)))
