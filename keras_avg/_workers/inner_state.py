"""Averages or resets the inner optimizer's float slots (such as momenta) at a round."""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_avg import _backend, _keras_internals
from keras_avg._wrapping import nesting


class InnerState:
    """The slots of all optimizers that take steps inside a wrapper.

    Args:
        wrapper: The wrapper.
        kind: What a round does with the slots: `"keep"`, `"average"` or `"reset"`. Keras' own
            average (`use_ema`) is never reset.
    """

    def __init__(self, wrapper: Any, kind: str) -> None:
        self._wrapper = wrapper
        self._kind = kind
        self._initial: list[Any] = []

    def averaged(self) -> list[Any]:
        """The slots that a round replaces by their mean over the workers."""
        return self.slots() if self._kind == "average" else []

    def slots(self) -> list[Any]:
        """All float slots."""
        return [slot for slot, _ in self._pairs()]

    def note_initial_values(self) -> None:
        """Find out the initial values of the slots.

        A new optimizer is built for variables whose values are all infinite. If a slot is infinite
        too, it begins with its variable's value, as ScheduleFreeAdamW's momentum does. It is noted
        as None. If all values of a slot are equal, they are noted as one number.
        """
        slots = []
        with _backend.outside_trace():
            for optimizer in nesting.leaves(self._wrapper):
                new = type(optimizer).from_config(optimizer.get_config())
                built = _keras_internals.built_variables(optimizer)
                like = [_keras_internals.variable_like(v, np.inf) for v in built]
                new.build(like)
                slots += [ops.convert_to_numpy(slot) for slot, _ in self._pairs_of(new, like)]
        self._initial = [_shortest(slot) for slot in slots]

    def reset(self) -> None:
        """Give the slots their initial values if `kind` is `"reset"`."""
        if self._kind != "reset":
            return
        for (slot, variable), initial in zip(self._pairs(), self._initial, strict=True):
            if initial is None:
                _backend.assign_quotients([variable], 1.0, [slot])
            else:
                initial = ops.convert_to_tensor(initial, slot.dtype)
                slot.assign(_backend.copy(ops.broadcast_to(initial, slot.shape)))

    def _pairs(self) -> list[tuple[Any, Any]]:
        """Pairs of each slot and its variable."""
        return [
            pair
            for optimizer in nesting.leaves(self._wrapper)
            for pair in self._pairs_of(optimizer, _keras_internals.built_variables(optimizer))
        ]

    def _pairs_of(self, optimizer: Any, variables: list[Any]) -> list[tuple[Any, Any]]:
        kept = "average" if optimizer.use_ema and self._kind == "reset" else None
        return [
            (slot, variable)
            for variable in variables
            for name, slot in _keras_internals.slots(optimizer, variable).items()
            if name != kept and keras.backend.is_float_dtype(slot.dtype)
        ]


def _shortest(slot: np.ndarray) -> Any:
    if np.all(np.isinf(slot)):
        return None
    return slot.flat[0] if np.all(slot == slot.flat[0]) else slot
