"""Finding the wrappers at work in a model."""

from typing import Any

from keras_avg._wrapping import bindings, nesting
from keras_avg._wrapping.shows_averages import ShowsAverages


def averaging_optimizers(model: Any) -> list[ShowsAverages]:
    """The averaging wrappers at work in a compiled model, outermost first.

    They are found inside a `LossScaleOptimizer` (which `compile` adds under mixed_float16), among
    the members of a `MultiOptimizer`, inside each other, and in further attributes of a model that
    has several optimizers (`gan.generator_optimizer`).

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
    return [
        each
        for optimizer in nesting.optimizers_of(model)
        for each in nesting.walk(optimizer)
        if isinstance(each, ShowsAverages)
    ]


def wrappers_of(model: Any) -> list[ShowsAverages]:
    """The wrappers that keep averages of a model's variables, outermost first.

    Those that it was compiled with; if it was not compiled, as in a loop of one's own, those that
    were built for its variables.

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
    """Of wrappers over the same variables, the outermost that has a snapshot."""
    chosen: list[ShowsAverages] = []
    for wrapper in wrappers:
        if wrapper.has_average and not any(nesting.is_inside(wrapper, outer) for outer in chosen):
            chosen.append(wrapper)
    return chosen
