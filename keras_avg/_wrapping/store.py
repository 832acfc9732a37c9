"""What a rule keeps beside each of the model's variables, and what it may do with it."""

from collections.abc import Callable, Sequence
from typing import Any

from keras_avg import _backend


class Store:
    """One kept variable beside each model variable that is averaged.

    A rule moves all of them at once, where a condition holds. All methods run inside compiled code,
    under strategies and on sharded variables. A store holds float32 or wider for low-precision
    variables, and is saved by its name.

    Args:
        kept: List of variables, one for each of `variables`, of the same shapes.
        variables: List of the model's variables.
    """

    def __init__(self, kept: Sequence[Any], variables: Sequence[Any]) -> None:
        self.kept = list(kept)
        self.variables = list(variables)

    def values(self) -> list[Any]:
        """What is kept, as tensors."""
        return [_backend.value(variable) for variable in self.kept]

    def lerp_if(self, condition: Any, weight: Callable[[], Any]) -> None:
        """Move towards the variables: `kept <- kept + weight() * (variable - kept)`.

        Args:
            condition: Bool, or a scalar tensor: whether to move at all.
            weight: Function without arguments, called if it is needed: a float, or a scalar tensor.
                Weight 1 gives the variables bit for bit.
        """
        _backend.lerp_if(condition, self.kept, self.variables, weight)

    def assign_if(self, condition: Any, new_value: Callable[..., Any], *others: "Store") -> None:
        """Compute a new value for each: `kept <- new_value(kept, variable, *others)`.

        Args:
            condition: Bool, or a scalar tensor: whether to assign at all.
            new_value: Function of tensors in the dtype of what is kept: what is kept, the
                variable, and what each of `others` keeps beside the same variable. Returns a
                tensor of that shape.
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
        """Give the variables what is kept beside them."""
        _backend.assign_if(condition, self.variables, self.kept, _copies)

    def start(self, updates: Any) -> None:
        """Take the variables' values if there has been no update yet. Called before the step."""
        _backend.start_averages(updates, self.kept, self.variables)


def _copies(targets: Sequence[Any], sources: Sequence[Any]) -> list[Any]:
    return [_backend.copy(source) for source in sources]
