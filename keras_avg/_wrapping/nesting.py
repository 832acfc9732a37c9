"""How optimizers stand inside each other: all walks over them.

Three kinds contain others: averaging wrappers and Keras' `LossScaleOptimizer` wrap one, as
`inner_optimizer`; Keras' `MultiOptimizer` has several, as `optimizers`.
"""

from collections.abc import Iterator
from typing import Any

import keras


def optimizers_of(model: Any) -> list[Any]:
    """The optimizers that a model has: that of `compile`, and others in attributes of its own."""
    found = [getattr(model, "optimizer", None), *getattr(model, "__dict__", {}).values()]
    optimizers = [each for each in found if isinstance(each, keras.optimizers.Optimizer)]
    return list({id(each): each for each in optimizers}.values())


def wraps(optimizer: Any) -> bool:
    """Whether an optimizer wraps one other."""
    return hasattr(optimizer, "inner_optimizer")


def members(optimizer: Any) -> list[Any]:
    """The members of a `MultiOptimizer`; none for all others."""
    return [] if wraps(optimizer) else list(getattr(optimizer, "optimizers", ()))


def directly_inside(optimizer: Any) -> list[Any]:
    """What an optimizer wraps, or its members."""
    return [optimizer.inner_optimizer] if wraps(optimizer) else members(optimizer)


def walk(optimizer: Any) -> Iterator[Any]:
    """An optimizer and all that are inside it, outer ones first."""
    yield optimizer
    for inside in directly_inside(optimizer):
        yield from walk(inside)


def is_inside(inner: Any, outer: Any) -> bool:
    """Whether an optimizer is another, or is at work inside it."""
    return any(each is inner for each in walk(outer))


def innermost(optimizer: Any) -> Any:
    """The optimizer inside all that wrap it."""
    while wraps(optimizer):
        optimizer = optimizer.inner_optimizer
    return optimizer


def workers_inside(optimizer: Any) -> list[Any]:
    """All that an optimizer contains and that do something: not a `MultiOptimizer` itself."""
    _, *inside = walk(optimizer)
    return [each for each in inside if not members(each)]


def leaves(optimizer: Any) -> list[Any]:
    """The optimizers inside that take the steps."""
    return [each for each in walk(optimizer) if not directly_inside(each)]


def depth(optimizer: Any) -> int:
    """How many wrappers deep: 0 for an optimizer that wraps nothing."""
    deepest = max(map(depth, directly_inside(optimizer)), default=0)
    return deepest + wraps(optimizer)
