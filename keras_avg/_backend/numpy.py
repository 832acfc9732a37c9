"""The operations on NumPy and OpenVINO. There Keras can load models, but cannot train them.

OpenVINO has graphs instead of arrays. So everything is computed in NumPy, and then assigned.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np


def widest_float() -> str:
    return "float64"


def copy(tensor: Any) -> Any:
    return np.array(_array(tensor), copy=True)


def set_aside(variables: Sequence[Any]) -> list[Any]:
    return [copy(variable) for variable in variables]


def to_assign(tensor: Any) -> Any:
    return copy(tensor)


def detached(variables: Sequence[Any]) -> list[Any]:
    return [_array(variable) for variable in variables]


def value(variable: Any, dtype: Any = None) -> Any:
    array = _array(variable)
    return array if dtype is None else array.astype(dtype)


def assign_all(variables: Sequence[Any], tensors: Sequence[Any]) -> None:
    for variable, tensor in zip(variables, tensors, strict=True):
        variable.assign(tensor)


def assign_quotients(sources: Sequence[Any], divisor: float, *targets: Sequence[Any]) -> None:
    for source, *chain in zip(sources, *targets, strict=True):
        value = _array(source) / divisor
        for target in chain:
            target.assign(value)
            value = _array(target)


class Counter:
    def __init__(self, variable: Any) -> None:
        self._variable = variable

    def read(self) -> int:
        return int(_array(self._variable))

    def read_after_step(self) -> int:
        return self.read()

    def advance(self, amount: int) -> None:
        self._variable.assign(np.asarray(self.read() + int(amount), self._variable.dtype))


def scalar(compute: Callable[[], Any]) -> Any:
    return _array(compute()).item()


def concrete(number: Any) -> Any:
    return _array(number).item()


def all_finite(tensors: Sequence[Any]) -> bool:
    return all(np.isfinite(_array(tensor)).all() for tensor in tensors)


def lerp(averages: Sequence[Any], values: Sequence[Any], weight: Any) -> list[Any]:
    return [
        _lerp(_array(average), _array(value), weight)
        for average, value in zip(averages, values, strict=True)
    ]


def _lerp(average: np.ndarray, value: np.ndarray, weight: float) -> np.ndarray:
    value = value.astype(average.dtype)
    if weight == 1.0:
        return value
    return average + np.asarray(weight, average.dtype) * (value - average)


def assign_if(
    condition: Any,
    targets: Sequence[Any],
    sources: Sequence[Any],
    new_values: Callable[[Sequence[Any], Sequence[Any]], Sequence[Any]],
) -> None:
    if not condition:
        return
    for target, value in zip(targets, new_values(targets, sources), strict=True):
        target.assign(value)


def put_if(
    condition: Any,
    place: Any,
    rings: Sequence[Any],
    sources: Sequence[Any],
    new_values: Callable[[Sequence[Any]], Sequence[Any]],
) -> None:
    if condition:
        for ring, row in zip(rings, new_values(sources), strict=True):
            rows = np.array(ring.value)
            rows[int(place)] = row
            ring.assign(rows)


def layout_of_ring(layout: Any) -> None:
    return None


def run_if(condition: Any, function: Callable[[], None], variables: Sequence[Any]) -> None:
    if condition:
        function()


def lerp_if(
    condition: Any, averages: Sequence[Any], variables: Sequence[Any], weight: Callable[[], Any]
) -> None:
    assign_if(condition, averages, variables, lambda a, v: lerp(a, v, weight()))


def start_averages(updates: Any, averages: Sequence[Any], variables: Sequence[Any]) -> None:
    assign_if(updates == 0, averages, variables, lambda a, v: [copy(value) for value in v])


def loss_gradients(
    loss: Any, variables: Any, output_gradient: Callable[[Any], Any], tape: Any
) -> tuple[list[Any], list[Any]]:
    raise NotImplementedError(
        f"Keras computes no gradients on this backend. Received: {keras.backend.backend()!r}. "
        "Pass gradients to `apply`, or train on TensorFlow, JAX or PyTorch."
    )


def after(grads: Sequence[Any]) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext()


def part_of_sum(grad: Any) -> Any:
    return grad


def outside_trace(reads: Sequence[Any] = ()) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext()


def random_state_kept() -> contextlib.AbstractContextManager:
    return contextlib.nullcontext()


def eager_inference(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def place_in_code() -> Any:
    return None


def compile_stateless(function: Callable[..., Any], by_xla: bool) -> Callable[..., Any] | None:
    return None


def pass_over(arguments: Sequence[Any], batches: int, result: Callable[..., Any]) -> Any:
    return result(arguments[0][0])


def _array(tensor: Any) -> np.ndarray:
    return np.asarray(keras.ops.convert_to_numpy(tensor))
