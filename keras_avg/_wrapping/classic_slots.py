"""The methods of Keras 2 for the variables that an optimizer keeps (slots and weights)."""

from collections.abc import Sequence
from typing import Any

import keras

from keras_avg import _checks, _keras_internals
from keras_avg._keras2.classic_steps import ClassicSteps
from keras_avg._types import Aggregation, DType, Initializer, Variable
from keras_avg._wrapping import nesting
from keras_avg._wrapping.own_variables import OwnVariables


class ClassicSlots(ClassicSteps):
    """Lets users read and add variables of the optimizer, with the methods of Keras 2 and 3."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._own_variables = OwnVariables(self)

    def get_slot(self, var: Variable, name: str) -> Variable:
        """The variable that the optimizer keeps beside `var` under this name.

        Args:
            var: A variable that the optimizer was built with.
            name: `"average"`, or another store of the rule; or a name that was given to `add_slot`;
                or a slot of the inner optimizer, such as `"momentum"` of SGD and Adam. An average
                has the shape of `var` and the dtype of the averages.

        Returns:
            A variable. None if `var` has no such slot, but other variables have one. (A float8
            scale, for example, has no average.)

        Raises:
            ValueError: If no variable has such a slot, or the optimizer was not built with `var`.

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
        """The names that `get_slot` takes: stores, then added slots, then inner slots.

        To get the average of a wrapper inside this one, call
        `inner_optimizer.get_slot(var, "average")`.
        """
        if not self.built:
            return ["average"]
        variables = _keras_internals.built_variables(self)
        own = [name for i in range(len(variables)) for name in self._own_variables.slots_of(i)]
        all_slots = [name for variable in variables for name in slots_of(self, variable)]
        return list(dict.fromkeys(own + all_slots))

    def add_variable(self, *args: Any, **kwargs: Any) -> keras.Variable:
        """Keep one more variable, as optimizers do in `build`.

        It becomes part of `variables`, and is saved by its place among the added ones. Keras'
        `add_variable_from_reference` and `add_optimizer_variables` call this method.

        Args:
            *args: The arguments of `keras.optimizers.Optimizer.add_variable`.
            **kwargs: Its keyword arguments.

        Returns:
            The new variable.
        """
        variable = keras.optimizers.Optimizer.add_variable(self, *args, **kwargs)
        self._own_variables.add(variable)
        return variable

    def add_slot(
        self, var: Variable, name: str, initializer: Initializer = "zeros"
    ) -> keras.Variable:
        """Keep one more variable beside `var`.

        It becomes part of `variables`, and is saved and loaded with them.

        Args:
            var: A variable that the optimizer was built with.
            name: String without "/".
            initializer: Keras initializer, its name, or a function of `shape` and `dtype`. Default
                `"zeros"`.

        Returns:
            A variable of the shape and dtype of `var`. It is new, unless it was added before or
            was loaded from a file.

        Raises:
            ValueError: If the optimizer was not built with `var`, or if the inner optimizer has a
                slot of that name.
        """
        self._check_built("add_slot")
        name, variable = str(_checks.scope_name(name or "")), self._built_variable(var)
        number = _number(self, variable)
        own = self._own_variables.slots_of(number)
        if name in own:
            return own[name]
        if name in slots_of(self, variable):
            raise ValueError(
                f"The optimizer inside '{self.name}' has a slot of that name, which `get_slot` "
                f"gives. Received: name={name!r}. Choose another."
            )
        _keras_internals.check_attached(self.variables)
        return self._own_variables.add_slot(number, name, initializer)

    def add_weight(
        self,
        name: str,
        shape: Sequence[int],
        dtype: DType | None = None,
        initializer: Initializer = "zeros",
        trainable: bool | None = None,
        synchronization: str | None = None,
        aggregation: Aggregation | None = None,
    ) -> keras.Variable:
        """Keep one more variable of any shape.

        It becomes part of `variables`, and is saved and loaded with them.

        Args:
            name: String without "/".
            shape: Tuple of integers.
            dtype: Dtype. Default None: Keras' float dtype.
            initializer: Keras initializer, its name, or a function of `shape` and `dtype`. Default
                `"zeros"`.
            trainable: None or False. An optimizer's variable is never trained.
            synchronization: None or `"auto"`. The strategy decides how the replicas hold it.
            aggregation: How a strategy combines the replicas' values: `"none"`, `"mean"`, `"sum"`
                or `"only_first_replica"`, or a `tf.VariableAggregation`. Default None: `"none"`.

        Returns:
            A variable. It is new, unless it was added before or was loaded from a file.

        Raises:
            ValueError: If there is a weight of this name with another shape, or if Keras 3 does not
                support an argument's value.
        """
        name = str(_checks.scope_name(name or ""))
        if trainable or _lower(synchronization) not in (None, "auto"):
            raise ValueError(
                "An optimizer's variable is not trainable, and its strategy synchronizes it. "
                f"Received: {trainable=}, {synchronization=}. Leave them out."
            )
        _keras_internals.check_attached(self.variables)
        return self._own_variables.add_weight(
            name, shape, dtype=dtype, initializer=initializer, aggregation=_lower(aggregation)
        )

    def __dir__(self) -> list[str]:
        # `tf.train.Checkpoint` believes that an object with this name is an optimizer of Keras 1.
        # It would save the slots in its own way, and refuse ours, because we track them as
        # variables. So the name is hidden from it.
        return [name for name in super().__dir__() if name != "get_slot_names"]

    def _built_variable(self, variable: Any) -> Any:
        number = _number(self, variable)
        if number is None:
            raise ValueError(
                f"'{self.name}' was not built with this variable. Received: var={variable!r}. Pass "
                "one of the variables that the optimizer trains."
            )
        return _keras_internals.built_variables(self)[number]

    def _check_built(self, member: str) -> None:
        if not self.built:
            raise ValueError(
                f"'{self.name}' has no averages before it is built, so `{member}` has nothing to "
                "work on. Take a first step, or call `optimizer.build(model.trainable_variables)`."
            )


def slots_of(optimizer: Any, variable: Any) -> dict[str, Any]:
    """All slots of a variable in an optimizer and in the optimizers inside it.

    If two have the same name, the outer one is returned.
    """
    if isinstance(optimizer, ClassicSlots):
        inside: dict[str, Any] = {}
        for each in nesting.directly_inside(optimizer):
            inside |= slots_of(each, variable)
        return inside | optimizer._own_variables.slots_of(_number(optimizer, variable))
    for member in nesting.members(optimizer):
        if _number(member, variable) is not None:
            return slots_of(member, variable)
    return _keras_internals.slots(optimizer, variable)


def _number(optimizer: Any, variable: Any) -> Any:
    return _keras_internals.variable_index(optimizer, variable)


def _lower(setting: Any) -> str | None:
    """A setting as Keras writes it, from a string or a member of TensorFlow's enumeration."""
    return None if setting is None else getattr(setting, "name", setting).lower()
