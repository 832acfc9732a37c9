"""Checks of the wrappers' arguments. A check returns the value to keep, or raises an error."""

import copy
import re
from collections.abc import Callable, Sequence
from typing import Any

import keras

from keras_avg import _backend, _keras_internals
from keras_avg._wrapping import nesting


def inner_optimizer(identifier: Any, wrapper: str) -> Any:
    """The optimizer to wrap, from any value that `keras.optimizers.get` takes."""
    if identifier is None:
        raise TypeError(
            f"{wrapper} wraps another optimizer, which takes the steps. Received: optimizer=None. "
            f'Pass a Keras optimizer, its name or its config: {wrapper}("adam").'
        )
    if isinstance(identifier, dict):
        if not isinstance(identifier.get("class_name"), str):
            raise ValueError(
                f"The config of the optimizer that {wrapper} wraps must name its class: "
                '{"class_name": "Adam", "config": {...}}. '
                f"Received: optimizer={identifier!r}."
            )
        identifier = copy.deepcopy(identifier)  # Keras rewrites the config it is given
    optimizer = keras.optimizers.get(identifier)
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        raise ValueError(
            f"{wrapper} cannot wrap a LossScaleOptimizer: under mixed_float16 `compile` adds one "
            f"outside by itself, and the loss would be scaled twice. Received: "
            f"optimizer={optimizer!r}. Wrap the other way: LossScaleOptimizer({wrapper}(...))."
        )
    refuse_accumulating_members(optimizer, wrapper)
    return optimizer


def refuse_what_must_be_outermost(optimizer: Any, wrapper: str) -> None:
    """Refuse a wrapper around a `ModelAverage` of several workers.

    A round averages only what is inside the `ModelAverage` over the workers.
    """
    for each in nesting.walk(optimizer):
        if getattr(each, "must_be_outermost", False):
            kind = type(each).__name__
            raise ValueError(
                f"{kind} must be the outermost averaging wrapper where there are several workers: "
                f"an average around it would be each worker's own. Received: a {kind} of "
                f"{each.communicator.size} workers inside {wrapper}. Nest the other way: "
                f"{kind}({wrapper}(...)) averages {wrapper}'s averages over the workers too."
            )


def refuse_owners_of_variables(optimizer: Any, wrapper: str) -> None:
    """Refuse a wrapper that changes variables if a wrapper inside computes them at each step."""
    for each in nesting.walk(optimizer):
        if getattr(each, "owns_variables", False):
            kind = type(each).__name__
            raise ValueError(
                f"{kind} computes the model's variables at each step: they are made of what it "
                f"keeps. Received: a {kind} inside {wrapper}, which changes them. Leave one of the "
                "two out."
            )


def refuse_accumulating_members(optimizer: Any, wrapper: str) -> None:
    """Refuse a MultiOptimizer whose members accumulate gradients.

    Its counter counts micro-steps, so a wrapper around it cannot tell which ones are real updates.
    """
    for member in nesting.members(optimizer):
        accumulated = nesting.innermost(member).gradient_accumulation_steps
        if accumulated:
            raise ValueError(
                f"{wrapper} cannot wrap a MultiOptimizer whose members accumulate gradients: its "
                "`iterations` count micro-steps, not updates. Received: the member "
                f"{member.name!r} with gradient_accumulation_steps={accumulated}. Wrap the members "
                "instead."
            )


def refuse_other_variables(optimizer: Any, variables: list[Any], wrapper: str) -> None:
    """Refuse variables for which the inner optimizer was not built. It cannot be built again."""
    unknown = [v for v in variables if _keras_internals.variable_index(optimizer, v) is None]
    if unknown:
        raise ValueError(
            f"{wrapper} wraps an optimizer that was built for other variables. Received: "
            f"{[getattr(v, 'path', v.name) for v in unknown]}. Wrap a new optimizer."
        )


def average_dtype(value: Any) -> str | None:
    if value is None:
        return None
    dtype = keras.backend.standardize_dtype(value)
    if not keras.backend.is_float_dtype(dtype):
        raise ValueError(f"Averages need a float dtype. Received: average_dtype={value!r}.")
    if dtype == "float64" and _backend.widest_float() != dtype:
        raise ValueError(
            "Received: average_dtype='float64', but JAX keeps float64 only when it is told to: "
            'set `jax.config.update("jax_enable_x64", True)` at the start of the program.'
        )
    return dtype


def gradient_functions(aggregator: Any, transformers: Any) -> tuple[Callable | None, list]:
    if aggregator is not None and not callable(aggregator):
        raise TypeError(
            "`gradient_aggregator` must be a function of a list of (gradient, variable) pairs. "
            f"Received: gradient_aggregator={aggregator!r}."
        )
    if callable(transformers) or not all(callable(f) for f in transformers or ()):
        raise TypeError(
            "`gradient_transformers` must be a list of functions of a list of (gradient, variable) "
            f"pairs. Received: gradient_transformers={transformers!r}."
        )
    return aggregator, list(transformers or ())


def patterns(argument: str, value: Any) -> list[str] | None:
    """A list of regular expressions, or None."""
    if value is None:
        return None
    if isinstance(value, str) or not all(isinstance(item, str) for item in value):
        raise TypeError(
            f"`{argument}` must be a list of strings, regular expressions that are searched in "
            f"the variables' paths. Received: {argument}={value!r}."
        )
    for pattern in value:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"`{argument}` must be a list of regular expressions. Received: {pattern!r}, which "
                f"is none: {error}."
            ) from error
    return list(value)


def excluded(
    exclude: Sequence[str] | None,
    variables: list[Any],
    name: str,
    models: list[str],
    is_loaded: bool = False,
) -> set[int]:
    """The numbers of the variables that have no average because a pattern matches their path.

    Args:
        exclude: List of regular expressions, or None.
        variables: List of variables.
        name: The optimizer's name, for messages.
        models: Names of the models to which the variables may belong. A path may begin with the
            model's name. Whether it does depends on how the layer was built or loaded.
        is_loaded: Bool. Whether the model was loaded from a file. Then the variables of a pattern
            may be gone: layers that were frozen or quantized do not train them any more.
    """
    if not exclude or not variables:
        return set()
    paths = [_keras_internals.path_of(variable) for variable in variables]
    found: set[int] = set()
    for pattern in exclude:
        matches = {i for i, path in enumerate(paths) if _is_found(pattern, path, models)}
        if not matches and not is_loaded:
            raise ValueError(
                f"A pattern of `exclude` matches no variable of '{name}'. Received: {pattern!r}, "
                f"and the variables {paths}."
            )
        found |= matches
    if len(found) == len(variables) and not is_loaded:
        raise ValueError(
            f"`exclude` leaves '{name}' no variable to average. Received: exclude={exclude!r}, and "
            f"the variables {paths}."
        )
    return found


def _is_found(pattern: str, path: str, models: list[str]) -> bool:
    others = [form for m in models for form in (f"{m}/{path}", path.removeprefix(f"{m}/"))]
    return any(re.search(pattern, form) for form in (path, *others))
