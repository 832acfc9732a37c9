"""The variables that a wrapper itself keeps. Those of the optimizers inside it do not count."""

import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras

from keras_avg import _backend, _keras_internals
from keras_avg._wrapping import nesting
from keras_avg._wrapping.store import LONGEST_RING

SLOT, WEIGHT, VARIABLE = "slot_", "weight_", "variable_"  # the names of added variables begin so
RESERVED = (SLOT, WEIGHT, VARIABLE, "raw_", "swapped_")
SLOT_NAME = re.compile(rf"{SLOT}(.+)_(0|[1-9][0-9]{{0,8}})")
# A file may add variables by itself. Together they may be as large as COPIES copies of the model's
# variables, or have FEW elements.
COPIES, FEW = 8, 2**16


class OwnVariables:
    """Makes, names and lists an optimizer's own variables.

    The names are also those in a file. The counters have names of their own. `average_0` is the
    variable of the store `average` beside model variable 0. `slot_x_0` and `weight_x` were added by
    users. `variable_0` was added by a subclass.

    Args:
        optimizer: The optimizer that the variables are for.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self.by_name: dict[str, Any] = {}
        self.stores: tuple[str, ...] = ()
        self.rings: tuple[str, ...] = ()  # those of the stores that are rings

    def __getitem__(self, name: str) -> Any:
        return self.by_name[name]

    def counter(self, name: str) -> Any:
        """The integer variable of this name. It is made if it does not exist yet."""
        if name not in self.by_name:
            # Keras' state trees need a different path for each variable. Keras numbers the names of
            # optimizers, so the innermost optimizer's name is unique in a program. The depth tells
            # apart the wrappers around it.
            self.by_name[name] = keras.optimizers.Optimizer.add_variable(
                self._optimizer,
                shape=(),
                dtype="int",
                aggregation="only_first_replica",
                name=f"{nesting.innermost(self._optimizer).name}_{name}{self._suffix()}",
            )
        return self.by_name[name]

    def add_store(
        self,
        store: str,
        variables: Mapping[int, Any],
        dtypes: Mapping[int, str],
        first: str | int = "zeros",
    ) -> list:
        """Make one variable of zeros beside each of the given model variables.

        The initializer does not read the model variable, for two reasons. It would fail if
        TensorFlow creates both variables in the first trace of a `tf.function`. And it would miss
        weights that are loaded later.

        Args:
            store: String, the name of the store.
            variables: Dict from numbers to model variables.
            dtypes: Dict from the same numbers to dtypes.
            first: What `stores()` says of the store: `"zeros"`, `"variable"`, or an integer for a
                ring, whose variables have so many rows of the model variable's shape.
        """
        if not store or "/" in store or store.startswith(RESERVED):
            raise ValueError(
                "A store needs a name of its own, without '/', that does not begin with one of "
                f"{RESERVED}. Received: {store!r}."
            )
        rows = _rows(store, first)
        added = {n: v for n, v in self.by_name.items() if _place(n) != (0,)}
        made = {
            f"{store}_{i}": self._beside(variable, store, dtypes[i], rows=rows)
            for i, variable in variables.items()
        }
        before = {n: v for n, v in self.by_name.items() if n not in added}
        self.by_name = before | made | added
        self.stores = (*self.stores, store)
        self.rings = (*self.rings, store) if rows is not None else self.rings
        return list(made.values())

    def add(self, variable: Any) -> None:
        """Keep one more variable, which a subclass has made. Its name in a file is its number."""
        number = sum(name.startswith(VARIABLE) for name in self.by_name)
        self._keep(f"{VARIABLE}{number}", variable)

    def add_slot(self, number: int, name: str, initializer: Any = "zeros") -> Any:
        """Make one more variable beside the model variable of this number, and keep it."""
        variable = _keras_internals.built_variables(self._optimizer)[number]
        dtype = keras.backend.standardize_dtype(variable.dtype)
        slot = self._beside(variable, name, dtype, _copying(initializer))
        self._keep(f"{SLOT}{name}_{number}", slot)
        return slot

    def add_weight(self, name: str, shape: Sequence[int], **how: Any) -> Any:
        """The added variable of this name. It is made if it does not exist yet."""
        weight = self.by_name.get(f"{WEIGHT}{name}")
        if weight is None:
            how["initializer"] = _copying(how.get("initializer", "zeros"))
            full_name = f"{nesting.innermost(self._optimizer).name}_{name}{self._suffix()}"
            weight = keras.optimizers.Optimizer.add_variable(
                self._optimizer, shape=shape, name=full_name, **how
            )
            self._keep(f"{WEIGHT}{name}", weight)
        elif tuple(weight.shape) != tuple(shape):
            raise ValueError(
                f"'{self._optimizer.name}' has a weight {name!r} of shape {tuple(weight.shape)} "
                f"already. Received: shape={tuple(shape)}. Choose another name."
            )
        return weight

    def slots_of(self, number: int) -> dict[str, Any]:
        """The variables kept beside a model variable, by name.

        The value is None for a store that keeps nothing beside this variable.
        """
        slots = {store: self.by_name.get(f"{store}_{number}") for store in self.stores}
        for name, added in self.by_name.items():
            if (found := SLOT_NAME.fullmatch(name)) and int(found[2]) == number:
                slots[found[1]] = added
        return slots

    def expected_in(self, stored: Mapping[str, Any]) -> dict[str, Any]:
        """The entries that a file must have, by name, each with a variable of the right shape.

        An added variable is expected only if it is in the file. If it is not here yet, another
        array of its shape stands for it.
        """
        own = {
            n: v for n, v in self.by_name.items() if n in stored or not n.startswith((SLOT, WEIGHT))
        }
        variables = dict(enumerate(_keras_internals.built_variables(self._optimizer)))
        for name in stored.keys() - own.keys():
            if name.startswith(WEIGHT):
                own[name] = stored[name]
            elif (slot := SLOT_NAME.fullmatch(name)) and int(slot[2]) in variables:
                own[name] = variables[int(slot[2])]
        return own

    def refuse_growth(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse a file whose additional variables are far larger than the model."""
        new = {name: shape for name, shape in shapes.items() if name not in self.by_name}
        elements = sum(map(math.prod, new.values()))
        built = _keras_internals.built_variables(self._optimizer)
        of_model = sum(math.prod(variable.shape) for variable in built)
        if elements > max(COPIES * of_model, FEW):
            largest = sorted(new, key=lambda name: -math.prod(new[name]))[:3]
            raise ValueError(
                f"The state does not fit optimizer '{self._optimizer.name}': it would add "
                f"{elements} numbers to those of a model that has {of_model}. Received: "
                f"{', '.join(f'{name!r} of shape {new[name]}' for name in largest)}. None of its "
                "own variables was changed. If they are yours, call `add_weight` or `add_slot` "
                "before loading."
            )

    def refuse_dtypes(self, dtypes: Mapping[str, Any]) -> None:
        """Refuse a file that would add a weight of a dtype that this backend does not have."""
        for name in dtypes.keys() - self.by_name.keys():
            if not name.startswith(WEIGHT):
                continue
            try:
                keras.ops.zeros((), _dtype_here(dtypes[name]))
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"The state does not fit optimizer '{self._optimizer.name}': it would add a "
                    f"weight {name!r} of dtype {dtypes[name]}, which the backend "
                    f"{keras.backend.backend()} does not have. None of its own variables was "
                    "changed."
                ) from error

    def add_what_is_stored(self, stored: Mapping[str, Any]) -> None:
        """Make the added variables that are only in the file. Warn of those that are only here."""
        for name in stored.keys() - self.by_name.keys():
            if slot := SLOT_NAME.fullmatch(name):
                self.add_slot(int(slot[2]), slot[1])
            else:
                array = stored[name]
                dtype = _dtype_here(array.dtype)
                self.add_weight(name.removeprefix(WEIGHT), array.shape, dtype=dtype)
        if missing := sorted(self.by_name.keys() - stored.keys()):
            warnings.warn(
                f"The file has no values for the variables {missing} that were added to "
                f"'{self._optimizer.name}': they keep those they have.",
                stacklevel=3,
            )

    def _beside(
        self,
        variable: Any,
        name: str,
        dtype: str,
        initializer: Any = "zeros",
        rows: int | None = None,
    ) -> Any:
        full_name, layout = f"{name}{self._suffix()}", _backend.layout_of_ring
        return _keras_internals.add_variable_like(
            self._optimizer, variable, full_name, dtype, initializer, rows, layout
        )

    def _suffix(self) -> str:
        """The end of a variable's name, which differs between nested wrappers."""
        depth = nesting.depth(self._optimizer)
        return f"_{depth}" if depth > 1 else ""

    def _keep(self, name: str, variable: Any) -> None:
        # The order must not depend on when a variable was added. Then an optimizer that got its
        # variables from a file lists them like one to which users added them.
        own = self.by_name | {name: variable}
        self.by_name = {name: own[name] for name in sorted(own, key=_place)}


def _rows(store: str, first: Any) -> int | None:
    """The number of rows that `stores()` asks for. None if it does not ask for a ring."""
    if first in ("zeros", "variable"):
        return None
    if isinstance(first, int) and not isinstance(first, bool) and 0 < first < LONGEST_RING:
        return first
    raise ValueError(
        f'The store {store!r} must begin with "variable" or "zeros", or be a ring with an integer '
        f"number of rows in [1, {LONGEST_RING - 1}]. Received from `stores()`: {first!r}."
    )


def _place(name: str) -> tuple[Any, ...]:
    if slot := SLOT_NAME.fullmatch(name):
        return 1, slot[1], int(slot[2])
    return (2, name) if name.startswith(WEIGHT) else (0,)  # those with 0 keep their order


def _copying(initializer: Any) -> Callable:
    """An initializer that copies its values: users may pass `lambda shape, dtype: var.value`."""
    initial = keras.initializers.get(initializer)
    return lambda shape, dtype=None: _backend.copy(initial(shape, dtype=dtype))


def _dtype_here(dtype: Any) -> str:
    # A file from another backend may have a 64-bit dtype that JAX does not support here.
    name = keras.backend.standardize_dtype(dtype)
    return name if _backend.widest_float() == "float64" else name.replace("64", "32")
