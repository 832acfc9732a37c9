"""The vocabulary on TensorFlow: a `cond` around assignments, on every replica of a strategy."""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

WRITES = re.compile("^Assign|^ResourceApply|^ResourceSparseApply|^ResourceScatter")
SOURCES = ("Placeholder", "IteratorGetNext", "OptionalGetValue")
CONDITIONS = ("If", "StatelessIf", "PartitionedCall", "StatefulPartitionedCall", "While")


def widest_float() -> str:
    return "float64"


def copy(tensor: Any) -> Any:
    return tf.identity(tensor)


def detached(variable: Any) -> Any:
    return tf.convert_to_tensor(variable)


def value(variable: Any, dtype: Any = None) -> Any:
    tensor = tf.convert_to_tensor(variable)
    return tensor if dtype is None else tf.cast(tensor, dtype)


def assign_quotients(sources: Sequence[Any], divisor: float, *targets: Sequence[Any]) -> None:
    values = [tf.convert_to_tensor(source) for source in sources]
    # As a tensor: by a constant, TensorFlow would multiply by a rounded reciprocal.
    number = None if divisor == 1 else tf.constant(divisor, "float64")
    _assign_quotients(values, number, [_native(each) for each in targets])


# Compiled, because two hundred operations from Python take as long as the memory. Of the variables
# none is read: a trace that reads its arguments cannot be called in another, or under a tape.
@tf.function
def _assign_quotients(values: list[Any], divisor: Any, targets: list[list[Any]]) -> None:
    for value, *chain in zip(values, *targets, strict=True):
        value = value if divisor is None else value / tf.cast(divisor, value.dtype)
        for target in chain:
            value = tf.cast(value, target.dtype)
            target.assign(value, read_value=False)


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
        # Not `number.read_value()`: the code that is being compiled would take note of the variable
        # and no longer run once it is deleted.
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
    if isinstance(weight, float):
        if weight == 1.0:
            return value
        return average + tf.constant(weight, average.dtype) * (value - average)
    weight = tf.cast(weight, average.dtype)
    return tf.where(weight == 1, value, average + weight * (value - average))


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

    if not targets:
        return
    if condition is True and not tf.distribute.has_strategy():
        assign(targets, sources)
        return
    condition = tf.convert_to_tensor(condition)
    if not tf.distribute.has_strategy():
        tf.cond(condition, lambda: assign(targets, sources), lambda: None)
        return

    # A branch may not leave the replica, and only `update` may assign a replica's copy: so the
    # condition moves out of the replicas, and each replica's assignments into one `update`.
    def assign_on_each_replica(strategy: Any, condition: Any) -> None:
        condition = strategy.experimental_local_results(condition)[0]
        (first, *rest), values = _native(targets), _native(sources)
        tf.cond(
            condition,
            lambda: (
                strategy.extended.update(
                    first,
                    lambda first, rest, values: assign([first, *rest], values),
                    args=(rest, values),
                    group=False,
                )
                and None
            ),
            lambda: None,
        )

    if tf.distribute.in_cross_replica_context():  # in a strategy's scope, outside of its steps
        assign_on_each_replica(tf.distribute.get_strategy(), condition)
        return
    tf.__internal__.distribute.interim.maybe_merge_call(
        assign_on_each_replica, tf.distribute.get_strategy(), condition
    )


def put_if(
    condition: Any,
    place: Any,
    rings: Sequence[Sequence[Any]],
    sources: Sequence[Any],
    new_values: Callable[[Sequence[Any]], Sequence[Any]],
) -> None:
    if tf.distribute.has_strategy():  # whose conditions are outside of its replicas, one by one
        for i, ring in enumerate(rings):
            here = tf.logical_and(condition, tf.equal(place, i))
            assign_if(here, ring, sources, lambda targets, s: new_values(s))
        return

    def put(ring: Sequence[Any]) -> None:
        for target, new in zip(ring, new_values(sources), strict=True):
            target.assign(tf.cast(new, target.dtype))

    def put_in_place() -> None:
        branches = [lambda ring=ring: put(ring) for ring in rings]
        tf.switch_case(tf.cast(place, "int32"), branches)

    tf.cond(tf.convert_to_tensor(condition), put_in_place, lambda: None)


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
    assign_if(condition, averages, variables, lambda a, v: lerp(a, v, weight()))


def start_averages(updates: Any, averages: Sequence[Any], variables: Sequence[Any]) -> None:
    assign_if(updates == 0, averages, variables, lambda a, v: [copy(value) for value in v])


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
    if tf.distribute.has_strategy():  # whose replicas build one graph together
        with tf.control_dependencies(given):
            yield
        return
    # What writes waits, and for the batch itself. If constants and reads waited too, as with
    # `tf.control_dependencies`, or if anything waited for the gradients' operations, TensorFlow
    # would no longer simplify the step as it does without a wrapper: other bits.
    graph = tf.compat.v1.get_default_graph()
    before = len(graph.get_operations())
    yield
    sources = _sources(given)
    for operation in graph.get_operations()[before:]:
        if operation.type in CONDITIONS or WRITES.search(operation.type):
            operation._add_control_inputs(sources)


def _sources(tensors: Sequence[tf.Tensor]) -> list[tf.Operation]:
    """The operations that bring data into a graph and that the tensors depend on."""
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
    if tf.distribute.has_strategy():  # which wants its variables to be made where it says
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


def pass_over(arguments: Sequence[Any], batches: int, result: Callable[..., Any]) -> Any:
    (iterator,) = arguments
    batch = next(iterator)  # the end of the data ends the epoch, if there is no batch at all
    for _ in range(batches - 1):
        next(iterator, None)
    return result(batch)
