"""Variables that users add to an optimizer: saved and loaded with it."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras

from keras_avg import _backend, _keras_internals
from keras_avg._optimizers import arguments, nesting
from keras_avg._optimizers.slots import SLOT_KEY, HasSlots, own_slots_of, slots_of
from keras_avg._optimizers.storage import ADDED, check_attached, depth_suffix

SLOT, WEIGHT = ADDED
VARIABLE = "variable_"
# What a file may add by itself: so many copies of the model's variables, or so many numbers.
COPIES, FEW = 8, 2**16


class AddsVariables(HasSlots):
    """`add_slot` and `add_weight` of Keras 2; `add_variable` of Keras 3.

    A file may have more of the former, or fewer.
    """

    def add_variable(self, *args: Any, **kwargs: Any) -> Any:
        """Keep one more variable, as optimizers do in `build`: part of `variables`, saved by place.

        So do `add_variable_from_reference` and `add_optimizer_variables`, by way of this.

        Args:
            *args: As `keras.optimizers.Optimizer.add_variable` takes them.
            **kwargs: Likewise.

        Returns:
            The new variable.
        """
        variable = keras.optimizers.Optimizer.add_variable(self, *args, **kwargs)
        number = sum(key.startswith(VARIABLE) for key in self._own_variables)
        self._keep(f"{VARIABLE}{number}", variable)
        return variable

    def add_slot(self, var: Any, name: str, initializer: Any = "zeros") -> Any:
        """Keep one more variable beside `var`: part of `variables`, saved and loaded with them.

        Args:
            var: A variable that the optimizer was built with.
            name: String without "/".
            initializer: Keras initializer, its name, or a function of `shape` and `dtype`. Default
                `"zeros"`.

        Returns:
            The new variable, of the shape and dtype of `var`; or the one that is there, if it was
            added before or came with a file.

        Raises:
            ValueError: If `var` is not one of the variables, or the inner optimizer has a slot of
                that name.
        """
        self._check_built("add_slot")
        name, variable = _checked(name), self._built_variable(var)
        own = own_slots_of(self, variable)
        if name in own:
            return own[name]
        if name in slots_of(self.inner_optimizer, variable):
            raise ValueError(
                f"The optimizer inside '{self.name}' has a slot of that name, which `get_slot` "
                f"gives. Received: name={name!r}. Choose another."
            )
        check_attached(self.variables)
        dtype = keras.backend.standardize_dtype(variable.dtype)
        slot = _keras_internals.add_variable_like(
            self, variable, name + depth_suffix(self), dtype, _copying(initializer)
        )
        index = _keras_internals.variable_index(self, variable)
        self._keep(f"{SLOT}{name}_{index}", slot)
        return slot

    def add_weight(
        self,
        name: str,
        shape: Sequence[int],
        dtype: Any = None,
        initializer: Any = "zeros",
        trainable: bool | None = None,
        synchronization: Any = None,
        aggregation: Any = None,
    ) -> Any:
        """Keep one more variable: part of `variables`, saved and loaded with them.

        Args:
            name: String without "/".
            shape: Tuple of integers.
            dtype: Dtype. Default None: Keras' float dtype.
            initializer: Keras initializer, its name, or a function of `shape` and `dtype`. Default
                `"zeros"`.
            trainable: None or False: nobody trains an optimizer's variable.
            synchronization: None or `"auto"`: how replicas hold it is the strategy's to say.
            aggregation: What a strategy makes of the replicas' values: `"none"`, `"mean"`, `"sum"`
                or `"only_first_replica"`, or a `tf.VariableAggregation`. Default None: `"none"`.

        Returns:
            The new variable; or the one that is there, if it was added before or came with a file.

        Raises:
            ValueError: If there is one of another shape, or an argument says what Keras 3 has not.
        """
        name = _checked(name)
        if trainable or _lower(synchronization) not in (None, "auto"):
            raise ValueError(
                "An optimizer's variable is not trainable, and its strategy synchronizes it. "
                f"Received: {trainable=}, {synchronization=}. Leave them out."
            )
        weight = self._own_variables.get(f"{WEIGHT}{name}")
        if weight is None:
            check_attached(self.variables)
            weight = keras.optimizers.Optimizer.add_variable(
                self,
                shape=shape,
                initializer=_copying(initializer),
                dtype=dtype,
                aggregation=_lower(aggregation),
                name=f"{nesting.innermost(self).name}_{name}{depth_suffix(self)}",
            )
            self._keep(f"{WEIGHT}{name}", weight)
        elif tuple(weight.shape) != tuple(shape):
            raise ValueError(
                f"'{self.name}' has a weight {name!r} of shape {tuple(weight.shape)} already. "
                f"Received: shape={tuple(shape)}. Choose another name."
            )
        return weight

    def _keep(self, key: str, variable: Any) -> None:
        # In an order that does not depend on when they were added, so that two optimizers with the
        # same variables, one of which has them from a file, list them alike.
        own = self._own_variables | {key: variable}
        self._own_variables = {key: own[key] for key in sorted(own, key=_place)}

    def _expected_in_file(self, stored: Mapping[str, Any]) -> dict[str, Any]:
        """What a file must have, by name: added variables only if they are in it.

        For those that are not here yet, what has their shape.
        """
        own = {
            n: v for n, v in self._own_variables.items() if n in stored or not n.startswith(ADDED)
        }
        variables = dict(enumerate(_keras_internals.built_variables(self)))
        for name in stored.keys() - own.keys():
            if name.startswith(WEIGHT):
                own[name] = stored[name]
            elif (slot := SLOT_KEY.fullmatch(name)) and int(slot[2]) in variables:
                own[name] = variables[int(slot[2])]
        return own

    def _refuse_growth(self, index: Mapping[str, Any]) -> None:
        """Refuse a file that would make the optimizer larger than the model warrants."""
        new = {name: index[name].shape for name in index if name not in self._own_variables}
        elements = sum(map(math.prod, new.values()))
        of_model = sum(math.prod(v.shape) for v in _keras_internals.built_variables(self))
        if elements > max(COPIES * of_model, FEW):
            raise ValueError(
                f"The state does not fit optimizer '{self.name}': it would add {elements} numbers "
                f"to those of a model that has {of_model}. Received: {_largest(new)}. None of its "
                "own variables was changed. If they are yours, call `add_weight` or `add_slot` "
                "before loading."
            )

    def _add_what_is_stored(self, stored: Mapping[str, Any]) -> None:
        for name in stored.keys() - self._own_variables.keys():
            if slot := SLOT_KEY.fullmatch(name):
                self.add_slot(_keras_internals.built_variables(self)[int(slot[2])], slot[1])
            else:
                array = stored[name]
                self.add_weight(name.removeprefix(WEIGHT), array.shape, _dtype_here(array.dtype))
        if missing := sorted(self._own_variables.keys() - stored.keys()):
            warnings.warn(
                f"The file has no values for the variables {missing} that were added to "
                f"'{self.name}': they keep those they have.",
                stacklevel=3,
            )


def _largest(shapes: dict[str, tuple[int, ...]]) -> str:
    largest = sorted(shapes, key=lambda name: -math.prod(shapes[name]))[:3]
    return ", ".join(f"'{name}' of shape {shapes[name]}" for name in largest)


def _place(key: str) -> tuple[Any, ...]:
    if slot := SLOT_KEY.fullmatch(key):
        return 1, slot[1], int(slot[2])
    return (2, key) if key.startswith(WEIGHT) else (0,)  # 0: as they are


def _checked(name: Any) -> str:
    return str(arguments.variable_scope_name(name or ""))


def _lower(setting: Any) -> str | None:
    """A setting, or a member of TensorFlow's enumeration of them, as Keras writes it."""
    return None if setting is None else getattr(setting, "name", setting).lower()


def _copying(initializer: Any) -> Callable:
    """An initializer whose values are not somebody else's, as `lambda shape, dtype: var.value`."""
    initial = keras.initializers.get(initializer)
    return lambda shape, dtype=None: _backend.copy(initial(shape, dtype=dtype))


def _dtype_here(dtype: Any) -> str:
    # A file from another backend may have 64 bits where JAX has not.
    name = keras.backend.standardize_dtype(dtype)
    return name if _backend.widest_float() == "float64" else name.replace("64", "32")
