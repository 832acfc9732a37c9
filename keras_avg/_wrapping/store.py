"""Stores hold what a rule keeps beside the model's variables. Rules change them by methods."""

from collections.abc import Callable, Sequence
from typing import Any

from keras_avg import _backend

# One more than the copies of the model in a ring: a config of a few bytes could ask for billions.
LONGEST_RING = 1001


class Store:
    """One kept variable beside each averaged variable of the model.

    A method changes all kept variables at once, if its condition is true. All methods work inside
    compiled code, under strategies and on sharded variables. For low-precision variables a store
    holds float32 or wider. It is saved by its name.

    Args:
        kept: List of variables, one for each of `variables`, with the same shapes.
        variables: List of the model's variables.
    """

    def __init__(self, kept: Sequence[Any], variables: Sequence[Any]) -> None:
        self.kept = list(kept)
        self.variables = list(variables)

    def values(self) -> list[Any]:
        """The kept values, as tensors."""
        return [_backend.value(variable) for variable in self.kept]

    def lerp_if(self, condition: Any, weight: Callable[[], Any]) -> None:
        """Move towards the variables: `kept <- kept + weight() * (variable - kept)`.

        Args:
            condition: Bool, or a scalar tensor. If it is false, nothing changes.
            weight: Function without arguments. It returns a float or a scalar tensor, and is called
                only if needed. Weight 1 gives the variables bit for bit.
        """
        _backend.lerp_if(condition, self.kept, self.variables, weight)

    def assign_if(self, condition: Any, new_value: Callable[..., Any], *others: "Store") -> None:
        """Compute new values: `kept <- new_value(kept, variable, *others)`.

        Args:
            condition: Bool, or a scalar tensor. If it is false, nothing changes.
            new_value: Function that is called once for each variable. It takes tensors: the kept
                value, the variable, and the value that each of `others` keeps beside the same
                variable. All have the dtype of the kept value. It returns a tensor of their shape.
            *others: Further stores of the same rule.
        """
        sources = [self.variables, *(other.kept for other in others)]

        def new_values(targets: Sequence[Any], flat: Sequence[Any]) -> list[Any]:
            count = len(targets)
            columns = [flat[i * count : (i + 1) * count] for i in range(len(sources))]
            return [
                new_value(_backend.value(t), *(_backend.value(s, t.dtype) for s in row))
                for t, row in zip(targets, zip(*columns, strict=True), strict=True)
            ]

        _backend.assign_if(condition, self.kept, [v for s in sources for v in s], new_values)

    def flow_back_if(self, condition: Any) -> None:
        """Assign the kept values to the variables."""
        _backend.assign_if(condition, self.variables, self.kept, _copies)

    def show_if(self, condition: Any, value: Callable[..., Any], *others: "Store") -> None:
        """Compute the variables from the kept values: `variable <- value(kept, *others)`.

        Args:
            condition: Bool, or a scalar tensor. If it is false, nothing changes.
            value: Function that is called once for each variable. It takes the kept tensors, in
                their dtypes, and returns a tensor of their shape.
            *others: Further stores of the same rule.
        """
        sources = [self.kept, *(other.kept for other in others)]

        def new_values(targets: Sequence[Any], flat: Sequence[Any]) -> list[Any]:
            count = len(targets)
            columns = [flat[i * count : (i + 1) * count] for i in range(len(sources))]
            return [value(*map(_backend.value, row)) for row in zip(*columns, strict=True)]

        _backend.assign_if(condition, self.variables, [v for s in sources for v in s], new_values)

    def copy_from(self, other: "Store") -> None:
        """Copy the values of another store into this one. For use outside compiled code."""
        for target, source in zip(self.kept, other.kept, strict=True):
            target.assign(_backend.copy(source))

    def start(self, updates: Any) -> None:
        """Copy the variables' values if there was no update yet. It is called before the step."""
        _backend.start_averages(updates, self.kept, self.variables)


class Ring:
    """The last few values beside each averaged variable. A new value replaces the oldest one.

    Each kept variable has one row for each value. So a ring adds one array to a step, not one for
    each value. In a file, each row is an array of its own (see `rows_on_file`).

    Args:
        kept: List of variables, one for each of `variables`, with the shape
            `(number of values, *shape of the variable)`.
        variables: List of the model's variables.
    """

    def __init__(self, kept: Sequence[Any], variables: Sequence[Any]) -> None:
        self.kept = list(kept)
        self.variables = list(variables)

    def __len__(self) -> int:
        """The number of values that are kept beside each variable."""
        return self.kept[0].shape[0] if self.kept else 0

    def values(self) -> list[Any]:
        """The kept values, as tensors. Each has one row for each value, zeros before the first."""
        return [_backend.value(variable) for variable in self.kept]

    def put_if(
        self, condition: Any, count: Any, new_value: Callable[..., Any], *others: Store
    ) -> None:
        """Replace the oldest value by a new one.

        Args:
            condition: Bool, or a scalar tensor. If it is false, nothing changes.
            count: Integer, or an integer scalar. How many values were put before. The new value
                goes into row `count % len(self)`.
            new_value: Function that is called once for each variable. It takes tensors: the
                variable, and the value that each of `others` keeps beside it. All have the dtype of
                the kept value. It returns a tensor of the variable's shape.
            *others: Stores of the same rule.
        """
        sources = [self.variables, *(other.kept for other in others)]
        dtypes = [target.dtype for target in self.kept]

        def new_values(flat: Sequence[Any]) -> list[Any]:
            number = len(dtypes)
            columns = [flat[i * number : (i + 1) * number] for i in range(len(sources))]
            rows = zip(dtypes, zip(*columns, strict=True), strict=True)
            return [new_value(*(_backend.value(s, dtype) for s in row)) for dtype, row in rows]

        if self.kept:
            flat = [variable for source in sources for variable in source]
            _backend.put_if(condition, count % len(self), self.kept, flat, new_values)


def _copies(targets: Sequence[Any], sources: Sequence[Any]) -> list[Any]:
    return [_backend.copy(source) for source in sources]
