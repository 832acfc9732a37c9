"""Where the raw values are while a model holds averages."""

from typing import Any

import numpy as np
from keras import ops

from keras_avg import _backend

# Names in a file.
RAW = "raw_"
STATISTIC = "raw_statistic_"
SWAPPED = "swapped_after"


class RawValues:
    """The raw values of variables that hold averages meanwhile: storage outside `variables`.

    Args:
        variables: List of variables.
        tensors: List of their raw values.
        updates: Integer. The optimizer's `iterations` when they were set aside.
        statistics: List of arrays: batch-normalization statistics from a file, whose variables are
            the model's and not yet known.
    """

    def __init__(
        self,
        variables: list[Any],
        tensors: list[Any],
        updates: int,
        statistics: list[Any] | None = None,
    ) -> None:
        self.variables = variables
        self.tensors = tensors
        self.updates = updates
        self.statistics = statistics or []
        self._number_of_averaged = len(variables)

    def add_statistics(self, variables: list[Any]) -> None:
        """Set the values of batch-normalization statistics aside too."""
        self.variables = self.variables + variables
        self.tensors = self.tensors + [_backend.copy(variable) for variable in variables]

    def bind_statistics(self, variables: list[Any]) -> None:
        """Say which variables the statistics from a file belong to, in order."""
        if self.statistics:
            pairs = zip(self.statistics, variables, strict=True)
            values = [ops.convert_to_tensor(value, v.dtype) for value, v in pairs]
            self.variables, self.tensors = self.variables + variables, self.tensors + values
            self.statistics = []

    def put_back(self) -> None:
        for variable, tensor in zip(self.variables, self.tensors, strict=True):
            variable.assign(tensor)

    def arrays(self) -> dict[str, Any]:
        """What goes into a file."""
        values = [ops.convert_to_numpy(tensor) for tensor in self.tensors]
        averaged, statistics = (
            values[: self._number_of_averaged],
            values[self._number_of_averaged :],
        )
        statistics += self.statistics
        return {
            SWAPPED: np.asarray(self.updates),
            **{f"{RAW}{i}": value for i, value in enumerate(averaged)},
            **{f"{STATISTIC}{i:05}": value for i, value in enumerate(statistics)},
        }
