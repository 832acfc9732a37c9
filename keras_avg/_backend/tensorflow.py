"""The operations on TensorFlow. A `cond` is around assignments, on every replica of a strategy."""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf
from tensorflow.compiler.tf2xla.python import xla

from keras_avg import _keras_internals
from keras_avg._backend._tensorflow.program import Program

WRITES = re.compile("^Assign|^ResourceApply|^ResourceSparseApply|^ResourceScatter")
SOURCES = ("Placeholder", "IteratorGetNext", "OptionalGetValue")
FULL_PRECISION = 4  # bytes of an element
CONDITIONS = ("If", "StatelessIf", "PartitionedCall", "StatefulPartitionedCall", "While")


def widest_float() -> str:
    return "float64"


def copy(tensor: Any) -> Any:
    return tf.identity(tensor)


def set_aside(variables: Sequence[Any]) -> list[Any]:
    # Not `tf.identity` or `tf.convert_to_tensor`: their lookups take as long as a small copy.
    return [v.value() if isinstance(v, tf.Variable) else v for v in _native(variables)]


def to_assign(tensor: Any) -> Any:
    return tf.convert_to_tensor(tensor)


def detached(variables: Sequence[Any]) -> list[Any]:
    values = _keras_internals.values_of(variables)
    pairs = [(v, of.shape) for v, of in zip(values, variables, strict=True) if _is_variable(v)]
    read = iter(_read_all([], [v for v, _ in pairs], shapes=tuple([shape for _, shape in pairs])))
    return [next(read) if _is_variable(v) else tf.convert_to_tensor(v) for v in values]


def _is_variable(value: Any) -> bool:
    return isinstance(value, tf.Variable)


# One call of compiled code takes a third of the time of single reads.
@Program
def _read_all(tensors: list[Any], variables: list[Any]) -> list[Any]:
    return [tf.convert_to_tensor(variable) for variable in variables]


def value(variable: Any, dtype: Any = None) -> Any:
    tensor = tf.convert_to_tensor(variable)
    return tensor if dtype is None else tf.cast(tensor, dtype)


def assign_all(variables: Sequence[Any], tensors: Sequence[Any]) -> None:
    if _keras_internals.in_stateless_scope():
        for variable, tensor in zip(variables, tensors, strict=True):
            variable.assign(tensor)
        return
    for variable, tensor in zip(_native(variables), tensors, strict=True):
        variable.assign(tf.cast(tensor, variable.dtype), read_value=False)


def assign_quotients(sources: Sequence[Any], divisor: float, *targets: Sequence[Any]) -> None:
    values = [tf.convert_to_tensor(source) for source in _keras_internals.values_of(sources)]
    # The divisor must be a tensor. For a constant, TensorFlow would multiply by its reciprocal,
    # which is rounded.
    numbers = [] if divisor == 1 else [tf.constant(divisor, "float64")]
    _assign_quotients([*numbers, *values], *map(_keras_internals.values_of, targets))


# This is compiled, because two hundred operations from Python take as long as the memory transfers.
# The trace reads no variable among its arguments. Otherwise it could not be called in another trace
# or under a tape.
@Program
def _assign_quotients(tensors: list[Any], *targets: list[Any]) -> list[Any]:
    count = len(tensors) - len(targets[0])
    divisor, values = tensors[:count], tensors[count:]
    for value, *chain in zip(values, *targets, strict=True):
        for number in divisor:  # none, or one
            value = value / tf.cast(number, value.dtype)
        for target in chain:
            value = tf.cast(value, target.dtype)
            target.assign(value, read_value=False)
    return []


class Counter:
    def __init__(self, variable: Any) -> None:
        self._variable = variable

    def read(self) -> Any:
        return tf.convert_to_tensor(self._variable.value)

    def read_after_step(self) -> Any:
        return self.read()

    def advance(self, amount: Any) -> None:
        self._variable.assign_add(tf.cast(amount, self._variable.dtype))


def scalar(compute: Callable[[], Any]) -> Any:
    return compute()


def concrete(number: Any) -> Any:
    if isinstance(number, tf.Variable):
        # Not `number.read_value()`: the code that is being compiled would then depend on the
        # variable, and would no longer run after the variable is deleted.
        handle = getattr(number, "values", [number])[0].handle
        with tf.init_scope():
            return concrete(tf.raw_ops.ReadVariableOp(resource=handle, dtype=number.dtype))
    return number.numpy().item() if tf.executing_eagerly() else None


def all_finite(tensors: Sequence[Any]) -> Any:
    finite = [tf.reduce_all(tf.math.is_finite(tf.convert_to_tensor(t))) for t in tensors]
    return tf.reduce_all(tf.stack(finite))


def lerp(averages: Sequence[Any], values: Sequence[Any], weight: Any) -> list[Any]:
    return [
        _lerp(tf.convert_to_tensor(average), tf.convert_to_tensor(value), weight)
        for average, value in zip(averages, values, strict=True)
    ]


def _lerp(average: tf.Tensor, value: tf.Tensor, weight: Any) -> tf.Tensor:
    value = tf.cast(value, average.dtype)
    if isinstance(weight, float) and weight == 1.0:
        return value
    moved = average + _as_float(weight, average.dtype) * (value - average)
    return moved if isinstance(weight, float) else tf.where(weight == 1, value, moved)


def _as_float(number: Any, dtype: Any) -> tf.Tensor:
    # `tf.cast` would round a Python float to float32 before it casts to float64.
    return tf.constant(number, dtype) if isinstance(number, float) else tf.cast(number, dtype)


def assign_if(
    condition: Any,
    targets: Sequence[Any],
    sources: Sequence[Any],
    new_values: Callable[[Sequence[Any], Sequence[Any]], Sequence[Any]],
) -> None:
    def assign(targets: Sequence[Any], sources: Sequence[Any]) -> None:
        values = new_values(targets, sources)
        for target, value in zip(targets, values, strict=True):
            target.assign(tf.cast(value, target.dtype))

    _update_if(condition, targets, sources, assign)


def _update_if(
    condition: Any,
    targets: Sequence[Any],
    sources: Sequence[Any],
    update: Callable[..., None],
    *numbers: tf.Tensor,
) -> None:
    """If the condition is true, call `update(targets, sources, *numbers)` on each replica.

    Each replica gets its copies of targets and sources. The numbers are the same on all replicas.
    """
    if not targets:
        return
    sources = _as_rounded(sources)
    if condition is True and not tf.distribute.has_strategy():
        update(targets, sources, *numbers)
        return
    condition = tf.convert_to_tensor(condition)
    if not tf.distribute.has_strategy():
        tf.cond(condition, lambda: update(targets, sources, *numbers), lambda: None)
        return

    # Only the strategy's `update` may assign a replica's copy, and a branch of a `cond` inside a
    # replica must not call it. So the `cond` is outside of the replicas, and one `update` does all
    # assignments of a replica.
    def update_each_replica(strategy: Any, *scalars: Any) -> None:
        condition, *numbers = (strategy.experimental_local_results(s)[0] for s in scalars)
        (first, *rest), values = _native(targets), _native(sources)
        tf.cond(
            condition,
            lambda: (
                strategy.extended.update(
                    first,
                    lambda first, rest, values: update([first, *rest], values, *numbers),
                    args=(rest, values),
                    group=False,
                )
                and None
            ),
            lambda: None,
        )

    if tf.distribute.in_cross_replica_context():  # a strategy's scope, but outside of its steps
        update_each_replica(tf.distribute.get_strategy(), condition, *numbers)
        return
    tf.__internal__.distribute.interim.maybe_merge_call(
        update_each_replica, tf.distribute.get_strategy(), condition, *numbers
    )


def _as_rounded(variables: Sequence[Any]) -> Sequence[Any]:
    # If a cast to float32 follows a rounding to bfloat16, XLA leaves out the rounding. Then the
    # average would be of the unrounded result of the step, and not of the variable. This must be
    # outside of a `cond`, where XLA would copy the averages for it.
    if tf.executing_eagerly() or tf.distribute.has_strategy() or not _is_compiled_by_xla():
        return variables
    return [
        xla.optimization_barrier(v)[0] if tf.as_dtype(v.dtype).size < FULL_PRECISION else v
        for v in variables
    ]


def put_if(
    condition: Any,
    place: Any,
    rings: Sequence[Any],
    sources: Sequence[Any],
    new_values: Callable[[Sequence[Any]], Sequence[Any]],
) -> None:
    # Not `ring[place].assign`: a graph copies the whole ring for it, as XLA does if nothing is due.
    def put(rings: Sequence[Any], sources: Sequence[Any], place: Any) -> None:
        for ring, row in zip(_native(rings), new_values(sources), strict=True):
            rows = tf.cast(row, ring.dtype)[tf.newaxis]
            ring.scatter_update(tf.IndexedSlices(rows, tf.reshape(place, (1,))))

    _update_if(condition, rings, sources, put, tf.convert_to_tensor(place))


def layout_of_ring(layout: Any) -> None:
    return None


def run_if(condition: Any, function: Callable[[], None], variables: Sequence[Any]) -> None:
    if tf.distribute.has_strategy():
        raise NotImplementedError(
            "An outer optimizer, and resetting the inner one, are not possible under a "
            f"tf.distribute strategy. Received: {tf.distribute.get_strategy()!r}."
        )

    def run() -> None:
        function()

    tf.cond(tf.convert_to_tensor(condition), run, lambda: None)


def _native(variables: Sequence[Any]) -> list[Any]:
    return [v.value if isinstance(v, keras.Variable) else v for v in variables]


def lerp_if(
    condition: Any, averages: Sequence[Any], variables: Sequence[Any], weight: Callable[[], Any]
) -> None:
    _update_if(condition, averages, variables, lambda a, v: _move(_native(a), v, weight()))


def _move(averages: Sequence[Any], values: Sequence[Any], weight: Any) -> None:
    def add() -> None:
        for average, value in zip(averages, values, strict=True):
            _add(average, tf.cast(value, average.dtype), _as_float(weight, average.dtype))

    def copy_all() -> None:
        for average, value in zip(averages, values, strict=True):
            value = tf.cast(value, average.dtype)
            # For a bare copy, XLA would copy the average in the other branch too.
            value = value if isinstance(weight, float) else tf.where(weight == 1, value, average)
            average.assign(value, read_value=False)

    if isinstance(weight, float):
        (copy_all if weight == 1.0 else add)()
    else:
        tf.cond(weight == 1, copy_all, add)


def _add(average: Any, value: tf.Tensor, weight: tf.Tensor) -> None:
    # Both ways write in place. `assign` with a sum would need new memory, and take twice the time.
    # The step of gradient descent multiplies while it subtracts, so it needs one pass less over the
    # memory. Not all devices have it for bfloat16.
    if average.dtype == tf.bfloat16:
        average.assign_add(weight * (value - average), read_value=False)
        return
    tf.raw_ops.ResourceApplyGradientDescent(var=average.handle, alpha=weight, delta=average - value)


def start_averages(updates: Any, averages: Sequence[Any], variables: Sequence[Any]) -> None:
    if tf.executing_eagerly() or tf.distribute.has_strategy():
        assign_if(updates == 0, averages, variables, lambda a, v: [copy(value) for value in v])
        return

    by_xla = _is_compiled_by_xla()

    def start(count: Any) -> Any:
        for average, variable in zip(_native(averages), variables, strict=True):
            value = tf.convert_to_tensor(variable)
            if by_xla and value.dtype != average.dtype:
                # XLA would do the cast before the loop, at each step. A value that depends on the
                # loop's counter must stay in the loop.
                value, _ = xla.optimization_barrier(value, count)
            average.assign(tf.cast(value, average.dtype), read_value=False)
        return count + 1

    # The loop runs once or never. For a `cond`, XLA would copy all averages at each step.
    (count,) = tf.while_loop(lambda count: count == 0, start, [tf.convert_to_tensor(updates)])
    if not by_xla:
        return
    # The loop reads the old values of the variables. The step writes the new values into the same
    # memory. XLA does not know which comes first, so it would copy every variable at every step.
    # `never` is False, but XLA cannot know that. The variables depend on it below, so the step must
    # come after the loop. In a plain graph, these assignments would copy every variable.
    never = count < 0
    for variable in {id(v): v for v in _native(variables)}.values():
        zero = tf.zeros((), variable.dtype)
        variable.assign(tf.where(never, zero, variable), read_value=False)


def _is_compiled_by_xla() -> bool:
    """Whether the graph that is being traced is, or is inside, a `tf.function(jit_compile=True)`.

    TensorFlow notes it in the graph's control flow, and has no public name for that.
    """
    graph = tf.compat.v1.get_default_graph()
    while graph is not None:
        context = graph._get_control_flow_context()
        while context is not None:
            if context.IsXLAContext():
                return True
            context = context.outer_context
        graph = getattr(graph, "outer_graph", None)
    return False


def loss_gradients(
    loss: Any, variables: Any, output_gradient: Callable[[Any], Any], tape: Any
) -> tuple[list[Any], list[Any]]:
    value = loss
    if callable(loss):
        with tape or tf.GradientTape() as tape:
            value = tf.convert_to_tensor(loss())
    variables = variables() if callable(variables) else variables
    return variables, tape.gradient(value, _native(variables), output_gradient(value))


@contextlib.contextmanager
def after(grads: Sequence[Any]) -> Iterator[None]:
    if tf.executing_eagerly():
        yield
        return
    given = [g.values if isinstance(g, tf.IndexedSlices) else g for g in grads if g is not None]
    given = [tf.convert_to_tensor(grad) for grad in given]
    if tf.distribute.has_strategy():  # The replicas build one graph together.
        with tf.control_dependencies(given):
            yield
        return
    # Only operations that write must wait, and they wait for the batch itself. With
    # `tf.control_dependencies`, constants and reads would also wait, and all would wait for the
    # gradients' operations. Then TensorFlow would simplify the step in another way than without a
    # wrapper, and the weights would have other bits.
    graph = tf.compat.v1.get_default_graph()
    before = len(graph.get_operations())
    yield
    sources = _sources(given)
    for operation in graph.get_operations()[before:]:
        if operation.type in CONDITIONS or WRITES.search(operation.type):
            operation._add_control_inputs(sources)


def _sources(tensors: Sequence[tf.Tensor]) -> list[tf.Operation]:
    """The operations that bring data into the graph, and on which the tensors depend."""
    found, seen, left = [], set(), [tensor.op for tensor in tensors]
    while left:
        operation = left.pop()
        if operation in seen:
            continue
        seen.add(operation)
        left += [tensor.op for tensor in operation.inputs]
        if operation.type in SOURCES and tf.resource not in [t.dtype for t in operation.outputs]:
            found.append(operation)
    return found


def part_of_sum(grad: Any) -> Any:
    replicas = tf.distribute.get_strategy().num_replicas_in_sync
    return grad if replicas == 1 else tf.math.scalar_mul(1.0 / replicas, grad)


def outside_trace(reads: Sequence[Any] = ()) -> contextlib.AbstractContextManager:
    if tf.distribute.has_strategy():  # A strategy decides where its variables are made.
        return contextlib.nullcontext()
    with tf.init_scope():
        have_values = all(
            tf.raw_ops.VarIsInitializedOp(resource=variable.handle) for variable in _native(reads)
        )
    return tf.init_scope() if have_values else contextlib.nullcontext()


def random_state_kept() -> contextlib.AbstractContextManager:
    return contextlib.nullcontext()


def eager_inference(function: Callable[..., Any]) -> Callable[..., Any]:
    def eager(*args: Any) -> Any:
        before = tf.config.functions_run_eagerly()
        tf.config.run_functions_eagerly(True)
        try:
            return function(*args)
        finally:
            tf.config.run_functions_eagerly(before)

    return eager


def place_in_code() -> Any:
    return tf.compat.v1.get_default_graph()


def compile_stateless(function: Callable[..., Any], by_xla: bool) -> Callable[..., Any] | None:
    if tf.distribute.has_strategy():
        return None
    return tf.function(function, jit_compile=by_xla, autograph=False, reduce_retracing=False)


def pass_over(arguments: Sequence[Any], batches: int, result: Callable[..., Any]) -> Any:
    (iterator,) = arguments
    batch = next(iterator)  # the end of the data ends the epoch, if there is no batch at all
    for _ in range(batches - 1):
        next(iterator, None)
    return result(batch)
