"""The arguments `lr`, `learning_rate` and `decay`. They set the inner optimizer's rate."""

import math
import numbers
from typing import Any

import keras

from keras_avg import _backend, _checks, _keras_internals


def set_rate(optimizer: Any, wrapper: str, rate: dict[str, Any]) -> None:
    """Apply `lr`, `learning_rate` and `decay` to the inner optimizer. An error changes nothing."""
    if not rate:
        return
    decay = _checks.non_negative("decay", rate.get("decay", 0.0))
    given = _checked_rate(rate.get("learning_rate", rate.get("lr")))
    if given is None and not decay:
        return
    start = optimizer.learning_rate if given is None else given
    settable = isinstance(start, keras.Variable | numbers.Real)
    if decay and not settable:
        raise ValueError(
            f"`decay` turns a constant learning rate into InverseTimeDecay, but the rate is a "
            f"schedule already. Received: decay={decay!r} for {wrapper} around {optimizer!r}."
        )
    if given is not None:
        optimizer.learning_rate = given
    if decay:
        optimizer.learning_rate = keras.optimizers.schedules.InverseTimeDecay(
            float(keras.ops.convert_to_numpy(start)), 1, decay
        )
    _keras_internals.renew_variables(optimizer, _keras_internals.own_variables(optimizer))


def _checked_rate(value: Any) -> Any:
    if value is None or callable(value):  # schedules are callable
        return value
    number = _checks.number(value)
    if not math.isfinite(number):
        raise ValueError(
            "`learning_rate` (`lr`) must be a finite number, a schedule or a function without "
            f"arguments. Received: {value!r}."
        )
    return number  # not a variable of the user, whose buffer must not be shared


def without_owner(rate: Any) -> Any:
    """A rate to assign. Of a variable or a tensor it is a copy of the value."""
    if callable(rate) or isinstance(rate, numbers.Real):
        return rate
    return _backend.copy(keras.ops.convert_to_tensor(rate))
