"""What a wrapper writes into a model's file, and how it reads it back, all or none."""

import warnings
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

from keras import ops

from keras_avg import _keras_internals
from keras_avg._optimizers import belonging, bindings, fitting, nesting
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
    _refuse_growth: Callable[[Mapping[str, Any]], None]
    _add_what_is_stored: Callable[[Mapping[str, Any]], None]

    _why_without_averages = ""  # what became of the averages that a file should have had
    _refused_store: Any = None  # weakly, the file that was refused last
    _refused_because = ""

    def save_own_variables(self, store: MutableMapping[str, Any]) -> None:
        """Write the wrapper's own variables, and the raw values if the averages are in the model.

        Keras writes the inner optimizer's. Averages that would not fit the saved model are left
        out, and the file says why: if the model's variables were replaced (as by `quantize`), or if
        a layer stores something else than its variables (as LoRA, merged into the kernel).

        Raises:
            RuntimeError: If the raw values should be there and are not, or if they and the rest
                of the state are of different updates.
        """
        model = bindings.model_on_file(self)
        raw: dict[str, Any] = {}
        if self.averages_in_model and not self._why_without_averages:
            self._refuse_training_meanwhile(even_if_told=True)
            raw = self._raw_or_refuse().arrays(model, self._ranks_of_gone(model))
        check_attached(self._own_variables.values())
        if not self._own_variables:
            return
        labels, gone = belonging.labels(self, model), belonging.gone_from(self, model)
        if self.averages_in_model and self._why_without_averages:
            labels = labels._replace(why_none=self._why_without_averages)
        paths = [belonging.path_of(v) for v in _keras_internals.built_variables(self)]
        for name, variable in self._own_variables.items():
            number = belonging.number_of(name)
            if labels.why_none:
                if name in belonging.COUNTERS:
                    is_kept = name == "averages_in_model" and labels.why_none == "merged"
                    store[name] = variable.numpy() * is_kept
            elif number not in gone:
                store[name] = variable.numpy()
                if number is not None:
                    _keras_internals.set_attributes(store, name, {"path": paths[number]})
            if name == belonging.COUNTERS[0]:
                _keras_internals.set_attributes(store, name, labels.attributes())
        for name, array in raw.items() if not labels.why_none else ():
            store[name] = array

    def load_own_variables(self, store: Mapping[str, Any]) -> None:
        """Read the wrapper's own variables, all or none.

        The file's index is checked first: nothing is read of what does not fit.

        Raises:
            ValueError: If the stored state is not one of a wrapper like this one.
        """
        check_attached(self.variables)
        index = _keras_internals.index_of(store)
        if not index:  # written before the optimizer was built; or Keras' second visit
            self._refuse_again(store)
            if self.built:
                self._refuse_while_in_model("loading a state without raw weights")
            return
        if not self.built:
            for part in nesting.walk(self.inner_optimizer):  # or half a state would arrive
                _keras_internals.skip_next_load(part, store)
            warnings.warn(
                f"Skipping variable loading for optimizer '{self.name}', because it has not been "
                f"built yet, whereas the saved one has {len(index)} variables of its own. "
                "Call `optimizer.build(model.trainable_variables)` before loading.",
                stacklevel=2,
            )
            return
        self._refused_store = None
        try:
            self._load(store, index)
        except ValueError as error:
            self._refused_store, self._refused_because = _keras_internals.weakly(store), str(error)
            raise

    def _load(self, store: Mapping[str, Any], index: dict[str, Any]) -> None:
        labels = belonging.read(index)
        if labels.why_none:
            self._start_without_averages(labels.why_none, store, index)
            return
        names = self._checked_names(labels, index)
        if names is None:
            self._warn_of_dropped("All averages")
            return
        self._check_parts_fit(store)

        stored = {here: store[there][...] for there, here in names.items()}
        raw = {n: stored.pop(n) for n in list(stored) if n.startswith((RAW, SWAPPED))}
        fitting.check_numbers(self.name, self._expected_in_file(stored), stored)
        held = self._raw_values_from(raw) if raw else None
        if held:
            self._bind_statistics(held)
        self._add_what_is_stored(stored)
        fitting.assign({name: self._own_variables[name] for name in stored}, stored)
        self._hold(held)
        self._why_without_averages = ""
        if labels.gone:
            self._warn_of_dropped(f"The averages of {list(labels.gone)}")

    def _checked_names(self, labels: Any, index: dict[str, Any]) -> dict[str, str] | None:
        """For each name in the file what it is called here, if shapes fit.

        Returns:
            A dict; None if they need not fit, because the file is of other variables.

        Raises:
            ValueError: If they do not fit.
        """
        names = belonging.names_here(self, index, by_path_only=labels.may_not_fit)
        if names is None and labels.may_not_fit:
            return None
        if names is None:  # what is wrong is found below
            names = {name: name for name in index}
        here = {names[name]: entry for name, entry in index.items()}
        raw = {name: here.pop(name) for name in list(here) if name.startswith((RAW, SWAPPED))}
        self._refuse_growth(here)
        fitting.check_fit(self.name, self._expected_in_file(here), here)
        if raw:
            self._check_raw_values(raw)
        return names

    def _start_without_averages(self, why: str, store: Any, index: dict[str, Any]) -> None:
        """Go on without the averages that are not in the file: as if there had been no snapshot."""
        counters = {name: self._own_variables[name] for name in belonging.COUNTERS}
        fitting.check_fit(self.name, counters, index)
        stored = {name: store[name][...] for name in counters}
        fitting.check_numbers(self.name, counters, stored)
        fitting.assign(counters, stored)
        self._hold(None)
        self._why_without_averages = why
        if why == "replaced":
            self._warn_of_dropped("All averages")

    def _warn_of_dropped(self, what: str) -> None:
        warnings.warn(
            f"The file of '{self.name}' was written when the optimizer's variables were no longer "
            f"those that the model trains. {what} are dropped: they belong to no variable any "
            "more.",
            stacklevel=5,
        )

    def _without_averages(self) -> str:
        """Why there are none, if a file should have had them; for messages."""
        why = belonging.WHY.get(self._why_without_averages)
        return f" The file has no averages, because {why}" if why else ""

    def _ranks_of_gone(self, model: Any) -> list[int]:
        """Where variables that the model no longer has stand among those with an average."""
        gone = belonging.gone_from(self, model)
        return [rank for rank, i in enumerate(belonging.averaged(self)) if i in gone]

    def _refuse_again(self, store: Any) -> None:
        """Keras visits members of a `MultiOptimizer` twice, and takes the second visit's word."""
        if self._refused_store is not None and self._refused_store() is store:
            self._refused_store = None
            raise ValueError(self._refused_because)

    def _check_raw_values(self, index: Mapping[str, Any]) -> None:
        statistics = {n: entry for n, entry in index.items() if n.startswith(STATISTIC)}
        fitting.check_fit(self.name, self._raw_variables(), _without(index, statistics))
        model = bindings.model_on_file(self)
        if model is None:
            self._refuse_growth(statistics)
            return
        for name, entry in statistics.items():
            of_place = dict(zip([name], model.variables[_place(name) :], strict=False))
            fitting.check_fit(self.name, of_place, {name: entry})

    def _raw_variables(self) -> dict[str, Any]:
        """The variables whose raw values a file holds, by name, and the counter beside them."""
        _, variables = self._averages_and_variables()
        raw = {f"{RAW}{i}": variable for i, variable in enumerate(variables)}
        return raw | {SWAPPED: self._own_variables["updates"]}

    def _raw_values_from(self, stored: dict[str, Any]) -> RawValues:
        statistics = {n: value for n, value in stored.items() if n.startswith(STATISTIC)}
        variables, values = self._raw_variables(), _without(stored, statistics)
        fitting.check_numbers(self.name, variables, values)
        del variables[SWAPPED]
        return RawValues(
            list(variables.values()),
            [ops.convert_to_tensor(values[n], v.dtype) for n, v in variables.items()],
            int(values[SWAPPED]),
            {_place(name): value for name, value in statistics.items()},
        )

    def _check_parts_fit(self, store: Any) -> None:
        """Refuse the file before anything is taken from it if it is of other optimizers."""
        for name in ("inner_optimizer", "outer_optimizer"):
            part = getattr(self, name, None)
            with _keras_internals.inside(store, name) as stored:
                if stored is not None:
                    self._check_part_fits(part, stored)

    def _check_part_fits(self, part: Any, store: Any) -> None:
        index = _keras_internals.index_of(store)
        if isinstance(part, StoredInFiles):
            labels = belonging.read(index)
            if not labels.why_none:
                part._checked_names(labels, index)
                part._check_parts_fit(store)
        elif part is None or _keras_internals.is_stored_by_number(part):
            variables = part.variables if part is not None else []
            numbered = {str(i): variable for i, variable in enumerate(variables)}
            fitting.check_fit(getattr(part, "name", self.name), numbered, index)

    def _bind_statistics(self, raw: RawValues) -> None:
        if (model := bindings.model_on_file(self)) is not None:
            raw.bind_statistics(model)


def _without(all_entries: Mapping[str, Any], some: Mapping[str, Any]) -> dict[str, Any]:
    return {name: entry for name, entry in all_entries.items() if name not in some}


def _place(statistic: str) -> int:
    return int(statistic.removeprefix(STATISTIC))
