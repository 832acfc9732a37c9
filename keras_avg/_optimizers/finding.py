"""Finding the wrappers at work in a compiled model."""

from collections.abc import Iterator
from typing import Any

from keras_avg._optimizers.averaged_optimizer_wrapper import AveragedOptimizerWrapper


def averaging_optimizers(model: Any) -> list[AveragedOptimizerWrapper]:
    """The averaging wrappers at work in a compiled model, outermost first.

    They are found inside a `LossScaleOptimizer` (which `compile` adds under mixed_float16), among
    the members of a `MultiOptimizer`, and inside each other.

    Args:
        model: A compiled `keras.Model`.

    Returns:
        List of wrappers; empty if the model has none, or is not compiled.

    Example:

    ```python
    model.compile(optimizer=keras_avg.SWA(keras_avg.MovingAverage("adam")), loss="mse")
    swa, moving_average = keras_avg.averaging_optimizers(model)
    ```
    """
    return list(_wrappers(getattr(model, "optimizer", None)))


def with_snapshot(optimizer: Any) -> list[AveragedOptimizerWrapper]:
    """Of wrappers over the same variables, the outermost that has a snapshot."""
    if isinstance(optimizer, AveragedOptimizerWrapper) and optimizer.has_average:
        return [optimizer]
    return [found for inside in _inside(optimizer) for found in with_snapshot(inside)]


def _wrappers(optimizer: Any) -> Iterator[AveragedOptimizerWrapper]:
    if isinstance(optimizer, AveragedOptimizerWrapper):
        yield optimizer
    for inside in _inside(optimizer):
        yield from _wrappers(inside)


def _inside(optimizer: Any) -> list[Any]:
    if hasattr(optimizer, "inner_optimizer"):
        return [optimizer.inner_optimizer]
    return list(getattr(optimizer, "optimizers", ()))
