"""Latest weight averaging: the mean of the last few snapshots."""

from typing import Any

import keras
from keras import ops

from keras_avg import _checks
from keras_avg._optimizers.snapshots_at_intervals import SnapshotsAtIntervals
from keras_avg._wrapping.store import LONGEST_RING, Ring


@keras.saving.register_keras_serializable(package="keras_avg")
class LAWA(SnapshotsAtIntervals):
    """Latest Weight Averaging: the mean of the last `window` snapshots.

    With step `i` counted from 0, a snapshot is taken after update `i` when `i >= start_averaging`
    and `(i - start_averaging) % average_period == 0`. With `n` snapshots so far, the average is

        mean of the last min(n, window) snapshots

    All of them are kept, and the mean is computed from them whenever it is shown. (A running
    difference, which adds the newest and subtracts the oldest, gathers rounding errors.)

    `SWA` never forgets a snapshot, `MovingAverage` forgets gradually, `LAWA` at once.

    Memory: `window` copies of the parameters.

    Args:
        optimizer: The optimizer that takes the steps: a Keras optimizer, its name, or its config.
        window: Integer in [1, 1000], in snapshots. Default 5.
        start_averaging: Integer in [0, 2**31), in steps, not epochs. The first snapshot is taken
            after this update, the first of which is 0. Default 0.
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

    #: The snapshots of workers are of one kind only where all have taken as many.
    means_over_workers = False

    def __init__(
        self,
        optimizer: Any,
        window: int = 5,
        start_averaging: int = 0,
        average_period: int = 100,
        name: str | None = "LAWA",
        **kwargs: Any,
    ) -> None:
        window = _checks.whole_number(
            "window", window, minimum=1, unit="snapshots", below=LONGEST_RING
        )
        super().__init__(optimizer, start_averaging, average_period, name, **kwargs)
        self.window = window

    # The paper averages the last k checkpoints of a queue. Here the queue is a ring of k stores:
    # snapshot n goes into store  n % k,  in the place of the oldest. A place that nothing went into
    # yet holds zeros, so the mean of the min(n, k) snapshots is the sum of all places over that.

    def stores(self) -> dict[str, str]:
        return {f"snapshot_{place}": "zeros" for place in range(self.window)}

    def accumulate(self, due: Any, step: Any) -> None:
        ring = Ring(list(self.kept.values()))
        ring.put_if(due, self.snapshots_so_far, lambda variable: variable)

    def averages(self) -> list[Any]:
        places = zip(*(store.values() for store in self.kept.values()), strict=True)
        number = ops.clip(self.snapshots_so_far, 1, self.window)
        return [sum(snapshots) / ops.cast(number, snapshots[0].dtype) for snapshots in places]

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"window": self.window}
