"""Lookahead: slow weights follow the fast weights, and then replace them."""

from typing import TYPE_CHECKING

import keras

from keras_avg import _checks
from keras_avg._optimizers.averaged_optimizer_wrapper import AveragedOptimizerWrapper
from keras_avg._types import AverageKeywords, Config, OptimizerLike, Tensor

if TYPE_CHECKING:
    from typing_extensions import Unpack


@keras.saving.register_keras_serializable(package="keras_avg")
class Lookahead(AveragedOptimizerWrapper):
    """Lookahead: k steps forward with the fast weights, one step back to the slow ones.

    The model's variables are the fast weights, and the averages are the slow weights. The slow
    weights begin with the values that the variables have before the first update. With step `i`
    counted from 0, when `(i + 1) % sync_period == 0`,

        slow <- slow + slow_step_size * (fast - slow)
        fast <- slow

    Unlike in `SWA` and `MovingAverage`, the average flows back into the model, so it changes
    training. `SWA(Lookahead("adam"))` averages the weights that this training gives.
    `ModelAverage` does the same with several workers.

    Args:
        optimizer: The optimizer that takes the fast steps: a Keras optimizer, its name, or its
            config.
        sync_period: Integer in [1, 2**31), in steps, from one synchronization to the next. Default
            6.
        slow_step_size: Number in the range [0, 1]. How far the slow weights move towards the fast
            weights: 0 is not at all, 1 is all the way. Default 0.5.
        name: String. Default `"Lookahead"`.
        sequential_update: Bool. `AveragedOptimizerWrapper` describes this argument and those below.
        average_dtype: Dtype of the slow weights.
        skip_nonfinite: Bool. Whether to skip a synchronization while weights are NaN or infinite.
        gradient_transformers: List of functions of a list of `(gradient, variable)` pairs.
        gradient_aggregator: A function like a gradient transformer. It is called before them.
        exclude: List of regular expressions. A variable whose path matches has no average.
        **kwargs: `clipnorm`, `clipvalue`, `global_clipnorm`, `learning_rate`, `lr`, `decay`.

    Raises:
        TypeError: If `optimizer` is None.
        ValueError: If `sync_period` or `slow_step_size` is out of range, or as for
            `AveragedOptimizerWrapper`.

    Example:

    ```python
    model.compile(optimizer=keras_avg.Lookahead("adam", sync_period=6), loss="mse")
    model.fit(x, y, epochs=20)
    ```

    Reference:
        Zhang et al., Lookahead Optimizer: k steps forward, 1 step back,
        https://arxiv.org/abs/1907.08610, Algorithm 1.
    """

    average_flows_back = True

    def __init__(
        self,
        optimizer: OptimizerLike,
        sync_period: int = 6,
        slow_step_size: float = 0.5,
        name: str | None = "Lookahead",
        *,
        sequential_update: bool = True,
        **kwargs: "Unpack[AverageKeywords]",
    ) -> None:
        period = _checks.whole_number("sync_period", sync_period, minimum=1)
        step_size = _checks.fraction("slow_step_size", slow_step_size)
        super().__init__(optimizer, sequential_update, name, **kwargs)
        self.sync_period = period
        self.slow_step_size = step_size

    # Algorithm 1 has two loops: k updates of the fast weights theta from phi(t-1), then
    #     phi(t) <- phi(t-1) + alpha * (theta(t,k) - phi(t-1))
    # An optimizer sees single steps only, so every k-th step is the end of an inner loop. phi is
    # the average, and alpha is the weight with which the value enters it. The next inner loop
    # begins at phi(t), so the average flows back into the variables.

    def is_due(self, step: Tensor) -> bool | Tensor:
        return (step + 1) % self.sync_period == 0

    def value_weight(self, step: Tensor) -> float | Tensor:
        return self.slow_step_size

    def get_config(self) -> Config:
        return super().get_config() | {
            "sync_period": self.sync_period,
            "slow_step_size": self.slow_step_size,
        }
