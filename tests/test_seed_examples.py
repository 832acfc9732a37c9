"""The examples of the original API pages work, with `keras` instead of `tf.keras`."""

import keras
import numpy as np
import pytest
import small_training as small
from keras import ops, optimizers

import keras_avg

BACKEND = keras.backend.backend()
TOLERANCE = 1e-6  # rounding of a few float32 operations on numbers of order 1

about_tensorflow = pytest.mark.skipif(BACKEND != "tensorflow", reason="about TensorFlow")
# The pages show plain optimizers. A wrapper must work in the same examples.
each_wrapper = pytest.mark.parametrize(
    "wrapped", [keras_avg.SWA, keras_avg.MovingAverage], ids=lambda kind: kind.__name__
)


def deferred_model():
    model = keras.Sequential()
    model.add(keras.layers.Dense(3, activation="relu"))
    model.add(keras.layers.Dense(1, activation="sigmoid"))
    return model


# tfa.optimizers.AveragedOptimizerWrapper and tf.keras.optimizers.Optimizer


@each_wrapper
def test_the_usage_example_works(wrapped):
    """Pages AveragedOptimizerWrapper and Optimizer, "Usage"."""
    var1, var2 = keras.Variable(1.0), keras.Variable(2.0)
    opt = wrapped(optimizers.SGD(learning_rate=0.1))
    loss = lambda: 3 * var1 * var1 + 2 * var2 * var2  # noqa: E731

    opt_op = opt.minimize(loss, var_list=[var1, var2])

    assert int(opt_op) == 1
    np.testing.assert_allclose(var1, 1.0 - 0.1 * 6.0, rtol=TOLERANCE)
    np.testing.assert_allclose(var2, 2.0 - 0.1 * 8.0, rtol=TOLERANCE)


@pytest.mark.slow_on("jax")
@each_wrapper
def test_the_example_of_a_custom_training_loop_works(wrapped):
    """Pages AveragedOptimizerWrapper and Optimizer, "Custom training loop"."""
    data = [(small.X[i : i + 8], small.Y[i : i + 8] > 0) for i in range(0, 48, 8)]
    opt = wrapped(optimizers.SGD(learning_rate=0.1))
    model = deferred_model()
    loss_fn = lambda: keras.losses.mean_squared_error(output, model(input))  # noqa: E731
    var_list_fn = lambda: model.trainable_weights  # noqa: E731
    losses = []
    for input, output in data * 5:  # noqa: B007 (the functions read them)
        opt.minimize(loss_fn, var_list_fn)
        losses.append(np.mean(ops.convert_to_numpy(loss_fn())))

    assert int(opt.iterations) == 30
    assert np.mean(losses[-6:]) < np.mean(losses[:6])
    assert all(opt.get_slot(v, "average") is not None for v in model.trainable_weights)


@each_wrapper
def test_the_example_of_processing_gradients_works(wrapped):
    """Pages AveragedOptimizerWrapper and Optimizer, "Processing gradients"."""
    variables = [keras.Variable([1.0]), keras.Variable([2.0])]
    opt = wrapped(optimizers.SGD(learning_rate=0.1))
    loss = lambda: ops.sum(3 * variables[0] + 50 * variables[1])  # noqa: E731
    process_gradient = lambda g: ops.clip(g, -10.0, 10.0)  # noqa: E731

    grads = opt.get_gradients(loss, variables)
    processed_grads = [process_gradient(g) for g in grads]
    opt.apply_gradients(zip(processed_grads, variables, strict=True))

    np.testing.assert_allclose(variables[0], [1.0 - 0.3], rtol=TOLERANCE)
    np.testing.assert_allclose(variables[1], [2.0 - 1.0], rtol=TOLERANCE)


@about_tensorflow
@each_wrapper
def test_the_example_of_processing_gradients_of_a_tape_works(wrapped):
    """Pages AveragedOptimizerWrapper and Optimizer, "Processing gradients", word for word."""
    import tensorflow as tf

    variables = [tf.Variable([1.0]), tf.Variable([2.0])]
    opt = wrapped(optimizers.SGD(learning_rate=0.1))
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(3 * variables[0] + 50 * variables[1])
    grads = tape.gradient(loss, variables)
    processed_grads = [tf.clip_by_value(g, -10.0, 10.0) for g in grads]
    opt.apply_gradients(zip(processed_grads, variables, strict=True))

    np.testing.assert_allclose(variables[0], [1.0 - 0.3], rtol=TOLERANCE)
    np.testing.assert_allclose(variables[1], [2.0 - 1.0], rtol=TOLERANCE)


@each_wrapper
def test_the_example_of_hyperparameters_works(wrapped):
    """Pages AveragedOptimizerWrapper and Optimizer, "Hyper parameters"."""
    var1, var2 = keras.Variable(1.0), keras.Variable(2.0)
    opt = wrapped(optimizers.SGD(learning_rate=0.1))
    loss = lambda: 3 * var1 + 2 * var2  # noqa: E731
    opt.minimize(loss, var_list=[var1, var2])
    opt.learning_rate = 0.05
    opt.minimize(loss, var_list=[var1, var2])

    np.testing.assert_allclose(var1, 1.0 - 0.3 - 0.15, rtol=TOLERANCE)
    np.testing.assert_allclose(var2, 2.0 - 0.2 - 0.1, rtol=TOLERANCE)
    np.testing.assert_allclose(opt.lr, 0.05, rtol=TOLERANCE)


@pytest.mark.slow_on("jax")
def test_weights_are_updated_to_their_mean_before_saving(tmp_path):
    """Pages AveragedOptimizerWrapper, MovingAverage and SWA, `assign_average_vars`."""
    model = small.model()
    opt = keras_avg.SWA(optimizers.SGD(0.05), 4, 2)
    model.compile(opt, "mse")
    small.fit(model)
    averages = small.slots(opt, model.trainable_variables)

    opt.assign_average_vars(model.variables)

    model.save(tmp_path / "model.keras")
    saved = keras.saving.load_model(tmp_path / "model.keras")
    small.assert_same_bits([small.numpy(v) for v in saved.trainable_variables], averages)


# tfa.optimizers.MovingAverage, tfa.optimizers.SWA


def test_the_example_of_moving_average_works():
    """Page MovingAverage, "Example of usage"."""
    learning_rate = 2.0
    opt = optimizers.SGD(learning_rate)
    opt = keras_avg.MovingAverage(opt)

    var = keras.Variable([1.0])
    opt.minimize(lambda: 0.1 * var, [var])
    np.testing.assert_allclose(var, [0.8], rtol=TOLERANCE)
    np.testing.assert_allclose(opt.get_slot(var, "average"), [0.99 + 0.008], rtol=TOLERANCE)


def test_the_example_of_swa_works():
    """Page SWA, "Example of usage"."""
    learning_rate, m, k = 1.0, 1, 2
    opt = optimizers.SGD(learning_rate)
    opt = keras_avg.SWA(opt, start_averaging=m, average_period=k)

    var = keras.Variable([10.0])
    for _ in range(4):
        opt.minimize(lambda: var, [var])
    assert opt.num_snapshots == 2
    np.testing.assert_allclose(opt.get_slot(var, "average"), [(8.0 + 6.0) / 2])


# tf.keras.optimizers.Optimizer


def test_a_learning_rate_may_be_a_schedule():
    """Page Optimizer, "Callable learning rate", the first way."""
    var = keras.Variable(np.ones((1,), "float32"))
    learning_rate = optimizers.schedules.ExponentialDecay(
        initial_learning_rate=0.01, decay_steps=20, decay_rate=0.1
    )
    opt = keras_avg.SWA(optimizers.SGD(learning_rate=learning_rate))
    opt.minimize(lambda: 3 * var, var_list=[var])
    opt.minimize(lambda: 3 * var, var_list=[var])
    np.testing.assert_allclose(var, [1 - 0.03 - 0.03 * 0.1 ** (1 / 20)], rtol=TOLERANCE)


def test_a_learning_rate_may_be_a_function():
    """Page Optimizer, "Callable learning rate", the second way."""
    var = keras.Variable(np.ones((1,), "float32"))

    def lr_callable():
        return 0.1

    opt = keras_avg.SWA(optimizers.SGD(learning_rate=lr_callable))
    opt.minimize(lambda: 3 * var, var_list=[var])
    np.testing.assert_allclose(var, [0.7], rtol=TOLERANCE)


@about_tensorflow
def test_the_example_of_aggregated_gradients_works():
    """Page Optimizer, `apply_gradients`. tests/test_processes.py tries it on two replicas."""
    import tensorflow as tf

    variables = [keras.Variable([1.0])]
    optimizer = keras_avg.SWA(optimizers.SGD(0.1))
    with tf.GradientTape() as tape:
        loss = 3 * variables[0]
    grads = tape.gradient(loss, variables)
    grads = tf.distribute.get_replica_context().all_reduce("sum", grads)
    optimizer.apply_gradients(
        zip(grads, variables, strict=True), experimental_aggregate_gradients=False
    )
    np.testing.assert_allclose(variables[0], [0.7], rtol=TOLERANCE)


def trained_on_a_hundred_numbers():
    opt = keras_avg.SWA(optimizers.RMSprop())
    m = keras.models.Sequential([keras.layers.Dense(10)])
    m.compile(opt, loss="mse")
    data = np.arange(100).reshape(5, 20)
    labels = np.zeros((5, 10))
    m.fit(data, labels, verbose=0)
    return m, opt


@pytest.mark.slow_on("jax")
def test_get_weights_returns_the_slots_of_the_example():
    """Page Optimizer, `get_weights`: the count, the root mean squares, and the wrapper's own."""
    model, opt = trained_on_a_hundred_numbers()
    kernel, bias = model.trainable_variables

    weights = opt.get_weights()

    paths = [variable.path for variable in opt.variables]
    for variable in (kernel, bias):
        velocity = opt.get_slot(variable, "velocity")
        np.testing.assert_array_equal(weights[paths.index(velocity.path)], velocity)
    assert weights[paths.index(opt.iterations.path)] == 1
    assert len(weights) == len(paths)


def test_set_weights_sets_the_slots_of_the_example():
    """Page Optimizer, `set_weights`."""
    model, opt = trained_on_a_hundred_numbers()
    kernel, bias = model.trainable_variables
    new = {
        opt.iterations.path: np.array(10),
        opt.get_slot(kernel, "velocity").path: np.ones([20, 10]),
        opt.get_slot(bias, "velocity").path: np.zeros([10]),
    }

    opt.set_weights(
        [new.get(v.path, w) for v, w in zip(opt.variables, opt.get_weights(), strict=True)]
    )

    assert int(opt.iterations) == 10
    np.testing.assert_array_equal(opt.get_slot(kernel, "velocity"), np.ones([20, 10]))
    np.testing.assert_array_equal(opt.get_slot(bias, "velocity"), np.zeros([10]))
