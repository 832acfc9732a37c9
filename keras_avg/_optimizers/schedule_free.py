"""Schedule-free learning: an average over the whole run replaces the learning-rate schedule."""

from typing import TYPE_CHECKING, Any

import keras
from keras import ops

from keras_avg import _backend, _checks, _keras_internals
from keras_avg._optimizers.interpolated import Interpolated
from keras_avg._types import Config, OptimizerLike, Tensor, Variable, WrapperKeywords
from keras_avg._wrapping import nesting

if TYPE_CHECKING:
    from typing_extensions import Unpack


@keras.saving.register_keras_serializable(package="keras_avg")
class ScheduleFree(Interpolated):
    """Schedule-free learning for any optimizer: the learning rate need not decay towards an end.

    The model's variables hold y. The inner optimizer steps z with the gradient at y. With `t`
    counted from 1 and `lr_max` the largest learning rate so far,

        z <- step of the inner optimizer, with the gradient at y
        w  = t ** weight_power * lr_max ** rate_power
        x <- x + c * (z - x)                                  with c = w / (sum of all w so far)
        y  = interpolation * x + (1 - interpolation) * z

    x and z begin with the variables' values. A swapped model holds x. Evaluate and deploy x: in
    `fit`, the callback `SwapAverageWeights` swaps for evaluation and at the end. Use a constant
    learning rate, perhaps after a warm-up.

    `ScheduleFree` changes training. So does `PrimalAverage`, but its average forgets. This wrapper
    must be the innermost one: `SWA(ScheduleFree("adam"))` averages y. Batch-normalization
    statistics are collected at y, so pass `batch_norm_data` to `SwapAverageWeights`. Keras' own
    `ScheduleFreeAdamW` offers no way to read x.

    Leave the momentum of the inner optimizer at 0, because `interpolation` replaces it. Memory: two
    copies of the parameters.

    Args:
        optimizer: The optimizer that steps z: a Keras optimizer, its name, or its config.
        interpolation: Number in the range [0, 1]. Default 0.9.
        weight_power: Number >= 0. The larger it is, the more weight later steps have. Default 0.
        rate_power: Number >= 0. The larger it is, the less weight the steps of a warm-up have.
            Default 2.
        weight_decay_at_y: Number >= 0. Before each step z moves by
            `-learning_rate * weight_decay_at_y * y`. Default 0.
        name: String. Default `"ScheduleFree"`.
        **kwargs: `sequential_update`, `average_dtype`, `skip_nonfinite`, `exclude`,
            `gradient_transformers`, `gradient_aggregator`, `clipnorm`, `clipvalue`,
            `global_clipnorm`, `learning_rate`, `lr`, `decay`: see `AveragedOptimizerWrapper`.

    Raises:
        TypeError: If `optimizer` is None.
        ValueError: If an argument is out of range, another averaging wrapper is inside, the inner
            optimizer has no one learning rate (`MultiOptimizer`), or as for
            `AveragedOptimizerWrapper`.

    Example:

    ```python
    model.compile(optimizer=keras_avg.ScheduleFree(keras.optimizers.SGD(1.0)), loss="mse")
    model.fit(x, y, epochs=20, callbacks=[keras_avg.callbacks.SwapAverageWeights()])
    ```

    Reference:
        Defazio et al., The Road Less Scheduled, https://arxiv.org/abs/2405.15682, Algorithm 1;
        `ScheduleFreeWrapper` of https://github.com/facebookresearch/schedule_free.
    """

    def __init__(
        self,
        optimizer: OptimizerLike,
        interpolation: float = 0.9,
        weight_power: float = 0.0,
        rate_power: float = 2.0,
        weight_decay_at_y: float = 0.0,
        name: str | None = "ScheduleFree",
        **kwargs: "Unpack[WrapperKeywords]",
    ) -> None:
        weight_power = _checks.non_negative("weight_power", weight_power)
        rate_power = _checks.non_negative("rate_power", rate_power)
        weight_decay_at_y = _checks.non_negative("weight_decay_at_y", weight_decay_at_y)
        super().__init__(optimizer, interpolation, name, **kwargs)
        if not hasattr(self.inner_optimizer, "learning_rate"):
            raise ValueError(
                "ScheduleFree weighs by the learning rate, and the inner optimizer has none of its "
                f"own. Received: optimizer={self.inner_optimizer!r}. Wrap its members."
            )
        self.weight_power = weight_power
        self.rate_power = rate_power
        self.weight_decay_at_y = weight_decay_at_y

    # In float32, a sum of a million equal weights is wrong in the third digit. So the wrapper does
    # not keep the sum S(t). It keeps the sum in units of the newest weight, r(t) = S(t) / w(t):
    #     c(t) = 1 / r(t),   r(t) = 1 + r(t - 1) * w(t - 1) / w(t)
    # Here  w(t - 1) / w(t) = ((t - 1) / t) ** weight_power  while the largest rate stays the same.
    # When it grows, r is divided by  (lr_max / previous lr_max) ** rate_power  before that. With a
    # constant rate and weight_power 0, r(t) = t. As long as every rate was 0, no step has a weight,
    # and c = 0.

    def build(self, variables: list[Variable]) -> None:
        """Make x and z, and the two numbers from which the weights are computed."""
        if _keras_internals.built_variables(self):
            return
        super().build(variables)
        if not hasattr(self, "_sum"):
            with _backend.outside_trace():
                self._sum, self._largest_rate = map(self._add_number, ("weight_sum", "rate"))

    def before_step(self) -> None:
        rate, before = self._read(self.learning_rate), self._read(self._largest_rate)
        largest = _backend.scalar(lambda: ops.where(rate > before, rate, before))
        ratio = _backend.scalar(lambda: _quotient(before, largest) ** self.rate_power)
        self._sum.assign(self._read(self._sum) * ratio)
        self._largest_rate.assign(largest)
        if not self.weight_decay_at_y:
            super().before_step()
            return
        shrink = rate * self.weight_decay_at_y

        def decayed(z: Any, x: Any) -> Any:
            return z - ops.cast(shrink, z.dtype) * self._between(z, x)

        # The store keeps the old z, because the call may turn out not to be an update.
        self.kept["z"].show_if(True, decayed, self.kept["average"])

    def accumulate(self, due: bool | Tensor, step: Tensor) -> None:
        before, largest = self._read(self._sum), self._read(self._largest_rate)

        def grown() -> Any:
            updates = ops.cast(step + 1, _backend.widest_float())
            after = 1.0 + before * ((updates - 1.0) / updates) ** self.weight_power
            return ops.where(ops.logical_and(due, largest > 0), after, before)

        self._sum.assign(_backend.scalar(grown))
        super().accumulate(due, step)

    def value_weight(self, step: Tensor) -> float | Tensor:
        return _quotient(1.0, self._read(self._sum))

    def get_config(self) -> Config:
        return super().get_config() | {
            "weight_power": self.weight_power,
            "rate_power": self.rate_power,
            "weight_decay_at_y": self.weight_decay_at_y,
        }

    def _add_number(self, name: str) -> Any:
        return self.add_variable(
            shape=(),
            dtype=_backend.widest_float(),
            aggregation="only_first_replica",
            name=f"{nesting.innermost(self).name}_{name}",
        )

    def _read(self, number: Any) -> Any:
        return _backend.scalar(lambda: ops.cast(number, _backend.widest_float()))


def _quotient(numerator: Any, denominator: Any) -> Any:
    """The quotient of two numbers, or 0 if the denominator is not positive."""
    denominator = ops.convert_to_tensor(denominator, _backend.widest_float())
    is_there = denominator > 0
    safe = ops.where(is_there, denominator, ops.ones_like(denominator))
    return ops.where(is_there, numerator / safe, ops.zeros_like(safe))
