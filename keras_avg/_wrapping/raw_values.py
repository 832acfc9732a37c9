"""Keeps the raw values while a model holds averages."""

import re
from collections.abc import Collection
from typing import Any

import numpy as np
from keras import ops

from keras_avg import _backend

# The beginnings of names in a file.
RAW = "raw_"
STATISTIC = "raw_statistic_"
STATISTIC_NAME = re.compile(rf"{STATISTIC}[0-9]{{5,9}}")
SWAPPED = "swapped_after"


class RawValues:
    """The raw values of variables that hold averages now. They are not part of `variables`.

    Args:
        variables: List of variables.
        tensors: List of their raw values.
        updates: Integer. The optimizer's `iterations` when the values were set aside.
        statistics: Dict of arrays, the batch-normalization statistics in a file. A key is the place
            of the statistic's variable in `model.variables`. The model itself may not be known yet.
    """

    def __init__(
        self,
        variables: list[Any],
        tensors: list[Any],
        updates: int,
        statistics: dict[int, Any] | None = None,
    ) -> None:
        self.variables = variables
        self.tensors = tensors
        self.updates = updates
        self.statistics = statistics or {}
        self.updates_told_of = updates  # `iterations` when the last error about it was raised
        # Updates of other wrappers over the same variables when the values were set aside.
        self.updates_of_others: dict[int, int] = {}
        self._places: list[int] = []  # the places of the bound statistics, in their order

    def add_statistics(self, model: Any, variables: list[Any]) -> None:
        """Set a model's batch-normalization statistics aside too, except those already aside."""
        self.bind_statistics(model)
        aside = {id(variable) for variable in self.variables}
        variables = [variable for variable in variables if id(variable) not in aside]
        places = {id(variable): place for place, variable in enumerate(model.variables)}
        self._add(
            [places[id(variable)] for variable in variables],
            variables,
            [_backend.copy(variable) for variable in variables],
        )

    def bind_statistics(self, model: Any) -> None:
        """Say which model the statistics from a file belong to.

        Raises:
            ValueError: If the model's variables at these places have other shapes.
        """
        of_model = model.variables
        for place, value in self.statistics.items():
            if place >= len(of_model) or tuple(of_model[place].shape) != np.shape(value):
                raise ValueError(
                    "The batch-normalization statistics of the raw weights do not fit the model: "
                    f"its variable {place} should have shape {np.shape(value)}. Received: "
                    f"{[v.path for v in of_model[place : place + 1]] or len(of_model)}."
                )
        variables = [of_model[place] for place in self.statistics]
        values = [
            ops.convert_to_tensor(value, variable.dtype)
            for value, variable in zip(self.statistics.values(), variables, strict=True)
        ]
        self._add(list(self.statistics), variables, values)
        self.statistics = {}

    def _add(self, places: list[int], variables: list[Any], tensors: list[Any]) -> None:
        self._places = self._places + places
        self.variables = self.variables + variables
        self.tensors = self.tensors + tensors

    def _places_in(self, model: Any) -> list[int | None]:
        places = {id(variable): place for place, variable in enumerate(model.variables)}
        return [places.get(id(variable)) for variable in self._statistics()]

    def put_back(self) -> None:
        _backend.assign_all(self.variables, self.tensors)

    def exchange(self) -> None:
        """Exchange the raw values and the values in the model, one variable at a time."""
        for i, variable in enumerate(self.variables):
            (held,) = _backend.set_aside([variable])
            variable.assign(self.tensors[i])
            self.tensors[i] = held

    def mark(self) -> list[Any]:
        """Copies of the statistics in the model whose raw values are set aside."""
        return [_backend.copy(variable) for variable in self._statistics()]

    def rewind(self, mark: list[Any]) -> None:
        """Put the statistics of a mark back into the model.

        Statistics that were set aside after the mark get their raw values back.
        """
        statistics = self._statistics()
        first = len(self.variables) - len(statistics) + len(mark)
        for variable, tensor in zip(self.variables[first:], self.tensors[first:], strict=True):
            variable.assign(tensor)
        for variable, value in zip(statistics, mark, strict=False):
            variable.assign(value)
        self.variables, self.tensors = self.variables[:first], self.tensors[:first]
        self._places = self._places[: len(mark)]

    def _statistics(self) -> list[Any]:
        return self.variables[len(self.variables) - len(self._places) :]

    def arrays(self, model: Any = None, without: Collection[int] = ()) -> dict[str, Any]:
        """The arrays for a file, by name.

        Args:
            model: The model that is saved. Its variables decide the places of statistics. If it is
                None, the places are those in the model for which the statistics were computed.
            without: The places of raw values to leave out, because the model no longer has their
                variables.
        """
        values = [ops.convert_to_numpy(tensor) for tensor in self.tensors]
        of_weights = len(values) - len(self._places)
        raw = [value for i, value in enumerate(values[:of_weights]) if i not in without]
        places = self._places if model is None else self._places_in(model)
        bound = {
            place: value
            for place, value in zip(places, values[of_weights:], strict=True)
            if place is not None  # None: the saved model does not have this statistic
        }
        return {
            SWAPPED: np.asarray(self.updates),
            **{f"{RAW}{i}": value for i, value in enumerate(raw)},
            **{f"{STATISTIC}{i:05}": value for i, value in (bound | self.statistics).items()},
        }
