"""Primal averaging trains between a moving average and the inner optimizer's iterate."""

from typing import TYPE_CHECKING

import keras

from keras_avg import _checks
from keras_avg._optimizers.interpolated import Interpolated
from keras_avg._types import Config, DecayingWrapperKeywords, OptimizerLike, Tensor

if TYPE_CHECKING:
    from typing_extensions import Unpack


@keras.saving.register_keras_serializable(package="keras_avg")
class PrimalAverage(Interpolated):
    """Generalized primal averaging: gradients are taken between an average and an iterate.

    The model's variables hold y. The inner optimizer steps z with the gradient at y:

        z <- step of the inner optimizer, with the gradient at y
        x <- average_decay * x + (1 - average_decay) * z
        y  = interpolation * x + (1 - interpolation) * z

    x and z begin with the variables' values. A swapped model holds x. `average_decay` plays the
    role that the number of inner steps has in DiLoCo with one worker: 0.9 stands for 1 step, 0.974
    for 4, 0.9869 for 8, 0.9934 for 16, 0.9967 for 32, 0.9984 for 64, 0.9992 for 128.

    `PrimalAverage` changes training. So does `ScheduleFree`, but its average does not forget. This
    wrapper must be the innermost one: `SWA(PrimalAverage("adamw"))` averages y.

    With `average_decay=0` it trains as the inner optimizer alone. With `interpolation=1`, an inner
    `SGD(lr)` and `average_decay=m`, x moves as the variables of `SGD(lr * (1 - m), momentum=m)` do.

    Memory: two copies of the parameters.

    Args:
        optimizer: The optimizer that steps z: a Keras optimizer, its name, or its config.
        interpolation: Number in the range [0, 1]. Default 0.7.
        average_decay: Number in the range [0, 1]. Default 0.9967.
        name: String. Default `"PrimalAverage"`.
        **kwargs: `sequential_update`, `average_dtype`, `skip_nonfinite`, `exclude`,
            `gradient_transformers`, `gradient_aggregator`, `clipnorm`, `clipvalue`,
            `global_clipnorm`, `learning_rate`, `lr`: see `AveragedOptimizerWrapper`.

    Raises:
        TypeError: If `optimizer` is None, or `decay` is given.
        ValueError: If an argument is out of range, another averaging wrapper is inside, or as for
            `AveragedOptimizerWrapper`.

    Example:

    ```python
    model.compile(optimizer=keras_avg.PrimalAverage("adamw"), loss="mse")
    model.fit(x, y, epochs=20, callbacks=[keras_avg.callbacks.SwapAverageWeights()])
    ```

    Reference:
        Defazio et al., Smoothing DiLoCo with Primal Averaging for Faster Training of LLMs,
        https://arxiv.org/abs/2512.17131, Algorithm 1.
    """

    def __init__(
        self,
        optimizer: OptimizerLike,
        interpolation: float = 0.7,
        average_decay: float = 0.9967,
        name: str | None = "PrimalAverage",
        **kwargs: "Unpack[DecayingWrapperKeywords]",
    ) -> None:
        average_decay = _checks.fraction("average_decay", average_decay)
        super().__init__(optimizer, interpolation, name, **kwargs)
        self.average_decay = average_decay

    # x <- m x + (1 - m) z  equals  x <- x + (1 - m) (z - x).  So the weight is the constant 1 - m.
    # It is computed in Python floats.

    def value_weight(self, step: Tensor) -> float | Tensor:
        return 1.0 - self.average_decay

    def get_config(self) -> Config:
        return super().get_config() | {"average_decay": self.average_decay}
