"""Latest weight averaging: the mean of the last few snapshots."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import keras
from keras import ops

from keras_avg import _checks
from keras_avg._optimizers.snapshots_at_intervals import SnapshotsAtIntervals
from keras_avg._types import Config, OptimizerLike, Tensor, WrapperKeywords
from keras_avg._wrapping.store import LONGEST_RING

if TYPE_CHECKING:
    from typing_extensions import Unpack


@keras.saving.register_keras_serializable(package="keras_avg")
class LAWA(SnapshotsAtIntervals):
    """Latest Weight Averaging: the mean of the last `window` snapshots.

    With step `i` counted from 0, a snapshot is taken after update `i` when `i >= start_averaging`
    and `(i - start_averaging) % average_period == 0`. With `n` snapshots so far, the average is

        mean of the last min(n, window) snapshots

    The last `window` snapshots are all kept. The mean is computed from them whenever it is read. (A
    running sum that adds the newest snapshot and subtracts the oldest would collect rounding
    errors.)

    `SWA` never forgets a snapshot. `MovingAverage` forgets a value gradually. `LAWA` forgets a
    snapshot completely after `window` newer ones.

    Memory: `window` copies of the parameters.

    Args:
        optimizer: The optimizer that takes the steps: a Keras optimizer, its name, or its config.
        window: Integer in [1, 1000], in snapshots. Default 5.
        start_averaging: Integer in [0, 2**31), in steps, not epochs. The first snapshot is taken
            after this update. Update 0 is the first. Default 0.
        average_period: Integer in [1, 2**31), in steps, between snapshots. Default 100.
        name: String. Default `"LAWA"`.
        **kwargs: `sequential_update`, `average_dtype`, `skip_nonfinite`, `exclude`,
            `gradient_transformers`, `gradient_aggregator`, `clipnorm`, `clipvalue`,
            `global_clipnorm`, `learning_rate`, `lr`, `decay`: see `AveragedOptimizerWrapper`.

    Raises:
        TypeError: If `optimizer` is None.
        ValueError: If an argument is out of range or not an integer, or as for
            `AveragedOptimizerWrapper`.

    Example:

    ```python
    optimizer = keras_avg.LAWA("adam", window=5, average_period=1000)
    model.compile(optimizer=optimizer, loss="mse")
    model.fit(x, y, epochs=20, callbacks=[keras_avg.callbacks.SwapAverageWeights()])
    ```

    Reference:
        Kaddour, Stop Wasting My Time! Saving Days of ImageNet and BERT Training with Latest Weight
        Averaging, https://arxiv.org/abs/2209.14981, section 2.
    """

    #: Row `k` of two workers holds comparable snapshots only if both have taken equally many.
    means_over_workers = False

    def __init__(
        self,
        optimizer: OptimizerLike,
        window: int = 5,
        start_averaging: int = 0,
        average_period: int = 100,
        name: str | None = "LAWA",
        **kwargs: "Unpack[WrapperKeywords]",
    ) -> None:
        window = _checks.whole_number(
            "window", window, minimum=1, unit="snapshots", below=LONGEST_RING
        )
        super().__init__(optimizer, start_averaging, average_period, name, **kwargs)
        self.window = window

    # The paper averages the last k checkpoints of a queue. Here the queue is a ring of k rows.
    # Snapshot n goes into row  n % k  and replaces the oldest one. A row that has received no
    # snapshot yet holds zeros. So the mean of the min(n, k) snapshots is
    #     (sum of all rows) / min(n, k).

    def stores(self) -> Mapping[str, str | int]:
        return {"snapshot": self.window}

    def accumulate(self, due: bool | Tensor, step: Tensor) -> None:
        self.rings["snapshot"].put_if(due, self.snapshots_so_far, lambda variable: variable)

    def averages(self) -> list[Tensor]:
        number = ops.clip(self.snapshots_so_far, 1, self.window)
        rings = self.rings["snapshot"].values()
        return [ops.sum(ring, axis=0) / ops.cast(number, ring.dtype) for ring in rings]

    def get_config(self) -> Config:
        return super().get_config() | {"window": self.window}
