"""The operations on JAX. No branch assigns a variable: every `cond` returns values."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np

from keras_avg import _keras_internals

SMALL = 2**17  # bytes. For an array up to this size, Python takes longer than the memory.
TOGETHER = 16  # small arrays of the same shape that one program divides


def widest_float() -> str:
    return "float64" if jax.config.jax_enable_x64 else "float32"


def copy(tensor: Any) -> Any:
    tensor = tensor.value if isinstance(tensor, keras.Variable) else tensor
    if isinstance(tensor, jax.Array):
        return _copied(tensor)
    return jnp.array(tensor, copy=True)


# It takes at most half of the time of `jnp.array(tensor, copy=True)`. `jax.device_put` does not
# copy aligned arrays of NumPy, even with `may_alias=False`.
_copied = jax.jit(jnp.copy)


def set_aside(variables: Sequence[Any]) -> list[Any]:
    return [value(variable) for variable in variables]


def to_assign(tensor: Any) -> Any:
    return copy(tensor)


def detached(variables: Sequence[Any]) -> list[Any]:
    return _keras_internals.values_of(variables)


def value(variable: Any, dtype: Any = None) -> Any:
    tensor = variable.value if isinstance(variable, keras.Variable) else jnp.asarray(variable)
    if dtype is None or tensor.dtype == dtype:
        return tensor
    # If a cast to float32 follows a rounding to bfloat16, XLA leaves out the rounding. Then the
    # average would be of the unrounded result of the step, and not of the variable.
    return jax.lax.optimization_barrier(tensor).astype(dtype)


def assign_all(variables: Sequence[Any], tensors: Sequence[Any]) -> None:
    for variable, tensor in zip(variables, tensors, strict=True):
        variable.assign(tensor)


def assign_quotients(sources: Sequence[Any], divisor: float, *targets: Sequence[Any]) -> None:
    alike: dict[Any, list[tuple[Any, ...]]] = {}
    for row in zip(_keras_internals.values_of(sources), *targets, strict=True):
        alike.setdefault(_kind(row), []).append(row)
    for kind, rows in alike.items():
        whole = len(rows) // TOGETHER * TOGETHER if kind else 0
        for start in range(0, whole, TOGETHER):
            _assign_together(rows[start : start + TOGETHER], divisor)
        for row in rows[whole:]:
            _assign_chain(row, divisor)


def _kind(row: tuple[Any, ...]) -> Any:
    """What small arrays of NumPy have in common if one program divides them. None for others."""
    source, *chain = row
    is_small = isinstance(source, np.ndarray) and source.nbytes <= SMALL
    if not is_small or source.dtype != "float32" or not chain:
        return None
    return source.shape, *[target.dtype for target in chain]


def _assign_together(rows: list[tuple[Any, ...]], divisor: float) -> None:
    sources, *targets = zip(*rows, strict=True)
    # One argument, because each argument of a compiled function takes as long as its copy. XLA may
    # multiply by the reciprocal, which is rounded. NumPy divides.
    stack = np.stack(sources)
    stack /= np.float32(divisor)
    dtypes = tuple(column[0].dtype for column in targets)
    for column, values in zip(targets, _unstacked(stack, dtypes), strict=True):
        for target, value in zip(column, values, strict=True):
            _keras_internals.assign_converted(target, value)


@functools.partial(jax.jit, static_argnums=1)
def _unstacked(stack: jax.Array, dtypes: tuple[str, ...]) -> list[list[jax.Array]]:
    """Copies of the parts for each dtype. A value is rounded to one dtype after the other."""
    copies = []
    for dtype in dtypes:
        if stack.dtype != dtype:  # XLA leaves out a rounding if a wider dtype follows.
            stack = jax.lax.optimization_barrier(stack.astype(dtype))
        copies.append([jnp.copy(part) for part in stack])
    return copies


def _assign_chain(row: tuple[Any, ...], divisor: float) -> None:
    source, *chain = row
    value = source if divisor == 1 else source / divisor
    for target in chain:
        if value.dtype != target.dtype:
            value = value.astype(target.dtype)
        value = _copied(value)
        _keras_internals.assign_converted(target, value)


class Counter:
    def __init__(self, variable: Any) -> None:
        self._variable = variable

    def read(self) -> Any:
        return self._variable.value

    def read_after_step(self) -> Any:
        return self.read()

    def advance(self, amount: Any) -> None:
        self._variable.assign_add(jnp.asarray(amount, self._variable.dtype))


def scalar(compute: Callable[[], Any]) -> Any:
    return compute()


def concrete(number: Any) -> Any:
    if isinstance(number, jax.core.Tracer) or number.is_deleted():
        return None
    return number.item()


def all_finite(tensors: Sequence[Any]) -> Any:
    return jnp.all(jnp.stack([jnp.isfinite(jnp.asarray(tensor)).all() for tensor in tensors]))


def lerp(averages: Sequence[Any], values: Sequence[Any], weight: Any) -> list[Any]:
    return [
        _lerp(jnp.asarray(average), jnp.asarray(value), weight)
        for average, value in zip(averages, values, strict=True)
    ]


def _lerp(average: jax.Array, value: jax.Array, weight: Any) -> jax.Array:
    if value.dtype != average.dtype:
        # If a cast to float32 follows a rounding to bfloat16, XLA leaves out the rounding. Then the
        # average would be of the unrounded result of the step, and not of the variable.
        value = jax.lax.optimization_barrier(value)
    if isinstance(weight, float) and weight == 1.0:
        return jnp.array(value, average.dtype, copy=True)
    value = value.astype(average.dtype)
    weight = jnp.asarray(weight, average.dtype)
    return jnp.where(weight == 1, value, average + weight * (value - average))


def assign_if(
    condition: Any,
    targets: Sequence[Any],
    sources: Sequence[Any],
    new_values: Callable[[Sequence[Any], Sequence[Any]], Sequence[Any]],
) -> None:
    def changed() -> list[Any]:
        pairs = zip(targets, new_values(targets, sources), strict=True)
        return [jnp.asarray(new, target.dtype) for target, new in pairs]

    if isinstance(condition, jax.core.Tracer):
        results = jax.lax.cond(condition, changed, lambda: [target.value for target in targets])
    elif condition:
        # Two variables must not share a buffer, because a train step cannot donate it twice.
        taken = {id(value(variable)) for variable in (*targets, *sources)}
        results = [jnp.array(v, copy=True) if id(v) in taken else v for v in changed()]
    else:
        return
    for target, result in zip(targets, results, strict=True):
        target.assign(result)


def put_if(
    condition: Any,
    place: Any,
    rings: Sequence[Any],
    sources: Sequence[Any],
    new_values: Callable[[Sequence[Any]], Sequence[Any]],
) -> None:
    def changed() -> list[Any]:
        pairs = zip(rings, new_values(sources), strict=True)
        return [
            jax.lax.dynamic_update_index_in_dim(ring.value, jnp.asarray(row, ring.dtype), place, 0)
            for ring, row in pairs
        ]

    if isinstance(condition, jax.core.Tracer):
        results = jax.lax.cond(condition, changed, lambda: [ring.value for ring in rings])
    elif condition:
        results = changed()
    else:
        return
    for ring, result in zip(rings, results, strict=True):
        ring.assign(result)


def layout_of_ring(layout: Any) -> Any:
    sharding = getattr(layout, "backend_layout", layout)  # a layout of Keras, or of JAX
    if sharding is None:
        return None
    spec = jax.sharding.PartitionSpec(None, *sharding.spec)
    return jax.sharding.NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)


def run_if(condition: Any, function: Callable[[], None], variables: Sequence[Any]) -> None:
    if not isinstance(condition, jax.core.Tracer):
        if condition:
            function()
        return

    def run() -> list[Any]:
        with keras.StatelessScope([(v, v.value) for v in variables]) as scope:
            function()
        return [scope.get_current_value(v) for v in variables]

    values = jax.lax.cond(condition, run, lambda: [v.value for v in variables])
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def lerp_if(
    condition: Any, averages: Sequence[Any], variables: Sequence[Any], weight: Callable[[], Any]
) -> None:
    assign_if(condition, averages, variables, lambda a, v: lerp(a, v, weight()))


def start_averages(updates: Any, averages: Sequence[Any], variables: Sequence[Any]) -> None:
    if not isinstance(updates, jax.core.Tracer):
        assign_if(updates == 0, averages, variables, lambda a, v: [copy(value) for value in v])
        return

    def start() -> tuple[list[Any], Any]:
        pairs = zip(averages, variables, strict=True)
        return [jnp.array(v.value, a.dtype, copy=True) for a, v in pairs], updates > 0

    def keep() -> tuple[list[Any], Any]:
        return [average.value for average in averages], updates < 0

    # This code reads the old values of the variables. The step writes the new values into the same
    # memory. XLA does not know which comes first, so it would copy every variable at every step.
    # `never` is False in both branches, but XLA cannot know that. The variables depend on it below,
    # so the step must come after the read.
    values, never = jax.lax.cond(updates == 0, start, keep)
    for average, value in zip(averages, values, strict=True):
        average.assign(value)
    for variable in variables:
        variable.assign(jnp.where(never, jnp.zeros((), variable.dtype), variable.value))


def loss_gradients(
    loss: Any, variables: Any, output_gradient: Callable[[Any], Any], tape: Any
) -> tuple[list[Any], list[Any]]:
    if callable(variables):
        with keras.StatelessScope():  # The loss makes its variables here, but changes none.
            loss()
        variables = variables()
    scopes = []

    def value_and_state(values: list[Any]) -> tuple[jax.Array, list[Any]]:
        with _Effects(zip(variables, values, strict=True)) as scope:
            value = keras.ops.convert_to_tensor(loss())
        scopes.append(scope)
        return value, [scope.state_mapping[key] for key in scope.assigned]

    value, pull_back, state = jax.vjp(value_and_state, [v.value for v in variables], has_aux=True)
    (grads,) = pull_back(output_gradient(value))
    (scope,) = scopes
    for variable, new_value in zip(scope.assigned.values(), state, strict=True):
        variable.assign(new_value)
    pairs = zip(variables, grads, strict=True)
    return variables, [grad if id(variable) in scope.read else None for variable, grad in pairs]


class _Effects(keras.StatelessScope):
    """Notes which variables were read and which were assigned in it.

    For an unused variable, JAX returns a gradient of zeros, and the other frameworks return None.
    So the reads are noted. The assigned variables are noted because Keras' scope has only their
    ids.
    """

    def __init__(self, state: Any) -> None:
        super().__init__(state)
        self.read: set[int] = set()
        self.assigned: dict[int, Any] = {}

    def get_current_value(self, variable: Any) -> Any:
        self.read.add(id(variable))
        return super().get_current_value(variable)

    def add_update(self, update: tuple[Any, Any]) -> None:
        self.assigned[id(update[0])] = update[0]
        super().add_update(update)


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
    # Imported here, because `import jax` and Keras do not load this part of jax.
    try:
        from jax.extend.core import get_opaque_trace_state
    except ImportError:  # older than jax 0.10
        from jax.core import get_opaque_trace_state
    return get_opaque_trace_state(convention="nnx")


def compile_stateless(function: Callable[..., Any], by_xla: bool) -> Callable[..., Any] | None:
    return jax.jit(function) if by_xla else None


def pass_over(arguments: Sequence[Any], batches: int, result: Callable[..., Any]) -> Any:
    state, iterator = arguments
    batch = next(iterator)  # the end of the data ends the epoch, if there is no batch at all
    for _ in range(batches - 1):
        next(iterator, None)
    return result(batch), state
