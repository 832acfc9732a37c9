"""Stochastic weight averaging: the equal-weight mean of snapshots."""

from typing import TYPE_CHECKING

import keras
from keras import ops

from keras_avg import _backend
from keras_avg._optimizers.snapshots_at_intervals import SnapshotsAtIntervals
from keras_avg._types import AverageKeywords, OptimizerLike, Tensor

if TYPE_CHECKING:
    from typing_extensions import Unpack


@keras.saving.register_keras_serializable(package="keras_avg")
class SWA(SnapshotsAtIntervals):
    """Stochastic Weight Averaging: the mean of the weights at regular steps of training.

    With step `i` counted from 0, a snapshot is taken after update `i` when `i >= start_averaging`
    and `(i - start_averaging) % average_period == 0`. If `n` snapshots were taken before,

        average <- average + (value - average) / (n + 1)

    So the average is the arithmetic mean of all snapshots. After `T` updates there are
    `(T - 1 - start_averaging) // average_period + 1` snapshots, or none if `T <= start_averaging`.

    `start_averaging` is compared with the optimizer's `iterations`, which a loaded optimizer
    continues to count. Step 0 is the first. Suppose an epoch (or cycle) has `k` steps. To average
    the weights at the end of each epoch, from the end of the first `n` epochs on, pass
    `start_averaging=n * k - 1` and `average_period=k`. (`n * k` would take the first step of the
    next epoch.)

    Use `SWA` for the mean of the weights late in a run, when they move around in a wide minimum.
    Use `MovingAverage` for an average that follows training and forgets. Keras' own `use_ema` is a
    `MovingAverage` that begins with the weights after the first step and has the variables' dtype.

    After `n` snapshots, a float32 average may be off by `n * 2**-25` of its value: 3e-6 for 100
    snapshots, but up to 3e-3 for 100,000. For so many, choose a larger `average_period`, or
    `average_dtype="float64"` on backends that have it.

    The batch-normalization statistics of training belong to the raw weights. Recompute them for the
    averages with `keras_avg.update_batch_norm`.

    Args:
        optimizer: The optimizer that takes the steps: a Keras optimizer, its name, or its config.
        start_averaging: Integer in [0, 2**31), in steps, not epochs. The first snapshot is taken
            after this update. Update 0 is the first. Default 0.
        average_period: Integer in [1, 2**31), in steps from one snapshot to the next. With a
            cyclical learning rate, pass the length of a cycle. Default 10.
        name: String. Default `"SWA"`.
        sequential_update: Bool. `AveragedOptimizerWrapper` describes this argument and those below.
        average_dtype: Dtype of the averages.
        skip_nonfinite: Bool. Whether to skip a snapshot that has NaN or infinite elements.
        gradient_transformers: List of functions of a list of `(gradient, variable)` pairs.
        gradient_aggregator: A function like a gradient transformer. It is called before them.
        exclude: List of regular expressions. A variable whose path matches has no average.
        **kwargs: `clipnorm`, `clipvalue`, `global_clipnorm`, `learning_rate`, `lr`, `decay`.

    Raises:
        TypeError: If `optimizer` is None.
        ValueError: If `start_averaging` or `average_period` is out of range or not an integer, or
            as for `AveragedOptimizerWrapper`.

    Example:

    ```python
    steps = len(x) // 32  # of an epoch
    optimizer = keras_avg.SWA("sgd", start_averaging=15 * steps - 1, average_period=steps)
    model.compile(optimizer=optimizer, loss="mse")
    model.fit(x, y, batch_size=32, epochs=20)
    keras_avg.assign_average_vars(model)
    ```

    Reference:
        Izmailov et al., Averaging Weights Leads to Wider Optima and Better Generalization,
        https://arxiv.org/abs/1803.05407, Algorithm 1.
    """

    average_starts_at_variable = False

    def __init__(
        self,
        optimizer: OptimizerLike,
        start_averaging: int = 0,
        average_period: int = 10,
        name: str | None = "SWA",
        sequential_update: bool = True,
        **kwargs: "Unpack[AverageKeywords]",
    ) -> None:
        super().__init__(
            optimizer,
            start_averaging,
            average_period,
            name,
            sequential_update=sequential_update,
            **kwargs,
        )

    # Algorithm 1 writes  w_swa <- (w_swa * n + w) / (n + 1)  at the end of each cycle. The product
    # w_swa * n  has a rounding error that grows with n. The equal line
    #     w_swa <- w_swa + (w - w_swa) / (n + 1)
    # is a step of weight 1 / (n + 1). With n = 0 the average becomes the first snapshot.

    def value_weight(self, step: Tensor) -> float | Tensor:
        return 1.0 / ops.cast(self.snapshots_so_far + 1, _backend.widest_float())
