"""The methods of Keras 2 and TensorFlow Addons: steps from a loss, and slots."""

import keras
import numpy as np
import pytest
import small_training as small
from keras import ops, optimizers

from keras_avg import SWA, MovingAverage

BACKEND = keras.backend.backend()
TOLERANCE = 1e-6  # rounding of a few float32 operations on numbers of order 1
# For a dozen steps that are compiled or not. Compiled kernels are fused, and sum in another order.
COMPILED_TOLERANCE = 1e-5

about_tensorflow = pytest.mark.skipif(BACKEND != "tensorflow", reason="about TensorFlow")


def two_variables():
    return keras.Variable([1.0, 2.0], name="first"), keras.Variable([3.0], name="second")


def noisy_model():
    """A model with batch-normalization statistics and seeds. A training loss changes them."""
    keras.utils.set_random_seed(42)
    return keras.Sequential(
        [
            keras.Input((5,)),
            keras.layers.Dense(6, activation="tanh"),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.5),  # On torch it draws from torch's global generator.
            keras.layers.GaussianDropout(0.5),
            keras.layers.Dense(1),
        ]
    )


def loss_of(model, batch=0):
    rows = slice(batch * small.BATCH_SIZE, (batch + 1) * small.BATCH_SIZE)
    x, y = small.X[rows], small.Y[rows]
    return lambda: ops.mean((ops.convert_to_tensor(y) - model(x, training=True)) ** 2)


def gradients_by_the_framework(model, loss):
    """Gradients as users compute them without keras_avg. Statistics and seeds do not change."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            value = loss()
        return tape.gradient(value, model.trainable_variables)
    if BACKEND == "torch":
        for variable in model.trainable_variables:
            variable.value.grad = None
        loss().backward()
        return [v.value.grad for v in model.trainable_variables]

    import jax

    def stateless(values):
        with keras.StatelessScope(zip(model.trainable_variables, values, strict=True)):
            return loss()

    return jax.grad(stateless)([v.value for v in model.trainable_variables])


def copy_values(sources, targets):
    for source, target in zip(sources, targets, strict=True):
        target.assign(small.numpy(source))


# Steps from a loss.


@pytest.mark.slow_on("jax")
def test_minimize_takes_one_step_downhill():
    v, w = two_variables()
    optimizer = SWA(optimizers.SGD(0.1), 0, 1)

    iterations = optimizer.minimize(lambda: ops.sum(3 * v * v) + ops.sum(2 * w * w), [v, w])

    assert int(iterations) == 1
    assert int(optimizer.iterations) == 1
    np.testing.assert_allclose(v, [1 - 0.1 * 6 * 1, 2 - 0.1 * 6 * 2], rtol=TOLERANCE)
    np.testing.assert_allclose(w, [3 - 0.1 * 4 * 3], rtol=TOLERANCE)
    small.assert_same_bits(small.slots(optimizer, [v, w]), [small.numpy(v), small.numpy(w)])


@pytest.mark.slow_on("jax", "tensorflow")
def test_minimize_is_apply_gradients_of_the_same_loss_bit_for_bit():
    minimized, applied = noisy_model(), noisy_model()
    for model in (minimized, applied):
        model.optimizer = MovingAverage(optimizers.Adam(0.01), clipnorm=0.1)

    for batch in range(3):
        keras.utils.set_random_seed(batch)
        grads = gradients_by_the_framework(applied, loss_of(applied, batch))
        pairs = zip(grads, applied.trainable_variables, strict=True)
        applied.optimizer.apply_gradients(pairs)
        keras.utils.set_random_seed(batch)
        minimized.optimizer.minimize(loss_of(minimized, batch), minimized.trainable_variables)
        if BACKEND == "jax":  # Here `gradients_by_the_framework` does not change the statistics.
            copy_values(minimized.non_trainable_variables, applied.non_trainable_variables)

    small.assert_same_bits(
        [small.numpy(v) for v in minimized.trainable_variables],
        [small.numpy(v) for v in applied.trainable_variables],
    )
    small.assert_same_bits(minimized.optimizer.get_weights(), applied.optimizer.get_weights())


@pytest.mark.slow_on("jax", "tensorflow")
def test_minimize_has_the_effects_of_a_train_step_on_statistics_and_seeds():
    trained, minimized = noisy_model(), noisy_model()
    before = [small.numpy(v) for v in minimized.non_trainable_variables]
    trained.compile(SWA(optimizers.SGD(0.1), 0, 1), "mse")
    optimizer = SWA(optimizers.SGD(0.1), 0, 1)

    for batch in range(3):
        rows = slice(batch * small.BATCH_SIZE, (batch + 1) * small.BATCH_SIZE)
        keras.utils.set_random_seed(batch)
        trained.train_on_batch(small.X[rows], small.Y[rows])
        keras.utils.set_random_seed(batch)
        optimizer.minimize(loss_of(minimized, batch), minimized.trainable_variables)

    moved = [
        variable.path
        for variable, old in zip(minimized.non_trainable_variables, before, strict=True)
        if not np.array_equal(variable, old)
    ]
    assert len(moved) == (3 if BACKEND == "torch" else 4)  # mean, variance, seeds
    for variable, other in zip(minimized.variables, trained.variables, strict=True):
        np.testing.assert_allclose(
            variable, other, rtol=COMPILED_TOLERANCE, atol=COMPILED_TOLERANCE, err_msg=variable.path
        )


@pytest.mark.slow_on("jax")
def test_variables_that_the_loss_makes_are_trained():
    def deferred():
        keras.utils.set_random_seed(5)
        return keras.Sequential([keras.layers.Dense(4), keras.layers.BatchNormalization()])

    model, called = deferred(), deferred()
    optimizer = SWA(optimizers.SGD(0.1), 0, 1)

    optimizer.minimize(loss_of(model), lambda: model.trainable_weights)
    loss_of(called)()

    for variable, other in zip(model.trainable_variables, called.trainable_variables, strict=True):
        assert not np.array_equal(variable, other), variable.path
        np.testing.assert_array_equal(optimizer.get_slot(variable, "average"), variable)
    for variable, other in zip(
        model.non_trainable_variables, called.non_trainable_variables, strict=True
    ):
        np.testing.assert_allclose(variable, other, rtol=TOLERANCE)  # There was only one pass.
    optimizer.minimize(loss_of(model), lambda: model.trainable_weights)
    assert int(optimizer.iterations) == 2


def test_a_loss_is_computed_once_in_each_step():
    v, _ = two_variables()
    optimizer, calls = SWA("sgd"), []

    def loss():
        calls.append(1)
        return ops.sum(v * v)

    optimizer.minimize(loss, [v])
    assert len(calls) == 1
    optimizer.minimize(loss, lambda: [v])
    assert len(calls) == 2


def test_a_statistic_that_the_loss_assigns_is_assigned_once():
    v, _ = two_variables()
    count = keras.Variable(0.0, trainable=False)

    def loss():
        count.assign_add(1.0)
        return ops.sum(v * v) * count

    # The optimizer is not built. So JAX computes the loss once more, to make the variables.
    optimizer = SWA(optimizers.SGD(0.0))
    for step in range(3):
        optimizer.minimize(loss, lambda: [v])
        assert float(ops.convert_to_numpy(count)) == step + 1


def test_grad_loss_weighs_the_elements_of_the_loss():
    v, _ = two_variables()
    optimizer = SWA(optimizers.SGD(1.0))
    optimizer.minimize(lambda: v * v, [v], grad_loss=np.array([0.5, 0.25], "float32"))
    np.testing.assert_allclose(v, [1 - 0.5 * 2 * 1, 2 - 0.25 * 2 * 2], rtol=TOLERANCE)


def test_a_loss_of_several_elements_is_summed():
    v, _ = two_variables()
    SWA(optimizers.SGD(0.25)).minimize(lambda: v * v, [v])
    np.testing.assert_allclose(v, [0.5, 1.0], rtol=TOLERANCE)


@pytest.mark.parametrize("take", ["minimize", "get_updates"])
@pytest.mark.parametrize("clipping", [{}, {"clipnorm": 1.0}])
def test_a_static_loss_scale_changes_nothing(take, clipping):
    plain, scaled = two_variables()[0], two_variables()[0]
    rate = {"learning_rate": 0.1}
    for variable, inner in (
        (plain, optimizers.SGD(**rate)),
        (scaled, optimizers.SGD(**rate, loss_scale_factor=1024.0)),
    ):
        getattr(SWA(inner, **clipping), take)(lambda v=variable: ops.sum(v * v), [variable])
    small.assert_same_bits([small.numpy(scaled)], [small.numpy(plain)])
    assert small.numpy(plain)[0] < 1.0


def test_get_gradients_gives_the_gradients_and_takes_no_step():
    v, w = two_variables()
    inner = optimizers.SGD(0.1, loss_scale_factor=1024.0)
    optimizer = SWA(inner, clipnorm=0.1)
    first, second = optimizer.get_gradients(lambda: ops.sum(3 * v * v) + ops.sum(w), [v, w])
    np.testing.assert_allclose(ops.convert_to_numpy(first), [6.0, 12.0], rtol=TOLERANCE)
    np.testing.assert_allclose(ops.convert_to_numpy(second), [1.0], rtol=TOLERANCE)
    np.testing.assert_array_equal(v, [1.0, 2.0])


@pytest.mark.parametrize("method", ["get_gradients", "get_updates"])
def test_an_error_names_a_variable_that_the_loss_does_not_use(method):
    v, w = two_variables()
    optimizer = SWA("sgd")
    with pytest.raises(ValueError, match=r"no gradient for the variables \['second'\]"):
        getattr(optimizer, method)(lambda: ops.sum(v * v), [v, w])
    np.testing.assert_array_equal(v, [1.0, 2.0])


def test_get_updates_takes_one_step_and_returns_a_list():
    v, w = two_variables()
    optimizer = SWA(optimizers.SGD(0.1))
    (iterations,) = optimizer.get_updates(lambda: ops.sum(3 * v * v) + ops.sum(w), [v, w])
    assert int(iterations) == 1
    np.testing.assert_allclose(v, [0.4, 0.8], rtol=TOLERANCE)


def test_minimize_warns_of_a_variable_that_the_loss_does_not_use_and_does_not_change_it():
    v, w = two_variables()
    optimizer = SWA(optimizers.SGD(0.1, weight_decay=0.1))
    with pytest.warns(UserWarning, match="Gradients do not exist for variables"):
        optimizer.minimize(lambda: ops.sum(v * v), [v, w])
    np.testing.assert_array_equal(w, [3.0])


def test_a_frozen_variable_has_no_gradient():
    v, w = two_variables()
    w.trainable = False
    with pytest.raises(ValueError, match="they are frozen"):
        SWA("sgd").get_gradients(lambda: ops.sum(v * v) + ops.sum(w), [v, w])


def test_a_value_instead_of_a_loss_is_refused():
    v, _ = two_variables()
    with pytest.raises(ValueError, match="Pass a function without arguments"):
        SWA("sgd").minimize(ops.sum(v * v), [v])


@pytest.mark.skipif(BACKEND == "tensorflow", reason="TensorFlow has tapes")
def test_a_tape_is_refused_on_other_backends_than_tensorflow():
    v, _ = two_variables()
    with pytest.raises(ValueError, match="tapes are TensorFlow's"):
        SWA("sgd").minimize(lambda: ops.sum(v * v), [v], tape=object())


@pytest.mark.skipif(BACKEND != "tensorflow", reason="tapes are TensorFlow's")
def test_an_object_that_is_not_a_tape_is_refused():
    v, _ = two_variables()
    with pytest.raises(TypeError, match=r"must be a `tf.GradientTape`. Received: tape=7"):
        SWA("sgd").minimize(lambda: ops.sum(v * v), [v], tape=7)


@pytest.mark.parametrize("wrong", ["tensor", "number"])
def test_an_object_that_is_not_a_variable_is_refused(wrong):
    v, _ = two_variables()
    others = {"tensor": ops.ones((2,)), "number": 1.0}
    with pytest.raises(ValueError, match="`var_list` must be a list of variables"):
        SWA("sgd").minimize(lambda: ops.sum(v * v), [v, others[wrong]])


def test_minimize_is_refused_while_the_averages_are_in_the_model():
    v, _ = two_variables()
    optimizer, calls = SWA(optimizers.SGD(0.1), 0, 1), []

    def loss():
        calls.append(1)
        return ops.sum(v * v)

    optimizer.minimize(loss, [v])
    optimizer.swap_weights()
    with pytest.raises(RuntimeError, match="training is refused"):
        optimizer.minimize(loss, [v])
    assert len(calls) == 1


def test_with_a_multi_optimizer_each_member_takes_its_step():
    if not hasattr(optimizers, "MultiOptimizer"):
        pytest.skip("MultiOptimizer came with Keras 3.15")
    v, w = two_variables()
    members = optimizers.OptimizerMap(
        optimizers.SGD(0.1), {"second": MovingAverage(optimizers.SGD(1.0, momentum=0.9))}
    )
    optimizer = SWA(optimizers.MultiOptimizer(members), 0, 1)

    optimizer.minimize(lambda: ops.sum(v) + ops.sum(w), [v, w])

    np.testing.assert_allclose(v, [0.9, 1.9], rtol=TOLERANCE)
    np.testing.assert_allclose(w, [2.0], rtol=TOLERANCE)
    assert optimizer.get_slot_names() == ["average", "momentum"]
    assert optimizer.get_slot(v, "momentum") is None
    np.testing.assert_allclose(optimizer.get_slot(w, "momentum"), [-1.0], rtol=TOLERANCE)


@about_tensorflow
@pytest.mark.parametrize("grad_loss", [None, 0.5])
def test_minimize_takes_a_tensor_with_its_tape(grad_loss):
    import tensorflow as tf

    v, _ = two_variables()
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(v.value * v.value)
    SWA(optimizers.SGD(0.5)).minimize(loss, [v], grad_loss, tape=tape)
    np.testing.assert_allclose(v, [0.0, 0.0] if grad_loss is None else [0.5, 1.0], atol=TOLERANCE)


@pytest.mark.slow_on("tensorflow")
@about_tensorflow
def test_minimize_works_inside_a_compiled_function():
    import tensorflow as tf

    compiled, eager = noisy_model(), noisy_model()
    for model in (compiled, eager):
        model.optimizer = SWA(optimizers.SGD(0.1), 0, 1)
        step = lambda model=model: model.optimizer.minimize(  # noqa: E731
            loss_of(model), model.trainable_variables
        )
        step = tf.function(step) if model is compiled else step
        assert [int(step()) for _ in range(3)] == [1, 2, 3]

    for variable, other in zip(compiled.variables, eager.variables, strict=True):
        np.testing.assert_allclose(
            variable, other, rtol=COMPILED_TOLERANCE, atol=COMPILED_TOLERANCE
        )


# Steps from gradients.


def test_apply_gradients_returns_iterations():
    v, _ = two_variables()
    optimizer = SWA(optimizers.SGD(0.1))
    assert int(optimizer.apply_gradients([(ops.ones((2,)), v)], name="step")) == 1
    assert int(optimizer.apply_gradients(zip([ops.ones((2,))], [v], strict=True))) == 2


@pytest.mark.parametrize("grads", [[], [None, None]])
def test_no_gradients_at_all_are_refused(grads):
    variables = two_variables()
    optimizer = SWA("sgd")
    with pytest.raises(ValueError, match="No gradients provided for any variable"):
        optimizer.apply_gradients(list(zip(grads, variables, strict=False)))
    assert not optimizer.built


@pytest.mark.parametrize("wrong", [[1.0], [(1.0, 2.0, 3.0)]])
def test_an_argument_that_is_not_a_list_of_pairs_is_refused(wrong):
    with pytest.raises(TypeError, match=r"\(gradient, variable\) pairs"):
        SWA("sgd").apply_gradients(wrong)


def test_pairs_in_the_wrong_order_are_refused():
    v, _ = two_variables()
    with pytest.raises(TypeError, match="Received as variables: "):
        SWA("sgd").apply_gradients([(v, ops.ones((2,)))])


def test_aggregated_gradients_are_not_aggregated_again():
    v, _ = two_variables()
    doubled = lambda pairs: [(grad * 2.0, variable) for grad, variable in pairs]  # noqa: E731
    plus_one = lambda pairs: [(grad + 1.0, variable) for grad, variable in pairs]  # noqa: E731
    optimizer = SWA(
        optimizers.SGD(1.0), gradient_aggregator=doubled, gradient_transformers=[plus_one]
    )
    pairs = [(ops.ones((2,)), v)]
    optimizer.apply_gradients(pairs, experimental_aggregate_gradients=False)
    np.testing.assert_allclose(v, [1.0 - 2.0, 2.0 - 2.0], atol=TOLERANCE)
    optimizer.apply_gradients(pairs)
    np.testing.assert_allclose(v, [-1.0 - 3.0, 0.0 - 3.0], atol=TOLERANCE)


# Attributes.


def test_the_name_of_an_optimizer_is_an_attribute():
    assert SWA("sgd").name == "SWA"
    assert SWA("sgd", name="mean").name == "mean"


# Learning rates.


@keras.saving.register_keras_serializable(package="keras_avg_tests")
def a_tenth():
    return 0.1


@pytest.mark.parametrize(
    "make",
    [
        lambda rate: SWA(optimizers.SGD(learning_rate=rate)),
        lambda rate: SWA("sgd", learning_rate=rate),
        lambda rate: SWA("sgd", lr=rate),
    ],
    ids=["inner", "learning_rate", "lr"],
)
def test_a_learning_rate_function_is_called_at_each_step(make):
    rates = [0.25, 0.5]
    v, _ = two_variables()
    optimizer = make(lambda: rates[0])
    assert optimizer.learning_rate == 0.25
    optimizer.minimize(lambda: ops.sum(v), [v])
    np.testing.assert_allclose(v, [0.75, 1.75], rtol=TOLERANCE)
    rates.pop(0)
    optimizer.minimize(lambda: ops.sum(v), [v])
    np.testing.assert_allclose(v, [0.25, 1.25], rtol=TOLERANCE)


def test_a_learning_rate_function_is_part_of_the_config():
    optimizer = SWA(optimizers.SGD(a_tenth))
    again = SWA.from_config(optimizer.get_config())
    assert again.learning_rate == 0.1
    assert again.get_config() == optimizer.get_config()


def test_a_learning_rate_lambda_is_loaded_only_without_safe_mode():
    with pytest.warns(UserWarning, match="includes a `lambda`"):
        config = SWA("sgd", learning_rate=lambda: 0.1).get_config()
    with pytest.raises(ValueError, match="safe_mode=False"):
        SWA.from_config(config)


# Slots.


@pytest.mark.parametrize(
    ("inner", "names"),
    [
        (lambda: optimizers.SGD(), []),
        (lambda: optimizers.SGD(momentum=0.9), ["momentum"]),
        (lambda: optimizers.Adam(amsgrad=True), ["momentum", "velocity", "velocity_hat"]),
        (lambda: optimizers.Ftrl(), ["accumulator", "linear"]),
        (lambda: optimizers.Adafactor(), ["r", "c", "velocity"]),
        (
            lambda: optimizers.SGD(momentum=0.9, gradient_accumulation_steps=2),
            ["gradient_accumulator", "momentum"],
        ),
    ],
)
@pytest.mark.parametrize("nest", [SWA, lambda inner: SWA(MovingAverage(inner))])
def test_slots_of_the_inner_optimizer_are_found_by_the_names_of_keras(inner, names, nest):
    optimizer = nest(inner())
    variables = [keras.Variable(np.ones((2, 3))), keras.Variable(np.ones((2, 3)))]
    optimizer.build(variables)

    assert optimizer.get_slot_names() == ["average", *names]

    slots = [optimizer.get_slot(v, name) for v in variables for name in ["average", *names]]
    assert len({id(slot) for slot in slots}) == len(slots)
    own = {id(v) for v in optimizer.variables}
    assert all(id(slot) in own for slot in slots)


def test_each_variable_has_its_own_slot_whatever_it_is_called():
    alike = [keras.Variable([1.0], name="same"), keras.Variable([2.0], name="same")]
    optimizer = SWA(optimizers.SGD(1.0, momentum=0.9))
    small.apply(optimizer, alike, [[3.0], [5.0]])
    momenta = [small.numpy(optimizer.get_slot(v, "momentum"))[0] for v in alike]
    assert momenta == [-3.0, -5.0]


def test_the_inner_wrapper_returns_its_own_average():
    v, _ = two_variables()
    optimizer = SWA(MovingAverage("sgd"))
    optimizer.build([v])
    outer, inner = (
        optimizer.get_slot(v, "average"),
        optimizer.inner_optimizer.get_slot(v, "average"),
    )
    assert outer is not inner
    assert optimizer.get_slot_names() == ["average"]


def test_unknown_slots_are_refused():
    v, w = two_variables()
    optimizer = SWA(optimizers.SGD(momentum=0.9))
    assert optimizer.get_slot_names() == ["average"]
    with pytest.raises(ValueError, match="before it is built"):
        optimizer.get_slot(v, "average")
    optimizer.build([v])
    with pytest.raises(ValueError, match=r"The slots of 'SWA' are: \['average', 'momentum'\]"):
        optimizer.get_slot(v, "velocity")
    for member in (optimizer.get_slot, optimizer.add_slot):
        with pytest.raises(ValueError, match="was not built with this variable"):
            member(w, "average")


def test_an_added_slot_is_made_once():
    v, w = two_variables()
    optimizer = SWA("sgd")
    optimizer.build([v, w])

    start = optimizer.add_slot(v, "start", initializer="ones")

    assert optimizer.add_slot(v, "start") is start
    assert optimizer.get_slot(v, "start") is start
    assert optimizer.get_slot(w, "start") is None
    assert optimizer.add_slot(w, "start") is not start
    assert optimizer.add_slot(v, "average") is optimizer.get_slot(v, "average")
    assert optimizer.get_slot_names() == ["average", "start"]
    np.testing.assert_array_equal(start, [1.0, 1.0])
    assert any(variable is start for variable in optimizer.variables)


def test_an_initializer_that_returns_the_variable_itself_is_copied():
    v, _ = two_variables()
    optimizer = SWA(optimizers.SGD(1.0))
    optimizer.build([v])
    start = optimizer.add_slot(v, "start", lambda shape, dtype: v.value)
    weight = optimizer.add_weight("weight", (2,), initializer=lambda shape, dtype: v.value)

    optimizer.minimize(lambda: ops.sum(v), [v])

    np.testing.assert_array_equal(v, [0.0, 1.0])
    np.testing.assert_array_equal(start, [1.0, 2.0])
    np.testing.assert_array_equal(weight, [1.0, 2.0])


@pytest.mark.slow_on("jax", "tensorflow")
def test_training_works_with_a_slot_that_began_with_the_variable():
    # On JAX a train step donates its buffers, so two variables must not share one.
    optimizer = SWA("sgd", 0, 1)
    model = small.fit(small.model(optimizer), epochs=1)
    kernel = model.trainable_variables[0]
    value = small.numpy(kernel)
    start = optimizer.add_slot(kernel, "start", lambda shape, dtype: kernel.value)
    small.fit(model)
    np.testing.assert_array_equal(start, value)
    assert not np.array_equal(kernel, value)


def test_a_slot_may_not_hide_one_of_the_inner_optimizer():
    v, _ = two_variables()
    optimizer = SWA(optimizers.SGD(momentum=0.9))
    optimizer.build([v])
    with pytest.raises(ValueError, match="has a slot of that name"):
        optimizer.add_slot(v, "momentum")


@pytest.mark.parametrize("name", ["", None, "a/b"])
def test_invalid_names_of_variables_are_refused(name):
    v, _ = two_variables()
    optimizer = SWA("sgd")
    optimizer.build([v])
    with pytest.raises(ValueError, match="`name` must be a non-empty string"):
        optimizer.add_slot(v, name)
    with pytest.raises(ValueError, match="`name` must be a non-empty string"):
        optimizer.add_weight(name, ())


def test_an_added_weight_is_a_variable_of_the_optimizer():
    v, _ = two_variables()
    optimizer = SWA("sgd")
    early = optimizer.add_weight("early", (2,), initializer="ones", trainable=False)
    optimizer.build([v])
    late = optimizer.add_weight("late", (), dtype="int32", aggregation="only_first_replica")

    assert optimizer.add_weight("early", (2,)) is early
    assert {id(early), id(late)} <= {id(variable) for variable in optimizer.variables}
    assert late.dtype == "int32"
    assert late.aggregation == "only_first_replica"
    np.testing.assert_array_equal(early, [1.0, 1.0])
    with pytest.raises(ValueError, match="of shape"):
        optimizer.add_weight("early", (3,))
    with pytest.raises(ValueError, match="not trainable"):
        optimizer.add_weight("other", (), trainable=True)
    with pytest.raises(ValueError, match="synchronization='on_read'"):
        optimizer.add_weight("other", (), synchronization="on_read")


@about_tensorflow
def test_settings_may_be_members_of_tensorflow_enumerations():
    import tensorflow as tf

    weight = SWA("sgd").add_weight(
        "weight",
        (),
        synchronization=tf.VariableSynchronization.AUTO,
        aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
    )
    assert weight.aggregation == "only_first_replica"


def test_set_weights_sets_added_variables():
    v, _ = two_variables()
    optimizer = SWA("sgd")
    optimizer.build([v])
    slot, weight = optimizer.add_slot(v, "start"), optimizer.add_weight("weight", (3,))
    weights = optimizer.get_weights()
    changed = [array + 1 for array in weights]

    optimizer.set_weights(changed)

    small.assert_same_bits(optimizer.get_weights(), changed)
    np.testing.assert_array_equal(slot, [1.0, 1.0])
    np.testing.assert_array_equal(weight, [1.0, 1.0, 1.0])


def test_paths_of_added_variables_are_unique_in_nested_wrappers():
    v, _ = two_variables()
    outer = SWA(SWA("sgd"))
    outer.build([v])
    for optimizer in (outer, outer.inner_optimizer):
        optimizer.add_weight("weight", ())
    outer.add_slot(v, "outer")
    paths = [variable.path for variable in outer.variables]
    assert len(set(paths)) == len(paths)


def with_added(optimizer):
    """A model that was trained for an epoch. Its optimizer has added slots and weights."""
    model = small.fit(small.model(optimizer), epochs=1)
    random = np.random.default_rng(3)
    # They are added in an order that a file does not keep.
    optimizer.add_weight("second", (), dtype="int32").assign(7)
    for variable in reversed(model.trainable_variables):
        optimizer.add_slot(variable, "start").assign(random.normal(size=variable.shape))
    optimizer.add_slot(model.trainable_variables[1], "a_1").assign(random.normal(size=(6,)))
    optimizer.add_weight("first", (2, 3)).assign(random.normal(size=(2, 3)))
    return model


@pytest.mark.slow_on("jax", "tensorflow")
@pytest.mark.sample(1)
@pytest.mark.parametrize("inner", [lambda: "adam", lambda: MovingAverage("adam")])
def test_a_model_file_restores_added_variables(tmp_path, inner):
    model = with_added(SWA(inner(), 0, 2))
    model.save(tmp_path / "model.keras")

    loaded = keras.saving.load_model(tmp_path / "model.keras")

    small.assert_same_bits(loaded.optimizer.get_weights(), model.optimizer.get_weights())
    assert [v.dtype for v in loaded.optimizer.variables] == [
        v.dtype for v in model.optimizer.variables
    ]
    assert loaded.optimizer.get_slot_names() == model.optimizer.get_slot_names()
    for variable, other in zip(loaded.trainable_variables, model.trainable_variables, strict=True):
        np.testing.assert_array_equal(
            loaded.optimizer.get_slot(variable, "start"), model.optimizer.get_slot(other, "start")
        )
    for trained in (model, loaded):
        small.fit(trained)
    small.assert_same_bits(loaded.get_weights(), model.get_weights())
    small.assert_same_bits(loaded.optimizer.get_weights(), model.optimizer.get_weights())


@pytest.mark.slow_on("tensorflow")
def test_a_weights_file_restores_added_variables(tmp_path):
    model, other = with_added(SWA("adam", 0, 2)), with_added(SWA("adam", 0, 2))
    for variable in other.optimizer.variables:
        variable.assign(np.zeros(variable.shape))
    model.save_weights(tmp_path / "model.weights.h5")
    other.load_weights(tmp_path / "model.weights.h5")
    small.assert_same_bits(other.optimizer.get_weights(), model.optimizer.get_weights())


@pytest.mark.slow_on("tensorflow")
def test_an_added_variable_that_a_file_lacks_keeps_its_value(tmp_path):
    plain = small.fit(small.model(SWA("adam", 0, 2)), epochs=2)
    plain.save_weights(tmp_path / "plain.weights.h5")
    model = with_added(SWA("adam", 0, 2))
    variable = model.trainable_variables[0]
    start = small.numpy(model.optimizer.get_slot(variable, "start"))

    with pytest.warns(UserWarning, match="keep those they have"):
        model.load_weights(tmp_path / "plain.weights.h5")

    np.testing.assert_array_equal(model.optimizer.get_slot(variable, "start"), start)
    np.testing.assert_array_equal(
        model.optimizer.get_slot(variable, "average"),
        plain.optimizer.get_slot(plain.trainable_variables[0], "average"),
    )


@pytest.mark.parametrize(
    "stored", [{"slot_start_0": np.zeros((9,))}, {"slot_start_7": np.zeros(())}]
)
def test_an_added_slot_that_does_not_fit_is_refused_and_changes_nothing(stored):
    v, _ = two_variables()
    optimizer = SWA("sgd")
    optimizer.build([v])
    optimizer.apply_gradients([(ops.ones((2,)), v)])
    store = {}
    optimizer.save_own_variables(store)
    before = optimizer.get_weights()

    with pytest.raises(ValueError, match="does not fit optimizer"):
        optimizer.load_own_variables({k: a + 1 for k, a in store.items()} | stored)

    small.assert_same_bits(optimizer.get_weights(), before)


@pytest.mark.skipif(BACKEND != "jax", reason="others always have 64 bits")
def test_an_added_weight_of_64_bits_is_loaded_where_only_32_bits_exist():
    v, _ = two_variables()
    optimizer = SWA("sgd")
    optimizer.build([v])
    store = {}
    optimizer.save_own_variables(store)
    optimizer.load_own_variables(store | {"weight_count": np.array(5, "int64")})
    weight = optimizer.add_weight("count", ())
    assert (weight.dtype, int(weight)) == ("int32", 5)


@pytest.mark.skipif(BACKEND != "jax", reason="only JAX' trainer takes the values away")
def test_adding_a_slot_is_refused_while_the_trainer_holds_the_state():
    errors = []

    class Adds(keras.callbacks.Callback):
        def __init__(self, optimizer, variable):
            super().__init__()
            self.uses = [
                lambda: optimizer.add_slot(variable, "start"),
                lambda: optimizer.add_weight("weight", ()),
                lambda: optimizer.minimize(lambda: ops.sum(variable), [variable]),
                lambda: optimizer.shadow_copy([variable]),
            ]

        def on_train_batch_end(self, batch, logs=None):
            for use in self.uses:
                try:
                    use()
                except RuntimeError as error:
                    errors.append(str(error))

    optimizer = SWA("sgd", 0, 1)
    model = small.model(optimizer)
    small.fit(model, epochs=1, callbacks=[Adds(optimizer, model.trainable_variables[0])])
    assert len(errors) == 4 * small.BATCHES
    assert all("model.jax_state_sync()" in error for error in errors)


@pytest.mark.slow_on("jax")
def test_a_shadow_copy_starts_from_the_variables():
    model = noisy_model()
    optimizer = SWA("sgd", 0, 1)
    assert not optimizer.has_shadow_copy

    optimizer.shadow_copy(model.variables)

    assert optimizer.has_shadow_copy
    small.assert_same_bits(
        small.slots(optimizer, model.trainable_variables),
        [small.numpy(v) for v in model.trainable_variables],
    )
    with pytest.raises(ValueError, match="was not built with this variable"):
        optimizer.get_slot(model.non_trainable_variables[0], "average")
    with pytest.raises(ValueError, match="no snapshot"):
        optimizer.assign_average_vars(model.variables)
    optimizer.minimize(loss_of(model), model.trainable_variables)
    averages = small.slots(optimizer, model.trainable_variables)
    optimizer.shadow_copy(model.variables)  # Training has started, so the averages do not change.
    small.assert_same_bits(small.slots(optimizer, model.trainable_variables), averages)
    with pytest.raises(ValueError, match="was not built with this variable"):
        optimizer.shadow_copy([keras.Variable([1.0])])


# TensorFlow's own checkpoints.


@pytest.mark.sample(2)
@about_tensorflow
@pytest.mark.parametrize("parts", [["model"], ["optimizer"], ["model", "optimizer"]])
@pytest.mark.parametrize(
    "wrapped", [lambda inner: SWA(inner, 0, 2), lambda inner: SWA(MovingAverage(inner), 0, 2)]
)
def test_a_tensorflow_checkpoint_restores_every_bit(parts, wrapped, tmp_path):
    import tensorflow as tf

    def checkpoint(model):
        objects = {"model": model, "optimizer": model.optimizer}
        return tf.train.Checkpoint(**{part: objects[part] for part in parts})

    model = with_added(wrapped(optimizers.SGD(0.1, momentum=0.9)))
    path = checkpoint(model).save(str(tmp_path / "checkpoint"))
    weights = model.get_weights(), model.optimizer.get_weights()
    other = with_added(wrapped(optimizers.SGD(0.1, momentum=0.9)))
    for variable in [*other.variables, *other.optimizer.variables]:
        variable.assign(np.zeros(variable.shape))

    status = checkpoint(other).restore(path)

    status.assert_existing_objects_matched()
    status.assert_consumed()
    small.assert_same_bits(other.optimizer.get_weights(), weights[1])
    if "model" in parts:
        small.assert_same_bits(other.get_weights(), weights[0])


@about_tensorflow
def test_the_slot_methods_exist_but_are_hidden_from_tensorflow():
    optimizer = SWA("sgd")
    assert "get_slot_names" not in dir(optimizer)
    assert "swap_weights" in dir(optimizer)
    assert callable(optimizer.get_slot_names)
