"""Writes a wrapper's state into a model's file, and reads it back completely or not at all."""

import warnings
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

from keras_avg import _keras_internals
from keras_avg._wrapping import belonging, bindings, fitting, nesting, rows_on_file
from keras_avg._wrapping.own_variables import OwnVariables
from keras_avg._wrapping.raw_values import RAW, STATISTIC, STATISTIC_NAME, SWAPPED, RawValues
from keras_avg._wrapping.swap import Swap


class StateFile:
    """A wrapper's part of a file. It has each of the wrapper's own variables once, with a name.

    Keras saves `inner_optimizer` by itself, so a wrapper writes only its own variables. Keras
    numbers the variables of other optimizers. Because a wrapper's variables have names, the file of
    another optimizer can never look like a wrapper's.

    Args:
        optimizer: The wrapper.
        own: Its own variables.
        parts: Function without arguments. It returns a dict of the optimizers that Keras saves
            inside the wrapper, by the names of the attributes that hold them.
    """

    def __init__(
        self, optimizer: Any, own: OwnVariables, parts: Callable[[], dict[str, Any]]
    ) -> None:
        self._optimizer = optimizer
        self._own = own
        self._parts = parts
        self._why_none = ""  # why the last loaded file had no averages
        self._refused_store: Any = None  # a weak reference to the file that was refused last
        self._refused_because = ""

    def save(self, store: MutableMapping[str, Any], swap: Swap) -> None:
        """Write the state. If the raw values are not in the model, write them too."""
        model = bindings.model_on_file(self._optimizer)
        averaged = self._averaged()
        gone = belonging.gone_from(self._optimizer, averaged, model)
        labels = belonging.labels(self._optimizer, averaged, model)
        if swap.is_in() and self._why_none:  # The raw values were not in the loaded file.
            labels = labels._replace(why_none=self._why_none)
        raw = {}
        if swap.is_in() and not labels.why_none:
            swap.refuse_training_meanwhile(even_if_told=True)
            ranks = [rank for rank, i in enumerate(averaged) if i in gone]
            raw = swap.raw_or_refuse().arrays(model, ranks)
        self._write(store, labels, gone)
        for name, array in raw.items():
            store[name] = array

    def _write(self, store: MutableMapping[str, Any], labels: Any, gone: list[int]) -> None:
        paths = list(map(_keras_internals.path_of, self._built()))
        for name, variable in self._own.by_name.items():
            found = belonging.numbered(name, self._own.stores)
            if labels.why_none:
                if name in belonging.COUNTERS:
                    is_kept = name == "averages_in_model" and labels.why_none == "merged"
                    store[name] = variable.numpy() * is_kept
            elif found is None or found[1] not in gone:
                for part, array in rows_on_file.written(name, variable.numpy(), self._own.rings):
                    store[part] = array
                    if found is not None:
                        _keras_internals.set_attributes(store, part, {"path": paths[found[1]]})
            if name == belonging.COUNTERS[0]:
                _keras_internals.set_attributes(store, name, labels.attributes())

    def load(self, store: Mapping[str, Any], swap: Swap | None) -> None:
        """Read the state. `swap` is None if the wrapper is not built."""
        try:
            self._load_if_there(store, swap)
        except Exception:
            self._leave_parts_as_they_are(store)
            raise

    def _load_if_there(self, store: Mapping[str, Any], swap: Swap | None) -> None:
        index = self._index_of(store)
        # A file is empty if the optimizer was not built when it was saved. A store is also empty
        # when Keras loads the same file a second time.
        if not index:
            self._refuse_again(store)
            if swap is not None:
                swap.refuse_while_in("loading a state without raw weights")
            return
        if swap is None:
            self._skip(store, len(index))
            return
        self._refused_store = None
        try:
            self._load(store, index, swap)
        except ValueError as error:
            self._refused_store, self._refused_because = _keras_internals.weakly(store), str(error)
            raise

    def check(self, store: Mapping[str, Any], swap: Swap | None) -> None:
        """Refuse a file that does not fit. Only its index and its counters are read."""
        index = self._index_of(store)
        labels = belonging.read(index)
        if swap is None:
            return
        if labels.why_none:
            self._counters_in(store, index)
            return
        names = self._checked_names(labels, index, swap)
        self._check_parts(store)
        if names is not None:
            self._check_counts(store, names, swap)

    def why_without_averages(self) -> str:
        """A sentence for messages that says why the loaded file has no averages, or ""."""
        why = belonging.WHY.get(self._why_none)
        return f" The file has no averages, because {why}" if why else ""

    def _load(self, store: Mapping[str, Any], index: dict[str, Any], swap: Swap) -> None:
        labels = belonging.read(index)
        if labels.why_none:
            self._start_without_averages(labels.why_none, store, index, swap)
            return
        names = self._checked_names(labels, index, swap)
        if names is None:
            self._warn_of_dropped("All averages")
            return
        self._check_parts(store)

        stored = {
            here: rows_on_file.read(store, there, index[there]) for there, here in names.items()
        }
        raw = {n: stored.pop(n) for n in list(stored) if n.startswith((RAW, SWAPPED))}
        fitting.check_numbers(self._optimizer.name, self._own.expected_in(stored), stored)
        held = self._raw_values_from(raw, swap) if raw else None
        if held and (model := bindings.model_on_file(self._optimizer)) is not None:
            held.bind_statistics(model)
            bindings.note_loaded_model(self._optimizer, model)
        self._own.add_what_is_stored(stored)
        fitting.assign({name: self._own.by_name[name] for name in stored}, stored)
        swap.hold(held)
        self._why_none = swap.why_raw_values_are_lost = ""
        if labels.gone:
            self._warn_of_dropped(f"The averages of {list(labels.gone)}")

    def _checked_names(
        self, labels: Any, index: dict[str, Any], swap: Swap
    ) -> dict[str, str] | None:
        """The name here for each name in the file. The shapes are checked.

        Returns:
            A dict. None if the averages do not fit and the file says that this may happen.

        Raises:
            ValueError: If the averages do not fit for another reason.
        """
        names = belonging.names_here(
            self._optimizer, self._averaged(), self._own.stores, index, labels.may_not_fit
        )
        if names is None and labels.may_not_fit:
            return None
        if names is None:  # `check_fit` below finds the difference, and says it.
            names = {name: name for name in index}
        here = {names[name]: entry for name, entry in index.items()}
        raw = {name: here.pop(name) for name in list(here) if name.startswith((RAW, SWAPPED))}
        self._own.refuse_growth({name: entry.shape for name, entry in here.items()})
        expected = self._own.expected_in(here)
        fitting.check_fit(self._optimizer.name, expected, here)
        fitting.check_dtypes(self._optimizer.name, expected, here)
        self._own.refuse_dtypes({name: entry.dtype for name, entry in here.items()})
        if raw:
            self._check_raw_values(raw, swap)
        return names

    def _start_without_averages(
        self, why: str, store: Any, index: dict[str, Any], swap: Swap
    ) -> None:
        """Load only the counters. Then the averages are as they were before the first snapshot."""
        stored = self._counters_in(store, index)
        fitting.assign({name: self._own.by_name[name] for name in stored}, stored)
        swap.hold(None)
        self._why_none = why
        swap.why_raw_values_are_lost = self.why_without_averages()
        if why == "replaced":
            self._warn_of_dropped("All averages")

    def _counters_in(self, store: Any, index: dict[str, Any]) -> dict[str, Any]:
        """The counters in a file that has nothing else, checked."""
        counters = {name: self._own.by_name[name] for name in belonging.COUNTERS}
        fitting.check_fit(self._optimizer.name, counters, index)
        fitting.check_dtypes(self._optimizer.name, counters, index)
        stored = {name: store[name][...] for name in counters}
        fitting.check_numbers(self._optimizer.name, counters, stored)
        return stored

    def _check_counts(self, store: Any, names: dict[str, str], swap: Swap) -> None:
        """Refuse impossible counts, such as NaN. Only integers are read. Their shapes fit."""
        known = self._own.by_name | self._raw_variables(swap)
        variables, values = {}, {}
        for there, here in names.items():
            if here in known and fitting.counts(known[here]):
                variables[here], values[here] = known[here], store[there][...]
        fitting.check_numbers(self._optimizer.name, variables, values)

    def _leave_parts_as_they_are(self, store: Any) -> None:
        """Make Keras skip the inner optimizers. Otherwise it loads them from the refused file."""
        for part in self._parts().values():
            for each in nesting.walk(part) if part is not None else ():
                _keras_internals.skip_next_load(each, store)

    def _skip(self, store: Any, number: int) -> None:
        # Otherwise the inner optimizer would load its state, and the wrapper would have none.
        self._leave_parts_as_they_are(store)
        warnings.warn(
            f"Skipping variable loading for optimizer '{self._optimizer.name}', because it has not "
            f"been built yet, whereas the saved one has {number} variables of its own. Call "
            "`optimizer.build(model.trainable_variables)` before loading.",
            stacklevel=4,
        )

    def _warn_of_dropped(self, what: str) -> None:
        warnings.warn(
            f"The file of '{self._optimizer.name}' was written when the optimizer's variables were "
            f"no longer those that the model trains. {what} are dropped: they belong to no "
            "variable any more.",
            stacklevel=5,
        )

    def _refuse_again(self, store: Any) -> None:
        """Raise the error of the first visit again if Keras loads the same file a second time.

        Keras loads the members of a `MultiOptimizer` twice, and only an error of the second time
        counts.
        """
        if self._refused_store is not None and self._refused_store() is store:
            self._refused_store = None
            raise ValueError(self._refused_because)

    def _check_raw_values(self, index: Mapping[str, Any], swap: Swap) -> None:
        name, variables = self._optimizer.name, self._raw_variables(swap)
        fitting.check_dtypes(name, variables, index)
        statistics = {n: entry for n, entry in index.items() if STATISTIC_NAME.fullmatch(n)}
        fitting.check_fit(name, variables, _without(index, statistics))
        model = bindings.model_on_file(self._optimizer)
        if model is None:
            self._own.refuse_growth({n: entry.shape for n, entry in statistics.items()})
            return
        for key, entry in statistics.items():
            of_place = dict(zip([key], model.variables[_place(key) :], strict=False))
            fitting.check_fit(name, of_place, {key: entry})

    def _raw_variables(self, swap: Swap) -> dict[str, Any]:
        """The variables whose raw values are in a file, and the counter of updates, by name."""
        raw = {f"{RAW}{i}": variable for i, variable in enumerate(swap.variables)}
        return raw | {SWAPPED: self._own.by_name["updates"]}

    def _raw_values_from(self, stored: dict[str, Any], swap: Swap) -> RawValues:
        statistics = {n: value for n, value in stored.items() if STATISTIC_NAME.fullmatch(n)}
        variables, values = self._raw_variables(swap), _without(stored, statistics)
        fitting.check_numbers(self._optimizer.name, variables, values)
        del variables[SWAPPED]
        return RawValues(
            list(variables.values()),
            [fitting.tensor(values[n], v) for n, v in variables.items()],
            int(values[SWAPPED]),
            {_place(name): value for name, value in statistics.items()},
        )

    def _check_parts(self, store: Any) -> None:
        """Refuse a file of other inner optimizers. This must happen before a value is loaded."""
        for attribute, part in self._parts().items():
            with _keras_internals.inside(store, attribute) as stored:
                if stored is not None:
                    self._check_part(part, stored)

    def _check_part(self, part: Any, store: Any) -> None:
        check = getattr(part, "check_file", None)  # Only wrappers have this method.
        if check is not None:
            check(store)
        elif part is None or _keras_internals.is_stored_by_number(part):
            variables = part.variables if part is not None else []
            numbered = {str(i): variable for i, variable in enumerate(variables)}
            name = getattr(part, "name", self._optimizer.name)
            index = _keras_internals.index_of(store)
            fitting.check_fit(name, numbered, index)
            fitting.check_dtypes(name, numbered, index)

    def _index_of(self, store: Any) -> dict[str, Any]:
        return rows_on_file.joined(_keras_internals.index_of(store), self._own.rings)

    def _averaged(self) -> list[int]:
        """The numbers of the variables that have an average."""
        numbers = range(len(self._built()))
        return [
            i
            for i in numbers
            if any(self._own.slots_of(i)[s] is not None for s in self._own.stores)
        ]

    def _built(self) -> list[Any]:
        return _keras_internals.built_variables(self._optimizer)


def _without(all_entries: Mapping[str, Any], some: Mapping[str, Any]) -> dict[str, Any]:
    return {name: entry for name, entry in all_entries.items() if name not in some}


def _place(statistic: str) -> int:
    return int(statistic.removeprefix(STATISTIC))
