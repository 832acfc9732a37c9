"""The keyword arguments that a wrapper takes as `**kwargs`, and the names of all its arguments."""

import functools
import inspect
import math
from typing import Any

import keras

from keras_avg import _checks
from keras_avg._wrapping import foreign_words

CLIPPING = ("clipnorm", "clipvalue", "global_clipnorm")
RATE = ("lr", "learning_rate")
RATE_DECAY = "decay"  # of the learning rate, as in Keras 2
INNER_ONLY = (
    "weight_decay",
    "use_ema",
    "ema_overwrite_frequency",
    "loss_scale_factor",
    "gradient_accumulation_steps",
)


def split(wrapper: type, keywords: dict[str, Any]) -> tuple[dict, dict]:
    """Split the keywords into clipping arguments and arguments for the inner learning rate.

    Raises:
        TypeError: If `decay` is given to a wrapper whose rule has a decay of its own.
        ValueError: If an argument is unknown, belongs to the inner optimizer, or is no number.
    """
    kind, known = wrapper.__name__, known_arguments(wrapper)
    for argument, value in keywords.items():
        if argument in INNER_ONLY:
            raise ValueError(
                f"{kind} has no `{argument}` of its own: set it on the inner optimizer, as in "
                f"{kind}(keras.optimizers.SGD({argument}=...)). Received: {argument}={value!r}."
            )
    foreign_words.refuse(kind, known, keywords)
    if unknown := {k: v for k, v in keywords.items() if k not in known}:
        raise ValueError(
            f"Argument(s) not recognized: {unknown}. {kind} takes: {', '.join(known)}."
        )
    clipping = {k: v for k, v in keywords.items() if k in CLIPPING}
    for argument, value in clipping.items():
        if value is not None and math.isnan(_checks.number(value)):
            raise ValueError(f"`{argument}` must be a number. Received: {argument}={value!r}.")
    rate = {k: v for k, v in keywords.items() if k not in CLIPPING and v is not None}
    if "lr" in rate and "learning_rate" in rate:
        raise ValueError(
            "`lr` and `learning_rate` are one argument. Received: "
            f"lr={rate['lr']!r}, learning_rate={rate['learning_rate']!r}. Pass one of them."
        )
    return clipping, rate


@functools.cache
def known_arguments(wrapper: Any) -> tuple[str, ...]:
    """All arguments that a wrapper's constructor takes, including those in `**kwargs`."""
    names = list(_named(wrapper))
    names += [*CLIPPING, *RATE]
    if "average_decay" not in names:
        names.append(RATE_DECAY)
    return tuple(dict.fromkeys(names))


@functools.cache
def hyper_parameters(wrapper: Any) -> frozenset[str]:
    """The attributes that are read-only once the wrapper is built. Compiled code contains them."""
    return frozenset([*_named(wrapper), *CLIPPING]) - {"optimizer", "name"}


def _named(wrapper: Any) -> list[str]:
    names = []
    for kind in wrapper.__mro__[: wrapper.__mro__.index(keras.optimizers.Optimizer)]:
        if "__init__" in vars(kind):
            parameters = inspect.signature(vars(kind)["__init__"]).parameters.values()
            names += [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return [name for name in names if name != "self"]
