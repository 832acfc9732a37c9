"""What a wrapper writes into a model's file, and how it reads it back, all or none."""

import warnings
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

from keras import ops

from keras_avg import _keras_internals
from keras_avg._optimizers import fitting
from keras_avg._optimizers.raw_values import RAW, STATISTIC, SWAPPED, RawValues
from keras_avg._optimizers.storage import check_attached


class StoredInFiles:
    """Each variable stands in a file once.

    Keras walks into `inner_optimizer` by itself when it saves, so a wrapper writes only what is its
    own, under names: a file of another optimizer is then never mistaken for a wrapper's.
    """

    inner_optimizer: Any
    built: bool
    name: str
    variables: list[Any]
    averages_in_model: bool
    _own_variables: dict[str, Any]
    _raw_or_refuse: Callable[[], RawValues]
    _hold: Callable[[RawValues | None], None]
    _refuse_training_meanwhile: Callable[..., None]
    _refuse_while_in_model: Callable[[str], None]
    _averages_and_variables: Callable[[], tuple[list[Any], list[Any]]]
    _expected_in_file: Callable[[Mapping[str, Any]], dict[str, Any]]
    _add_what_is_stored: Callable[[Mapping[str, Any]], None]

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
        check_attached(self.variables)
        if not store.keys():  # written before the optimizer was built
            if self.built:
                self._refuse_while_in_model("loading a state without raw weights")
            return
        if not self.built:
            warnings.warn(
                f"Skipping variable loading for optimizer '{self.name}', because it has not been "
                f"built yet, whereas the saved one has {len(store.keys())} variables of its own. "
                "Call `optimizer.build(model.trainable_variables)` before loading.",
                stacklevel=2,
            )
            return
        stored = {name: store[name][...] for name in store.keys()}  # noqa: SIM118 (no `__iter__`)
        raw = {name: stored.pop(name) for name in list(stored) if name.startswith((RAW, SWAPPED))}
        expected = self._expected_in_file(stored)
        fitting.check_fit(self.name, expected, stored)
        fitting.check_numbers(self.name, expected, stored)
        self._check_parts_fit(store)
        held = self._raw_values_from(raw) if raw else None
        if held:
            self._bind_statistics(held)
        self._add_what_is_stored(stored)
        fitting.assign({name: self._own_variables[name] for name in stored}, stored)
        self._hold(held)

    def _raw_values_from(self, stored: dict[str, Any]) -> RawValues:
        _, variables = self._averages_and_variables()
        names = [name for name in stored if name.startswith(STATISTIC)]
        statistics = {int(name.removeprefix(STATISTIC)): stored.pop(name) for name in names}
        raw = {f"{RAW}{i}": variable for i, variable in enumerate(variables)}
        expected = raw | {SWAPPED: self._own_variables["updates"]}
        fitting.check_fit(self.name, expected, stored)
        fitting.check_numbers(self.name, expected, stored)
        tensors = [ops.convert_to_tensor(stored[name], v.dtype) for name, v in raw.items()]
        return RawValues(variables, tensors, int(stored[SWAPPED]), statistics)

    def _check_parts_fit(self, store: Any, path: str = "") -> None:
        """Refuse the file before anything is taken from it if it is of other optimizers."""
        for name in ("inner_optimizer", "outer_optimizer"):
            part = getattr(self, name, None)
            stored = _keras_internals.stored_inside(store, f"{path}{name}")
            if stored is None:
                continue
            if isinstance(part, StoredInFiles):
                own = {n: stored[n] for n in stored if not n.startswith((RAW, SWAPPED))}
                fitting.check_fit(part.name, part._expected_in_file(own), own)
                part._check_parts_fit(store, f"{path}{name}/")
            elif part is None or _keras_internals.is_stored_by_number(part):
                variables = part.variables if part is not None else []
                numbered = {str(i): variable for i, variable in enumerate(variables)}
                fitting.check_fit(getattr(part, "name", self.name), numbered, stored)

    def _bind_statistics(self, raw: RawValues) -> None:
        for model in _keras_internals.models_being_loaded():
            if any(_keras_internals.variable_index(self, v) is not None for v in model.variables):
                raw.bind_statistics(model)
                return
