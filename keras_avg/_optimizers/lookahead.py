"""Lookahead: slow weights that follow fast ones, and call them back."""

from typing import Any

import keras

from keras_avg import _checks
from keras_avg._optimizers.averaged_optimizer_wrapper import AveragedOptimizerWrapper


@keras.saving.register_keras_serializable(package="keras_avg")
class Lookahead(AveragedOptimizerWrapper):
    """Lookahead: k steps forward with the fast weights, one step back to the slow ones.

    The model's variables are the fast weights, the averages the slow ones; these begin with the
    values that the variables have before the first update. With step `i` counted from 0, when
    `(i + 1) % sync_period == 0`,

        slow <- slow + slow_step_size * (fast - slow)
        fast <- slow

    Unlike `SWA` and `MovingAverage`, the average flows back into the model: it changes training.
    `SWA(Lookahead("adam"))` averages what such training gives. `ModelAverage` does over several
    workers what this does over one.

    Args:
        optimizer: The optimizer that takes the fast steps: a Keras optimizer, its name, or its
            config.
        sync_period: Integer in [1, 2**31), in steps, from one synchronization to the next. Default
            6.
        slow_step_size: Number in the range [0, 1]: how far the slow weights go towards the fast
            ones. Default 0.5.
        name: String. Default `"Lookahead"`.
        sequential_update: Bool. See `AveragedOptimizerWrapper`, as for the arguments below.
        average_dtype: Dtype of the slow weights.
        skip_nonfinite: Bool. Whether a synchronization is left out while weights are NaN or
            infinite.
        gradient_transformers: List of functions of a list of `(gradient, variable)` pairs.
        gradient_aggregator: One such function, applied first.
        exclude: List of regular expressions. Variables whose paths match have no average.
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
        optimizer: Any,
        sync_period: int = 6,
        slow_step_size: float = 0.5,
        name: str | None = "Lookahead",
        *,
        sequential_update: bool = True,
        **kwargs: Any,
    ) -> None:
        period = _checks.whole_number("sync_period", sync_period, minimum=1)
        step_size = _checks.fraction("slow_step_size", slow_step_size)
        super().__init__(optimizer, sequential_update, name, **kwargs)
        self.sync_period = period
        self.slow_step_size = step_size

    # Algorithm 1 has two loops: k updates of the fast weights theta from phi(t-1), then
    #     phi(t) <- phi(t-1) + alpha * (theta(t,k) - phi(t-1))
    # An optimizer sees single steps: the inner loop ends with each k-th of them, phi is the
    # average, and alpha the weight of the value in it. The next inner loop begins at phi(t), which
    # is what flowing back means.

    def is_due(self, step: Any) -> Any:
        return (step + 1) % self.sync_period == 0

    def value_weight(self, step: Any) -> Any:
        return self.slow_step_size

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {
            "sync_period": self.sync_period,
            "slow_step_size": self.slow_step_size,
        }
