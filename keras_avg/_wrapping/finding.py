"""Finds the wrappers that train a model."""

import keras

from keras_avg._wrapping import bindings, nesting
from keras_avg._wrapping.shows_averages import ShowsAverages


def averaging_optimizers(model: keras.Model) -> list[ShowsAverages]:
    """The averaging wrappers of a compiled model. Outer wrappers come first.

    The function looks inside a `LossScaleOptimizer` (which `compile` adds under mixed_float16), in
    the members of a `MultiOptimizer`, and inside each wrapper. If the model has several optimizers,
    it looks in all attributes that hold one (`gan.generator_optimizer`).

    Args:
        model: A compiled `keras.Model`.

    Returns:
        List of wrappers. It is empty if the model has no wrapper, or is not compiled.

    Example:

    ```python
    model.compile(optimizer=keras_avg.SWA(keras_avg.MovingAverage("adam")), loss="mse")
    swa, moving_average = keras_avg.averaging_optimizers(model)
    ```
    """
    return [
        each
        for optimizer in nesting.optimizers_of(model)
        for each in nesting.walk(optimizer)
        if isinstance(each, ShowsAverages)
    ]


def wrappers_of(model: keras.Model) -> list[ShowsAverages]:
    """The wrappers that keep averages of a model's variables. Outer wrappers come first.

    If the model is compiled, these are the wrappers with which it was compiled. If not (users may
    write their own loop), these are the wrappers that were built for its variables.

    Raises:
        ValueError: If a wrapper was built for another model.
    """
    found = averaging_optimizers(model)
    for wrapper in found:
        bindings.note_model(wrapper, model)
    if found or getattr(model, "optimizer", None) is not None:
        return found
    over = bindings.wrappers_over(getattr(model, "variables", ()))
    return sorted(over, key=nesting.depth, reverse=True)


def with_snapshot(wrappers: list[ShowsAverages]) -> list[ShowsAverages]:
    """The wrappers that have a snapshot, without those inside another such wrapper."""
    chosen: list[ShowsAverages] = []
    for wrapper in wrappers:
        if wrapper.has_average and not any(nesting.is_inside(wrapper, outer) for outer in chosen):
            chosen.append(wrapper)
    return chosen
