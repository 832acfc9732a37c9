"""Checks of ModelAverage's arguments. A check returns the value to keep, or raises an error."""

import copy
from typing import Any

import keras

from keras_avg import distributed
from keras_avg._wrapping import nesting

INNER_STATES = ("keep", "average", "reset")


def inner_state(value: Any) -> str:
    """One of the words that say what a round does with the slots of the inner optimizers."""
    if isinstance(value, str) and value in INNER_STATES:
        return value
    raise ValueError(
        f"`inner_state` must be one of {INNER_STATES}: what becomes of momenta at a round. "
        f"Received: inner_state={value!r}."
    )


def outer_optimizer(identifier: Any) -> Any:
    """The optimizer that moves the center, or None."""
    if identifier is None:
        return None
    if isinstance(identifier, dict):
        identifier = copy.deepcopy(identifier)  # Keras rewrites the config it is given
    optimizer = keras.optimizers.get(identifier)
    if nesting.wraps(optimizer) or optimizer.gradient_accumulation_steps:
        raise ValueError(
            "`outer_optimizer` takes one plain step along center - mean at each round. Received: "
            f"outer_optimizer={optimizer!r}. Pass an optimizer that wraps nothing and accumulates "
            "nothing, such as keras.optimizers.SGD(0.7, momentum=0.9, nesterov=True)."
        )
    return optimizer


def names_apart(outer: Any, others: list[Any]) -> None:
    """Refuse an outer optimizer with the name of another one.

    Keras' state tree identifies the variables by the names of their optimizers.
    """
    if outer is None:
        return
    # Older versions of Keras give the same name to all optimizers of a class. Users have not chosen
    # this name, so it is not refused.
    has_own_name = outer.name.lower() != type(outer).__name__.lower()
    if any(o is outer or (has_own_name and o.name == outer.name) for o in others):
        raise ValueError(
            "`outer_optimizer` must be another optimizer than those inside, of another name. "
            f"Received: outer_optimizer={outer!r} named '{outer.name}', as one of {others}. Give "
            "it a name of its own."
        )


def communicator(given: Any, num_worker: Any, is_chief: Any) -> Any:
    """The communicator to use. Refuse one that differs from `num_worker` or `is_chief`."""
    chosen = distributed.initialize() if given is None else given
    members = ("rank", "size", "is_chief", "all_reduce_sum")
    if isinstance(chosen, type) or not all(hasattr(chosen, member) for member in members):
        raise TypeError(
            f"`communicator` must have {', '.join(members)} and `barrier`, as a "
            f"keras_avg.distributed.Communicator. Received: communicator={chosen!r}."
        )
    if num_worker is not None and num_worker != chosen.size:
        raise ValueError(
            f"There are {chosen.size} workers. Received: num_worker={num_worker!r}. Leave it out, "
            "or start as many workers by the backend's launcher."
        )
    if is_chief is not None and bool(is_chief) != chosen.is_chief:
        raise ValueError(
            f"The chief is the worker of rank 0, and this is rank {chosen.rank}. Received: "
            f"is_chief={is_chief!r}. Leave it out."
        )
    return chosen


def refuse_built_outer_optimizer(optimizer: Any, wrapper: str) -> None:
    """Refuse an outer optimizer that is built, because it must be built for the centers."""
    if optimizer is not None and optimizer.built:
        raise ValueError(
            f"{wrapper} needs an outer optimizer of its own, and this was built for other "
            f"variables. Received: outer_optimizer={optimizer!r}. Pass a new one."
        )
