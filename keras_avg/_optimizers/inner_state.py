"""The inner optimizer's float slots, such as momenta: averaged or reset at a round."""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_avg import _backend, _keras_internals
from keras_avg._optimizers import nesting


class HasInnerState:
    """What `inner_state` is about. Keras' own average (`use_ema`) is never reset."""

    inner_state: str
    _initial_slots: list[Any]

    def _averaged_slots(self) -> list[Any]:
        return [slot for slot, _ in self._inner_slots()] if self.inner_state == "average" else []

    def _inner_slots(self) -> list[tuple[Any, Any]]:
        """The slots, each with the variable that it is kept beside."""
        return [
            pair
            for optimizer in nesting.leaves(self)
            for pair in self._slots(optimizer, _keras_internals.built_variables(optimizer))
        ]

    def _slots(self, optimizer: Any, variables: list[Any]) -> list[tuple[Any, Any]]:
        kept = "average" if optimizer.use_ema and self.inner_state == "reset" else None
        return [
            (slot, variable)
            for variable in variables
            for name, slot in _keras_internals.slots(optimizer, variable).items()
            if name != kept and keras.backend.is_float_dtype(slot.dtype)
        ]

    def _note_initial_slots(self) -> None:
        """Find out what the slots begin with, from new optimizers for variables that are infinite.

        Kept as one number where that is all; as None where a slot begins with its variable's value
        (ScheduleFreeAdamW's momentum), so that it is infinite too.
        """
        slots = []
        with _backend.outside_trace():
            for optimizer in nesting.leaves(self):
                new = type(optimizer).from_config(optimizer.get_config())
                built = _keras_internals.built_variables(optimizer)
                like = [_keras_internals.variable_like(v, np.inf) for v in built]
                new.build(like)
                slots += [ops.convert_to_numpy(slot) for slot, _ in self._slots(new, like)]
        self._initial_slots = [_shortest(slot) for slot in slots]

    def _reset_slots(self) -> None:
        for (slot, variable), initial in zip(self._inner_slots(), self._initial_slots, strict=True):
            if initial is None:
                _backend.assign_quotients([variable], 1.0, [slot])
            else:
                initial = ops.convert_to_tensor(initial, slot.dtype)
                slot.assign(_backend.copy(ops.broadcast_to(initial, slot.shape)))


def _shortest(slot: np.ndarray) -> Any:
    if np.all(np.isinf(slot)):
        return None
    return slot.flat[0] if np.all(slot == slot.flat[0]) else slot
