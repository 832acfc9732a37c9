"""Functions that swap the averages of a whole model. They find its wrappers at any depth."""

import contextlib
from collections.abc import Iterator
from typing import Any

import keras

from keras_avg import _keras_internals
from keras_avg._wrapping import finding


def swap_weights(model: keras.Model) -> None:
    """Exchange the raw and the averaged values in a model.

    A second call restores every bit of the raw values. The function uses the outermost wrapper that
    has a snapshot. The wrapper may be inside a `LossScaleOptimizer`, in a member of a
    `MultiOptimizer`, or inside another wrapper. If the model already holds averages of any wrapper,
    its raw values are put back.

    Args:
        model: A `keras.Model`. If it is not compiled, its wrappers are found by its variables.

    Returns:
        None. The model is changed in place.

    Raises:
        ValueError: If the model has no averages: no averaging wrapper, or no snapshot yet.
        RuntimeError: If the raw weights cannot be put back, as for `optimizer.swap_weights()`.

    Example:

    ```python
    keras_avg.swap_weights(model)
    print(model.evaluate(x, y))  # of the averages
    keras_avg.swap_weights(model)
    ```
    """
    if holders := _holders(model):
        for wrapper in holders:
            wrapper.bind_model(model)
            wrapper.swap_weights()
    else:
        _put_in(model)


@contextlib.contextmanager
def average_weights(model: keras.Model) -> Iterator[None]:
    """Context in which a model holds its averages. After it the model holds what it held before.

    Args:
        model: A `keras.Model`, as for `keras_avg.swap_weights`.

    Returns:
        A context manager.

    Raises:
        ValueError: If the model has no averages: no averaging wrapper, or no snapshot yet.

    Example:

    ```python
    with keras_avg.average_weights(model):
        model.save("averaged.keras")
    ```
    """
    if _holders(model):
        yield
        return
    chosen = _put_in(model)
    try:
        yield
    finally:
        for wrapper in chosen:
            if wrapper.averages_in_model:
                wrapper.swap_weights()


def assign_average_vars(model: keras.Model) -> None:
    """Assign the averages to the model for good. The raw values are lost.

    Training goes on from the averages. If the model holds the averages already, they stay in it,
    and the raw values that were set aside are lost.

    Args:
        model: A `keras.Model`, as for `keras_avg.swap_weights`.

    Returns:
        None. The model is changed in place.

    Raises:
        ValueError: If the model has no averages: no averaging wrapper, or no snapshot yet.

    Example:

    ```python
    model.fit(x, y, epochs=10)
    keras_avg.assign_average_vars(model)
    model.save("averaged.keras")
    ```
    """
    if holders := _holders(model):
        for wrapper in holders:
            wrapper.keep_averages()
    else:
        for wrapper in _chosen(model):
            wrapper.assign_average_vars(model.variables)


def _holders(model: keras.Model) -> list[Any]:
    return [wrapper for wrapper in finding.wrappers_of(model) if wrapper.averages_in_model]


def _put_in(model: keras.Model) -> list[Any]:
    done: list[Any] = []
    try:
        for wrapper in _chosen(model):
            wrapper.swap_weights()
            done.append(wrapper)
    except BaseException:
        for wrapper in done:
            wrapper.swap_weights()
        raise
    return done


def _chosen(model: keras.Model) -> list[Any]:
    """The wrappers whose averages to show. No two of them have a variable in common."""
    wrappers = finding.wrappers_of(model)
    if not wrappers:
        raise ValueError(
            "The model has no averages: no averaging wrapper of keras_avg is at work in it. "
            f"Received: a model with optimizer={getattr(model, 'optimizer', None)!r}. Compile it "
            'with one, such as keras_avg.SWA("adam").'
        )
    chosen = finding.with_snapshot(wrappers)
    if not chosen:
        updates = ", ".join(f"{w.updates_so_far()} updates of '{w.name}'" for w in wrappers)
        raise ValueError(
            f"The model has no averages yet: no snapshot has been taken. Received: {updates}. "
            f"Train on, or let averaging start earlier.{wrappers[0].why_without_averages()}"
        )
    _refuse_several(chosen)
    return chosen


def _refuse_several(chosen: list[Any]) -> None:
    """Refuse several wrappers with averages of the same variables.

    An uncompiled model may have several earlier optimizers that still keep averages.
    """
    for i, wrapper in enumerate(chosen):
        variables = _keras_internals.built_variables(wrapper)
        for other in chosen[:i]:
            if any(_keras_internals.variable_index(other, v) is not None for v in variables):
                raise ValueError(
                    "Several optimizers keep averages of the model's variables. Received: "
                    f"{other!r} and {wrapper!r}, and a model that is compiled with neither. Call "
                    "the method of the one that you mean, such as `optimizer.swap_weights()`."
                )
