"""SWA-Gaussian: a distribution of weights around their average."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import keras
from keras import ops

from keras_avg import _backend, _checks
from keras_avg._optimizers.snapshots_at_intervals import SnapshotsAtIntervals
from keras_avg._types import Config, OptimizerLike, Tensor, WrapperKeywords
from keras_avg._wrapping.store import LONGEST_RING

if TYPE_CHECKING:
    from typing_extensions import Unpack

SMALLEST_VARIANCE = 1e-30


@keras.saving.register_keras_serializable(package="keras_avg")
class SWAG(SnapshotsAtIntervals):
    """SWA-Gaussian: the mean of snapshots, and a normal distribution around it to draw from.

    With step `i` counted from 0, a snapshot w is taken after update `i` when
    `i >= start_averaging` and `(i - start_averaging) % average_period == 0`. If `n` snapshots were
    taken before,

        mean   <- mean + (w - mean) / (n + 1)
        square <- square + (w**2 - square) / (n + 1)
        column  = w - mean                     replaces the oldest of `rank` columns

    A swapped model holds the mean, which equals the average of `SWA`. In `sample_weights()` the
    model holds

        mean + scale * (sqrt(max(square - mean**2, 1e-30)) * z1 / sqrt(2)
                        + D z2 / sqrt(2 (K - 1)))

    D is the matrix of the K columns so far. z1 has a standard normal number for each element. z2 is
    one standard normal vector of length K, the same for all variables. With `rank=0`, or while
    K < 2, the model holds `mean + scale * sqrt(...) * z1`.

    The mean of the predictions of about 30 samples is better calibrated than one model's
    predictions. Recompute batch-normalization statistics for each sample.

    Memory: `rank + 2` copies of the parameters. These are 22 with the default, and 2 with `rank=0`.

    Args:
        optimizer: The optimizer that takes the steps: a Keras optimizer, its name, or its config.
        start_averaging: Integer in [0, 2**31), in steps, not epochs. The first snapshot is taken
            after this update. Update 0 is the first. Default 0.
        average_period: Integer in [1, 2**31), in steps, between snapshots. Default 10.
        rank: Integer in [0, 1000]. How many columns are kept. Default 20.
        name: String. Default `"SWAG"`.
        **kwargs: `sequential_update`, `average_dtype`, `skip_nonfinite`, `exclude`,
            `gradient_transformers`, `gradient_aggregator`, `clipnorm`, `clipvalue`,
            `global_clipnorm`, `learning_rate`, `lr`, `decay`: see `AveragedOptimizerWrapper`.

    Raises:
        TypeError: If `optimizer` is None.
        ValueError: If an argument is out of range or not an integer, or as for
            `AveragedOptimizerWrapper`.

    Example:

    ```python
    model.compile(optimizer=keras_avg.SWAG("sgd", start_averaging=200), loss="mse")
    model.fit(x, y, epochs=20)
    predictions = []
    for seed in range(30):
        with model.optimizer.sample_weights(seed):
            keras_avg.update_batch_norm(model, x)
            predictions.append(model.predict(x_new))
    ```

    Reference:
        Maddox et al., A Simple Baseline for Bayesian Uncertainty in Deep Learning,
        https://arxiv.org/abs/1902.02476, Algorithm 1 and equation 1.
    """

    average_starts_at_variable = False

    #: Column `k` of two workers is comparable only if both have taken equally many snapshots.
    means_over_workers = False

    def __init__(
        self,
        optimizer: OptimizerLike,
        start_averaging: int = 0,
        average_period: int = 10,
        rank: int = 20,
        name: str | None = "SWAG",
        **kwargs: "Unpack[WrapperKeywords]",
    ) -> None:
        rank = _checks.whole_number("rank", rank, minimum=0, unit="columns", below=LONGEST_RING)
        super().__init__(optimizer, start_averaging, average_period, name, **kwargs)
        self.rank = rank

    # The paper writes the means as  (n * mean + w) / (n + 1).  As in SWA, this is written as a step
    # of weight  1 / (n + 1),  because then no rounding error grows with n. The columns of the
    # deviation matrix D are a ring. D itself is never built: D z2 is a sum of columns.

    def stores(self) -> Mapping[str, str | int]:
        columns = {"deviation": self.rank} if self.rank else {}
        return {"average": "zeros", "square": "zeros"} | columns

    def value_weight(self, step: Tensor) -> float | Tensor:
        return 1.0 / ops.cast(self.snapshots_so_far + 1, _backend.widest_float())

    def accumulate(self, due: bool | Tensor, step: Tensor) -> None:
        mean, square = self.kept["average"], self.kept["square"]
        weight = _backend.scalar(lambda: self.value_weight(step))
        mean.lerp_if(due, lambda: weight)
        square.assign_if(due, lambda s, w: s + ops.cast(weight, s.dtype) * (w * w - s))
        if self.rank:
            columns = self.rings["deviation"]
            columns.put_if(due, self.snapshots_so_far, lambda w, mean: w - mean, mean)

    @contextlib.contextmanager
    def sample_weights(self, seed: int | None = None, scale: float = 1.0) -> Iterator[None]:
        """Context in which the model holds a sample of the weights.

        When the context ends, the model holds again what it held before. This includes the
        statistics that `keras_avg.update_batch_norm` has recomputed for the sample.

        Args:
            seed: Integer, or None for a new sample each time. The same seed gives the same sample
                on one backend.
            scale: Number >= 0. How far the sample is from the mean. 0 gives the mean itself. The
                paper uses 0.5 to 1. Default 1.

        Raises:
            ValueError: If there is no snapshot yet, or an argument is out of range.
            RuntimeError: As for `swap_weights`.

        Example:

        ```python
        with model.optimizer.sample_weights(seed=0):
            predictions = model.predict(x)
        ```
        """
        scale = _checks.non_negative("scale", scale)
        if seed is not None:
            seed = _checks.whole_number("seed", seed, minimum=0, unit="units")
        self._check_built("sample_weights")
        with self.showing(lambda: self._sample(seed, scale)):
            yield

    def _sample(self, seed: int | None, scale: float) -> list[Any]:
        generator = keras.random.SeedGenerator(seed)
        number = min(self.num_snapshots, self.rank)
        share = keras.random.normal((max(number, 1),), seed=generator)
        moments = zip(self.kept["average"].values(), self.kept["square"].values(), strict=True)
        samples = []
        for i, (mean, square) in enumerate(moments):
            noise = keras.random.normal(mean.shape, seed=generator)
            sample = ops.cast(_deviation(mean, square), mean.dtype) * ops.cast(noise, mean.dtype)
            if number >= 2:
                columns = _backend.value(self.rings["deviation"].kept[i])
                # The first `number` columns are those that were written, in any order.
                low_rank = sum(ops.cast(share[j], mean.dtype) * columns[j] for j in range(number))
                sample = sample / 2**0.5 + low_rank / (2.0 * (number - 1)) ** 0.5
            samples.append(mean + scale * sample)
        return samples

    def get_config(self) -> Config:
        return super().get_config() | {"rank": self.rank}


def _deviation(mean: Any, square: Any) -> Any:
    """The standard deviation of each element. A wide dtype keeps the digits of the difference."""
    dtype = _backend.widest_float()
    mean, square = ops.cast(mean, dtype), ops.cast(square, dtype)
    variance = square - mean * mean
    return ops.sqrt(ops.where(variance > SMALLEST_VARIANCE, variance, SMALLEST_VARIANCE))
