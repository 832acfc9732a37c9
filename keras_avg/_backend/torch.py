"""The operations on PyTorch. Python decides on the host. Multi-tensor kernels update in place.

Functions that need a Python number run outside of a compiled graph: `torch.compile` breaks the
graph there.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import compress
from typing import Any

import keras
import numpy as np
import torch

from keras_avg import _keras_internals

IN_CACHE = 2**16  # elements. So many stay in the processor's cache until they are read again.
IN_CACHES = 2**18  # elements. So many occupy all cores, and stay in their caches.
ON_GPU = 2**24  # elements. So many need few kernels, and little memory beside the averages.
SMALL = 2**15  # elements. For fewer of them, Python takes longer than the memory.
TOGETHER = 2**17  # elements. So many of small tensors stay in the cache between two operations.

outside_graph = torch.compiler.disable


def widest_float() -> str:
    return "float64"


@torch.no_grad()
def copy(tensor: Any) -> Any:
    return keras.ops.convert_to_tensor(tensor).detach().clone()


@outside_graph
@torch.no_grad()
def set_aside(variables: Sequence[Any]) -> list[Any]:
    return [_tensor(variable).detach().clone() for variable in variables]


def to_assign(tensor: Any) -> Any:
    return _tensor(tensor).detach()


def detached(variables: Sequence[Any]) -> list[Any]:
    return [t.detach() if t.requires_grad else t for t in _tensors(variables)]


def value(variable: Any, dtype: Any = None) -> Any:
    tensor = _tensor(variable).detach()
    return tensor if dtype is None else tensor.to(_torch_dtype(dtype))


@outside_graph
@torch.no_grad()
def assign_all(variables: Sequence[Any], tensors: Sequence[Any]) -> None:
    if _keras_internals.in_stateless_scope():
        for variable, tensor in zip(variables, tensors, strict=True):
            variable.assign(tensor)
    elif variables:  # One call for all. Python takes longer than the memory for small tensors.
        torch._foreach_copy_([_tensor(v) for v in variables], [_tensor(t) for t in tensors])


@outside_graph
@torch.no_grad()
def assign_quotients(sources: Sequence[Any], divisor: float, *targets: Sequence[Any]) -> None:
    small: list[tuple[torch.Tensor, ...]] = []
    elements = 0
    for row in zip(*map(_tensors, (sources, *targets)), strict=True):
        if (size := row[0].numel()) < SMALL:
            small.append(row)
            elements += size
            if elements >= TOGETHER:
                _divide_together(small, divisor)
                small, elements = [], 0
        elif all(map(_is_plain, row)):
            _divide_on_host(row, divisor)
        else:
            _divide_together([row], divisor)
    if small:
        _divide_together(small, divisor)


def _is_plain(tensor: torch.Tensor) -> bool:
    return tensor.is_cpu and tensor.dtype == torch.float32 and tensor.is_contiguous()


def _divide_together(rows: list[tuple[torch.Tensor, ...]], divisor: float) -> None:
    values, *others = map(list, zip(*rows, strict=True))
    if divisor != 1:
        values = list(torch._foreach_div(values, divisor))
    for memories in others:
        torch._foreach_copy_(memories, values)
        values = memories


def _divide_on_host(row: tuple[torch.Tensor, ...], divisor: float) -> None:
    # NumPy, because torch would start a parallel region (a barrier over all cores) per tensor.
    source, *arrays = [tensor.detach().numpy().reshape(-1) for tensor in row]
    # For a power of two, the product with the reciprocal has the same bits, and is much faster.
    is_power_of_two = math.frexp(divisor)[0] == 0.5
    divide, number = (np.multiply, 1 / divisor) if is_power_of_two else (np.divide, divisor)
    for start in range(0, source.size, IN_CACHE):
        part = slice(start, start + IN_CACHE)
        divide(source[part], number, out=arrays[0][part])
        for before, after in itertools.pairwise(arrays):
            np.copyto(after[part], before[part])


class Counter:
    """Keeps a copy of the number on the host. It is read again only after a change by others."""

    def __init__(self, variable: Any) -> None:
        self._variable = variable
        self._tensor: Any = None
        self._version = -1
        self._count = 0

    @outside_graph
    def read(self) -> int:
        tensor = self._read_tensor()
        if tensor is not self._tensor or tensor._version != self._version:
            self._remember(tensor, int(tensor))
        return self._count

    @outside_graph
    def read_after_step(self) -> int:
        tensor = self._read_tensor()
        if tensor is self._tensor and tensor._version == self._version + 1:
            self._remember(tensor, self._count + 1)
        return self.read()

    @outside_graph
    @torch.no_grad()
    def advance(self, amount: int) -> None:
        if not amount:
            return
        count = self.read() + amount
        if _keras_internals.in_stateless_scope():
            self._variable.assign_add(amount)
        else:  # the same in a fifth of the time
            self._read_tensor().add_(amount)
        self._remember(self._read_tensor(), count)

    def _read_tensor(self) -> torch.Tensor:
        return _keras_internals.values_of([self._variable])[0]

    def _remember(self, tensor: Any, count: int) -> None:
        self._tensor, self._version, self._count = tensor, tensor._version, count


@outside_graph
def scalar(compute: Callable[[], Any]) -> Any:
    with keras.device("cpu"), torch.no_grad():
        result = compute()
    return result.item() if torch.is_tensor(result) else result


@outside_graph
def concrete(number: Any) -> Any:
    return number.item() if torch.is_tensor(number) else number


@outside_graph
@torch.no_grad()
def all_finite(tensors: Sequence[Any]) -> bool:
    return bool(torch.stack([torch.isfinite(_tensor(t)).all() for t in tensors]).all())


@torch.no_grad()
def lerp(averages: Sequence[Any], values: Sequence[Any], weight: Any) -> list[Any]:
    return [
        _lerp_(_tensor(average).clone(), _tensor(value), weight)
        for average, value in zip(averages, values, strict=True)
    ]


def _lerp_(average: torch.Tensor, value: torch.Tensor, weight: float) -> torch.Tensor:
    # For an infinite value and weight 1, `torch.lerp` gives NaN.
    if weight == 1.0:
        return average.copy_(value)
    return average.lerp_(value.to(average.dtype), weight)


@outside_graph
@torch.no_grad()
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


@outside_graph
@torch.no_grad()
def put_if(
    condition: Any,
    place: Any,
    rings: Sequence[Any],
    sources: Sequence[Any],
    new_values: Callable[[Sequence[Any]], Sequence[Any]],
) -> None:
    if condition:
        for ring, row in zip(rings, new_values(sources), strict=True):
            _tensor(ring)[place].copy_(row)


def layout_of_ring(layout: Any) -> None:
    return None


@outside_graph
@torch.no_grad()
def run_if(condition: Any, function: Callable[[], None], variables: Sequence[Any]) -> None:
    if condition:
        function()


@outside_graph
@torch.no_grad()
def lerp_if(
    condition: Any, averages: Sequence[Any], variables: Sequence[Any], weight: Callable[[], Any]
) -> None:
    if not condition or not averages:
        return
    w = weight()
    kept, values = map(_keras_internals.values_of, (averages, variables))
    if w == 1.0:  # For an infinite value, `lerp` would give NaN.
        torch._foreach_copy_(kept, values)
        return
    same = [average.dtype == value.dtype for average, value in zip(kept, values, strict=True)]
    if any(same):  # The multi-tensor kernel needs equal dtypes.
        torch._foreach_lerp_(*(list(compress(tensors, same)) for tensors in (kept, values)), w)
    if all(same):
        return
    others = [not each for each in same]
    for some, their_values in _pieces(compress(kept, others), compress(values, others)):
        converted = [torch.empty_like(average) for average in some]
        torch._foreach_copy_(converted, their_values)
        torch._foreach_lerp_(some, converted, w)


def _pieces(
    averages: Iterable[Any], values: Iterable[Any]
) -> Iterator[tuple[list[Any], list[Any]]]:
    """Parts of the tensors, in lists that fit into the cache, or on a GPU into one large kernel."""
    some: list[tuple[Any, Any]] = []
    size = 0
    for average, value in zip(averages, values, strict=True):
        limit = IN_CACHES if average.is_cpu else ON_GPU
        for pair in _split((average, value), limit):
            if some and size + pair[0].numel() > limit:
                yield _columns(some)
                some, size = [], 0
            some.append(pair)
            size += pair[0].numel()
    if some:
        yield _columns(some)


def _split(pair: tuple[Any, Any], limit: int) -> Iterable[tuple[Any, Any]]:
    if pair[0].numel() <= limit or not all(tensor.is_contiguous() for tensor in pair):
        return (pair,)
    return zip(*(tensor.view(-1).split(limit) for tensor in pair), strict=True)


def _columns(pairs: list[tuple[Any, Any]]) -> tuple[list[Any], list[Any]]:
    first, second = zip(*pairs, strict=True)
    return list(first), list(second)


def start_averages(updates: Any, averages: Sequence[Any], variables: Sequence[Any]) -> None:
    assign_if(updates == 0, averages, variables, lambda a, v: [copy(value) for value in v])


def loss_gradients(
    loss: Any, variables: Any, output_gradient: Callable[[Any], Any], tape: Any
) -> tuple[list[Any], list[Any]]:
    with torch.enable_grad():
        value = keras.ops.convert_to_tensor(loss())
    variables = variables() if callable(variables) else variables
    tensors = [_tensor(variable) for variable in variables]
    learned = [tensor for tensor in tensors if tensor.requires_grad]
    if not learned or not value.requires_grad:
        return variables, [None] * len(variables)
    grads = iter(torch.autograd.grad(value, learned, output_gradient(value), allow_unused=True))
    return variables, [next(grads) if tensor.requires_grad else None for tensor in tensors]


def after(grads: Sequence[Any]) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext()


def part_of_sum(grad: Any) -> Any:
    return grad


def outside_trace(reads: Sequence[Any] = ()) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext()


def random_state_kept() -> contextlib.AbstractContextManager:
    return torch.random.fork_rng(devices=[])


def eager_inference(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.no_grad()(function)


def place_in_code() -> Any:
    return None


def compile_stateless(function: Callable[..., Any], by_xla: bool) -> Callable[..., Any] | None:
    return None


def pass_over(arguments: Sequence[Any], batches: int, result: Callable[..., Any]) -> Any:
    return result(arguments[0][0])


def _torch_dtype(dtype: Any) -> torch.dtype:
    return dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype))


def _tensors(variables: Iterable[Any]) -> list[torch.Tensor]:
    convert = keras.ops.convert_to_tensor
    values = _keras_internals.values_of(variables)
    return [value if isinstance(value, torch.Tensor) else convert(value) for value in values]


def _tensor(variable: Any) -> torch.Tensor:
    if isinstance(variable, keras.Variable):
        return _keras_internals.values_of([variable])[0]
    return variable if torch.is_tensor(variable) else keras.ops.convert_to_tensor(variable)
