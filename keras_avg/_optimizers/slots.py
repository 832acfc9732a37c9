"""What an optimizer keeps beside each variable, under the names of Keras 2."""

import re
from collections.abc import Callable, Iterable
from typing import Any

from keras_avg import _backend, _keras_internals
from keras_avg._optimizers.storage import ADDED, check_attached

SLOT_KEY = re.compile(rf"{ADDED[0]}(.+)_(\d+)")


class HasSlots:
    """The averages, added slots and the inner optimizer's, through one call."""

    built: bool
    name: str
    inner_optimizer: Any
    variables: list[Any]
    build: Callable[[list[Any]], None]
    _own_variables: dict[str, Any]
    _updates: _backend.Counter
    _average_of: Callable[[Any], Any]
    _check_built: Callable[[str], None]
    _averages_and_variables: Callable[[], tuple[list[Any], list[Any]]]

    def get_slot(self, var: Any, name: str) -> Any:
        """The variable that the optimizer keeps beside `var` under this name.

        Args:
            var: A variable that the optimizer was built with.
            name: `"average"` (shape of `var`, dtype of the averages); a name given to `add_slot`;
                or one of the inner optimizer's, as `"momentum"` of SGD and Adam.

        Returns:
            A variable; None if `var` has no such slot though others have (as float8 scales have no
            average).

        Raises:
            ValueError: If there is no such slot, or `var` is not one of the variables.

        Example:

        ```python
        optimizer = keras_avg.SWA(keras.optimizers.SGD(0.1, momentum=0.9))
        optimizer.build(model.trainable_variables)
        average = optimizer.get_slot(model.trainable_variables[0], "average")
        momentum = optimizer.get_slot(model.trainable_variables[0], "momentum")
        ```
        """
        self._check_built("get_slot")
        slots = slots_of(self, self._built_variable(var))
        if name not in slots and name not in (names := self.get_slot_names()):
            raise ValueError(f"Received: name={name!r}. The slots of '{self.name}' are: {names}.")
        return slots.get(name)

    def get_slot_names(self) -> list[str]:
        """The names that `get_slot` takes: `"average"`, added ones, then the inner optimizer's.

        An average of a wrapper inside this one is `inner_optimizer.get_slot(var, "average")`.
        """
        if not self.built:
            return ["average"]
        variables = _keras_internals.built_variables(self)
        own = [name for variable in variables for name in own_slots_of(self, variable)]
        all_slots = [name for variable in variables for name in slots_of(self, variable)]
        return list(dict.fromkeys(own + all_slots))

    def shadow_copy(self, variables: Iterable[Any]) -> None:
        """Make the averages before training begins, with the values of the variables.

        `assign_average_vars` and `swap_weights` still wait for the first snapshot.

        Args:
            variables: List of variables, such as `model.variables`. Those that are not trainable
                are left out.

        Raises:
            ValueError: If the optimizer was built with others.
        """
        variables = [v for v in variables if getattr(v, "trainable", True)]
        for variable in variables if self.built else ():
            self._built_variable(variable)
        self.build(variables)
        check_attached(self.variables)
        _backend.start_averages(self._updates.read(), *self._averages_and_variables())

    @property
    def has_shadow_copy(self) -> bool:
        """Whether the averages are made."""
        return self.built

    def __dir__(self) -> list[str]:
        # `tf.train.Checkpoint` takes whatever shows this name for an optimizer of Keras 1, whose
        # slots are nobody else's to save, and refuses ours, which are tracked as variables.
        return [name for name in super().__dir__() if name != "get_slot_names"]

    def _built_variable(self, variable: Any) -> Any:
        index = _keras_internals.variable_index(self, variable)
        if index is None:
            raise ValueError(
                f"'{self.name}' was not built with this variable. Received: var={variable!r}. Pass "
                "one of the variables that the optimizer trains."
            )
        return _keras_internals.built_variables(self)[index]


def own_slots_of(wrapper: HasSlots, variable: Any) -> dict[str, Any]:
    """The average of a variable and the slots that were added for it, by name."""
    index = _keras_internals.variable_index(wrapper, variable)
    slots = {"average": wrapper._average_of(variable)}
    for key, added in wrapper._own_variables.items():
        if (slot := SLOT_KEY.fullmatch(key)) and int(slot[2]) == index:
            slots[slot[1]] = added
    return slots


def slots_of(optimizer: Any, variable: Any) -> dict[str, Any]:
    """All slots of a variable in an optimizer and in what is inside it; outer names win."""
    if isinstance(optimizer, HasSlots):
        return slots_of(optimizer.inner_optimizer, variable) | own_slots_of(optimizer, variable)
    for member in getattr(optimizer, "optimizers", ()):
        if _keras_internals.variable_index(member, variable) is not None:
            return slots_of(member, variable)
    return _keras_internals.slots(optimizer, variable)
