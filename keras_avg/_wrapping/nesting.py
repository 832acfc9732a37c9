"""All functions that look at optimizers inside other optimizers.

Three kinds of optimizers contain others. An averaging wrapper and Keras' `LossScaleOptimizer` wrap
one optimizer, in the attribute `inner_optimizer`. Keras' `MultiOptimizer` has several members, in
the attribute `optimizers`.
"""

from collections.abc import Iterator
from typing import Any

import keras


def optimizers_of(model: Any) -> list[Any]:
    """The optimizer with which a model was compiled, and those in the model's own attributes."""
    found = [getattr(model, "optimizer", None), *getattr(model, "__dict__", {}).values()]
    optimizers = [each for each in found if isinstance(each, keras.optimizers.Optimizer)]
    return list({id(each): each for each in optimizers}.values())


def wraps(optimizer: Any) -> bool:
    """Whether an optimizer wraps one other optimizer."""
    return hasattr(optimizer, "inner_optimizer")


def members(optimizer: Any) -> list[Any]:
    """The members of a `MultiOptimizer`. The list is empty for all other optimizers."""
    return [] if wraps(optimizer) else list(getattr(optimizer, "optimizers", ()))


def directly_inside(optimizer: Any) -> list[Any]:
    """The optimizer that an optimizer wraps, or its members."""
    return [optimizer.inner_optimizer] if wraps(optimizer) else members(optimizer)


def walk(optimizer: Any) -> Iterator[Any]:
    """An optimizer, and then all optimizers inside it. Outer ones come first."""
    yield optimizer
    for inside in directly_inside(optimizer):
        yield from walk(inside)


def is_inside(inner: Any, outer: Any) -> bool:
    """Whether `inner` is `outer` itself, or an optimizer inside it."""
    return any(each is inner for each in walk(outer))


def innermost(optimizer: Any) -> Any:
    """The optimizer inside all wrappers around it."""
    while wraps(optimizer):
        optimizer = optimizer.inner_optimizer
    return optimizer


def workers_inside(optimizer: Any) -> list[Any]:
    """All optimizers inside this one, except `MultiOptimizer`s, which only pass calls on."""
    _, *inside = walk(optimizer)
    return [each for each in inside if not members(each)]


def leaves(optimizer: Any) -> list[Any]:
    """The optimizers that take the steps: those that contain no other."""
    return [each for each in walk(optimizer) if not directly_inside(each)]


def depth(optimizer: Any) -> int:
    """The number of wrappers on the longest way in. It is 0 for an optimizer that wraps nothing."""
    deepest = max(map(depth, directly_inside(optimizer)), default=0)
    return deepest + wraps(optimizer)
