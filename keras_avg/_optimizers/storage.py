"""How a wrapper's state is listed, set, saved and loaded."""

import warnings
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_avg import _backend, _keras_internals
from keras_avg._optimizers import arguments
from keras_avg._optimizers.raw_values import RAW, STATISTIC, SWAPPED, RawValues

AVERAGE = "average_"  # what the names of averages in a file begin with
ADDED = ("slot_", "weight_")  # and those of variables that users added
LOW_PRECISION = ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")


class StoresOwnVariables:
    """State: own variables, then the inner optimizer's. In a file each stands once.

    Keras walks into `inner_optimizer` by itself when it saves, so a wrapper writes only what is its
    own, under names: a file of another optimizer is then never mistaken for a wrapper's.
    """

    inner_optimizer: Any
    built: bool
    name: str
    average_dtype: str | None
    add_variable: Callable[..., Any]
    averages_in_model: bool
    _own_variables: dict[str, Any]
    _raw_or_refuse: Callable[[], RawValues]
    _hold: Callable[[RawValues | None], None]
    _notice_restored_state: Callable[[], None]
    _refuse_training_meanwhile: Callable[..., None]
    _averages_and_variables: Callable[[], tuple[list[Any], list[Any]]]
    _expected_in_file: Callable[[Mapping[str, Any]], dict[str, Any]]
    _add_what_is_stored: Callable[[Mapping[str, Any]], None]

    def _add_own_variables(self, variables: list[Any]) -> None:
        """Three numbers, and an average for each variable: zeros until the averages start.

        An initializer that reads the variable would fail where TensorFlow creates both in the first
        trace of a `tf.function`, and weights loaded later would not count.
        """
        numbers = {n: self._add_counter(n) for n in ("updates", "snapshots", "averages_in_model")}
        self._updates, self._snapshots, self._swapped = map(_backend.Counter, numbers.values())
        self._averages = [self._add_average(variable) for variable in variables]
        averages = {f"{AVERAGE}{i}": a for i, a in enumerate(self._averages) if a is not None}
        self._own_variables = numbers | averages | self._own_variables  # weights added before

    def _add_counter(self, name: str) -> Any:
        # The innermost optimizer's name is unique in a program (Keras numbers it), the depth makes
        # it so among nested wrappers: Keras' state trees want every path once.
        return self.add_variable(
            shape=(),
            dtype="int",
            aggregation="only_first_replica",
            name=f"{arguments.innermost(self).name}_{name}{depth_suffix(self)}",
        )

    def _add_average(self, variable: Any) -> Any:
        if not _keras_internals.is_averageable(variable):
            return None
        dtype = keras.backend.standardize_dtype(variable.dtype)
        dtype = self.average_dtype or ("float32" if dtype in LOW_PRECISION else dtype)
        name = f"average{depth_suffix(self)}"
        return _keras_internals.add_variable_like(self, variable, name, dtype)

    @property
    def variables(self) -> list[Any]:
        """Own variables (three numbers, the averages, added ones), then the inner optimizer's."""
        self._notice_restored_state()  # JAX' trainer asks for them before it takes the values away
        return [*self._own_variables.values(), *self.inner_optimizer.variables]

    @property
    def weights(self) -> list[Any]:
        """The name `variables` had in Keras 2."""
        return self.variables

    def get_weights(self) -> list[np.ndarray]:
        """The values of `variables` as NumPy arrays, one to one."""
        check_attached(self.variables)
        return [ops.convert_to_numpy(variable) for variable in self.variables]

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Set `variables` from a list of arrays as `get_weights` gives it, all or none.

        Raises:
            ValueError: If the optimizer has not been built, or the number or a shape of the arrays
                is not that of the variables.
        """
        if not self.built:
            raise ValueError(
                f"You are calling `set_weights()` on '{self.name}', which has no variables to "
                "set before it is built. Call `optimizer.build(model.trainable_variables)`, or "
                "take a first step."
            )
        check_attached(self.variables)
        variables = {str(i): variable for i, variable in enumerate(self.variables)}
        values = {str(i): weight for i, weight in enumerate(weights)}
        _check_fit(self.name, variables, values)
        _assign(variables, values)
        if not self.averages_in_model:
            self._hold(None)

    def save_own_variables(self, store: MutableMapping[str, Any]) -> None:
        """Write the wrapper's own variables, and the raw values if the averages are in the model.

        Keras writes the inner optimizer's.

        Raises:
            RuntimeError: If the raw values should be there and are not, or if they and the rest
                of the state are of different updates.
        """
        raw: dict[str, Any] = {}
        if self.averages_in_model:
            self._refuse_training_meanwhile(even_if_told=True)
            raw = self._raw_or_refuse().arrays()
        check_attached(self._own_variables.values())
        for name, variable in self._own_variables.items():
            store[name] = variable.numpy()
        for name, array in raw.items():
            store[name] = array

    def load_own_variables(self, store: Mapping[str, Any]) -> None:
        """Read the wrapper's own variables, all or none.

        Raises:
            ValueError: If the stored state is not one of a wrapper like this one.
        """
        if not self.built:
            warnings.warn(
                f"Skipping variable loading for optimizer '{self.name}', because it has not been "
                f"built yet, whereas the saved one has {len(store.keys())} variables of its own. "
                "Call `optimizer.build(model.trainable_variables)` before loading.",
                stacklevel=2,
            )
            return
        check_attached(self.variables)
        stored = {name: store[name][...] for name in store.keys()}  # noqa: SIM118 (no `__iter__`)
        raw = {name: stored.pop(name) for name in list(stored) if name.startswith((RAW, SWAPPED))}
        _check_fit(self.name, self._expected_in_file(stored), stored)
        held = self._raw_values_from(raw) if raw else None
        if held:
            self._bind_statistics(held)
        self._add_what_is_stored(stored)
        _assign({name: self._own_variables[name] for name in stored}, stored)
        self._hold(held)

    def _raw_values_from(self, stored: dict[str, Any]) -> RawValues:
        _, variables = self._averages_and_variables()
        updates = stored.pop(SWAPPED)
        names = [name for name in stored if name.startswith(STATISTIC)]
        statistics = {int(name.removeprefix(STATISTIC)): stored.pop(name) for name in names}
        _check_fit(self.name, {f"{RAW}{i}": v for i, v in enumerate(variables)}, stored)
        tensors = [
            ops.convert_to_tensor(stored[f"{RAW}{i}"], v.dtype) for i, v in enumerate(variables)
        ]
        return RawValues(variables, tensors, int(updates), statistics)

    def _bind_statistics(self, raw: RawValues) -> None:
        for model in _keras_internals.models_being_loaded():
            if any(_keras_internals.variable_index(self, v) is not None for v in model.variables):
                raw.bind_statistics(model)
                return


def depth_suffix(wrapper: Any) -> str:
    """What tells the variables of nested wrappers apart."""
    depth = _depth(wrapper)
    return f"_{depth}" if depth > 1 else ""


def _depth(optimizer: Any) -> int:
    """How many wrappers deep: 0 for an optimizer that wraps nothing."""
    if hasattr(optimizer, "inner_optimizer"):
        return 1 + _depth(optimizer.inner_optimizer)
    return max(map(_depth, getattr(optimizer, "optimizers", ())), default=0)


def check_attached(variables: Any) -> None:
    """Raise if the JAX trainer holds the values of variables at the moment."""
    if any(_keras_internals.is_purged(variable) for variable in variables):
        raise RuntimeError(
            "During `fit` on JAX the variables' values live in the train step, not in the "
            "variables. Call `model.jax_state_sync()` first."
        )


def _check_fit(name: str, variables: dict[str, Any], values: dict[str, Any]) -> None:
    def refuse(difference: str) -> None:
        raise ValueError(
            f"The state does not fit optimizer '{name}': {difference} Nothing was changed. To "
            "start from another optimizer's file, load it with `skip_mismatch=True`."
        )

    if len(values) != len(variables):
        refuse(f"it has {len(variables)} variables. Received: {len(values)} variables.")
    for key, variable in variables.items():
        if key not in values:
            refuse(f"it has a variable '{key}'. Received: {sorted(values)}.")
        shape = tuple(np.shape(values[key]))
        if shape != tuple(variable.shape):
            refuse(
                f"its variable '{variable.path}' has shape {tuple(variable.shape)}. "
                f"Received: shape {shape}."
            )


def _assign(variables: dict[str, Any], values: dict[str, Any]) -> None:
    for key, variable in variables.items():
        variable.assign(_backend.copy(ops.convert_to_tensor(values[key], variable.dtype)))
