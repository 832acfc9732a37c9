"""Tests of what only TensorFlow has: builds in a trace, native variables, steps without a batch."""

import re

import keras
import numpy as np
import oracles
import pytest
import small_training as small
from fake_workers import Twin
from keras import optimizers

import keras_avg
from keras_avg import SWA, ModelAverage, MovingAverage, _backend

pytestmark = pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="about TensorFlow")

TOLERANCE = 1e-6  # rounding of a few float32 operations on numbers of order 1

OPTIMIZERS = {
    "SWA": (
        lambda: SWA(optimizers.SGD(0.1), 1, 2),
        lambda values: oracles.swa(values, 1, 2),
    ),
    "MovingAverage": (
        lambda: MovingAverage(optimizers.SGD(0.1), average_decay=0.5),
        lambda values: oracles.moving_average(values, [0.5] * (len(values) - 1)),
    ),
}


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_first_apply_inside_a_function_starts_the_averages_once(kind, jit_compile):
    import tensorflow as tf

    optimizer, oracle = OPTIMIZERS[kind][0](), OPTIMIZERS[kind][1]
    model = small.model()

    @tf.function(jit_compile=jit_compile)
    def step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x, training=True) - y) ** 2)
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)

    if jit_compile:  # XLA cannot create variables.
        optimizer.build(model.trainable_variables)
    trajectory = [[small.numpy(v)] for v in model.trainable_variables]
    for _ in range(6):
        step(tf.constant(small.X[:8]), tf.constant(small.Y[:8]))
        for values, variable in zip(trajectory, model.trainable_variables, strict=True):
            values.append(small.numpy(variable))

    for variable, values in zip(model.trainable_variables, trajectory, strict=True):
        np.testing.assert_allclose(
            optimizer.get_slot(variable, "average"),
            oracle(values),
            rtol=TOLERANCE,
            atol=TOLERANCE,
        )


def test_averages_made_in_the_trace_of_the_model_start_at_the_initial_weights():
    import tensorflow as tf

    optimizer = MovingAverage(optimizers.SGD(0.0), average_decay=0.5)
    model = small.model(with_input_shape=False)

    @tf.function
    def step(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(model(x, training=True) ** 2)
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)

    for _ in range(3):
        step(tf.constant(small.X[:8]))

    # With learning rate 0 nothing moves. If the averages had begun with other values, they would
    # still differ.
    small.assert_same_bits(
        small.slots(optimizer, model.trainable_variables),
        [small.numpy(v) for v in model.trainable_variables],
    )


def test_native_variables_are_averaged_in_a_custom_loop():
    import tensorflow as tf

    variable = tf.Variable([1.0, 2.0])
    optimizer = MovingAverage(optimizers.SGD(2.0), average_decay=0.5)

    @tf.function
    def step():
        optimizer.apply_gradients([(tf.constant([0.1, 0.1]), variable)])

    step()
    step()

    np.testing.assert_allclose(variable, [0.6, 1.6], rtol=TOLERANCE)
    np.testing.assert_allclose(optimizer.get_slot(variable, "average"), [0.75, 1.75])
    optimizer.assign_average_vars([variable])
    np.testing.assert_allclose(variable, [0.75, 1.75], rtol=TOLERANCE)


def test_a_trace_does_not_depend_on_a_variable_that_it_only_looked_at():
    """The flag may belong to another model. The code must still run after this model is deleted."""
    import tensorflow as tf

    flag = tf.Variable(7)

    @tf.function
    def look():
        return tf.constant(_backend.concrete(flag))

    traced = look.get_concrete_function()
    assert traced().numpy() == 7
    assert traced.variables == ()


@pytest.mark.slow_on("tensorflow")
def test_a_model_can_be_exported_and_checkpointed(tmp_path):
    import tensorflow as tf

    model = small.fit(small.model(SWA(MovingAverage("adam"), 0, 2)))
    with model.optimizer.average_weights():
        expected = model.predict(small.X, verbose=0)
        model.export(tmp_path / "exported", verbose=False)
    exported = tf.saved_model.load(str(tmp_path / "exported"))
    served = exported.serve(tf.constant(small.X))
    np.testing.assert_allclose(served, expected, rtol=1e-5, atol=1e-5)
    tf.train.Checkpoint(model=model).save(str(tmp_path / "checkpoint"))


def test_native_variables_are_swapped():
    import tensorflow as tf

    variable = tf.Variable([1.0, 2.0])
    optimizer = MovingAverage(optimizers.SGD(2.0), average_decay=0.5)
    optimizer.apply([tf.constant([0.1, 0.1])], [variable])
    raw = variable.numpy()
    with optimizer.average_weights():
        np.testing.assert_allclose(variable, [0.9, 1.9], rtol=TOLERANCE)
    np.testing.assert_array_equal(variable, raw)


def test_native_variables_of_another_dtype_than_the_averages_are_swapped():
    import tensorflow as tf

    variable = tf.Variable([1.0, 2.0], dtype="bfloat16")
    optimizer = MovingAverage(optimizers.SGD(2.0), average_decay=0.5)
    optimizer.apply([tf.constant([0.25, 0.25], "bfloat16")], [variable])
    with optimizer.average_weights():
        np.testing.assert_array_equal(tf.cast(variable, "float32"), [0.75, 1.75])
        with optimizer.raw_weights():
            np.testing.assert_array_equal(tf.cast(variable, "float32"), [0.5, 1.5])
        np.testing.assert_array_equal(tf.cast(variable, "float32"), [0.75, 1.75])
    np.testing.assert_array_equal(tf.cast(variable, "float32"), [0.5, 1.5])


def test_a_checkpoint_works_after_a_schedule_replaced_a_constant_rate(tmp_path):
    import tensorflow as tf

    def new():
        return small.model(SWA("sgd", 0, 1, decay=0.1))

    model = small.fit(new(), epochs=1)
    path = tf.train.Checkpoint(model=model, optimizer=model.optimizer).save(tmp_path / "c")
    other = new()
    other.optimizer.build(other.trainable_variables)
    tf.train.Checkpoint(model=other, optimizer=other.optimizer).restore(path).expect_partial()
    small.assert_same_bits(other.optimizer.get_weights(), model.optimizer.get_weights())


EPOCHS = 3


def of_unknown_length():
    """Data of unknown length. Keras finds its end by one more step, which has no batch."""
    import tensorflow as tf

    def batches():
        for start in range(0, len(small.X), small.BATCH_SIZE):
            batch = slice(start, start + small.BATCH_SIZE)
            yield small.X[batch], small.Y[batch]

    signature = (tf.TensorSpec((None, 5)), tf.TensorSpec((None, 1)))
    return tf.data.Dataset.from_generator(batches, output_signature=signature)


@pytest.mark.filterwarnings("ignore:.*shuffle=True|Your input ran out of data")
class TestAStepThatHadNoBatch:
    """Without XLA, the iterator fails, but operations that do not depend on the batch run."""

    def fit(self, optimizer, **arguments):
        model = small.model(optimizer, jit_compile=False)
        model.fit(of_unknown_length(), epochs=EPOCHS, verbose=0, **arguments)
        return model

    def test_a_step_without_a_batch_counts_with_a_bare_optimizer(self):
        model = self.fit(optimizers.Adam())
        counts_too_much = tuple(map(int, keras.__version__.split(".")[:2])) < (3, 16)
        assert int(model.optimizer.iterations) == EPOCHS * (small.BATCHES + counts_too_much)

    @pytest.mark.parametrize(
        ("wrapper", "snapshots"),
        [
            (lambda inner: SWA(inner, 0, 1), 18),
            (lambda inner: SWA(inner, 6, 7), 2),
            (lambda inner: MovingAverage(inner, average_period=7), 2),
            (lambda inner: ModelAverage(inner, interval_steps=7), 2),
            (lambda inner: optimizers.LossScaleOptimizer(SWA(inner, 6, 7)), 2),
        ],
    )
    def test_a_step_without_a_batch_does_not_count_with_a_wrapper(self, wrapper, snapshots):
        model = self.fit(wrapper(optimizers.Adam(0.01)))
        known = small.fit(small.model(wrapper(optimizers.Adam(0.01))), epochs=EPOCHS)
        for each in (model, known):
            (found,) = keras_avg.averaging_optimizers(each)
            assert found.num_snapshots == snapshots
            assert int(found.iterations) == EPOCHS * small.BATCHES
        for ours, theirs in zip(model.get_weights(), known.get_weights(), strict=True):
            # XLA rounds differently.
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)

    def test_a_step_without_a_batch_does_not_count_with_accumulation(self):
        inner = optimizers.Adam(0.01, gradient_accumulation_steps=2)
        model = self.fit(SWA(inner, 0, 1))
        assert model.optimizer.num_snapshots == EPOCHS * small.BATCHES // 2

    @pytest.mark.parametrize("interval", [2, 7])
    def test_a_step_without_a_batch_does_not_remove_a_round_of_workers(self, interval):
        optimizer = ModelAverage("adam", interval_steps=interval, communicator=Twin())
        self.fit(optimizer, callbacks=[keras_avg.callbacks.SynchronizeWorkers()])
        assert optimizer.num_snapshots == EPOCHS * small.BATCHES // interval


@pytest.mark.slow_on("tensorflow")
def test_an_optimizer_works_after_its_first_trace_failed():
    class FailsOnce(keras.Sequential):
        has_failed = False

        def train_step(self, data):
            logs = super().train_step(data)
            if not self.has_failed:
                self.has_failed = True
                raise KeyError("of the user")
            return logs

    model = FailsOnce(small.model().layers)
    model.compile(SWA("adam", 0, 1), "mse")
    optimizer = model.optimizer
    with pytest.raises(KeyError, match="of the user"):
        small.fit(model)
    assert (optimizer.num_snapshots, optimizer.averages_in_model) == (0, False)
    assert not optimizer.has_average
    with pytest.raises(ValueError, match="no snapshot yet"):
        optimizer.swap_weights()
    assert not any(map(np.any, optimizer.get_weights()[3:9]))

    model.compile(optimizer, "mse")
    small.fit(model, epochs=1)
    assert optimizer.num_snapshots == small.BATCHES


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_step_in_a_function_is_transformed_without_a_warning(kind, caplog):
    import tensorflow as tf

    optimizer, variable = OPTIMIZERS[kind][0](), keras.Variable([1.0])

    @tf.function
    def step():
        optimizer.apply([tf.constant([0.5])], [variable])

    logger = tf.get_logger()
    logger.addHandler(caplog.handler)
    try:
        step()
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.messages


@pytest.mark.slow_on("tensorflow")
@pytest.mark.parametrize(
    "wrapper",
    [
        MovingAverage,
        lambda inner: MovingAverage(inner, average_period=10),
        keras_avg.BEMA,
        SWA,
        keras_avg.LAWA,
    ],
    ids=["MovingAverage", "every 10 steps", "BEMA", "SWA", "LAWA"],
)
def test_a_step_compiled_by_xla_copies_no_variable(wrapper):
    """Copies inside of a branch or a loop are made only if something is due."""
    import tensorflow as tf

    variables = [keras.Variable(np.ones(1019, "float32")) for _ in range(2)]
    gradients = [tf.Variable(tf.ones(1019)) for _ in range(2)]
    optimizer = wrapper(optimizers.SGD(0.1))
    optimizer.build(variables)

    @tf.function(jit_compile=True)
    def step():
        optimizer.apply([tf.convert_to_tensor(g) for g in gradients], variables)

    program = step.experimental_get_compiler_ir()(stage="optimized_hlo")
    always_run = program[program.index("ENTRY") :]
    assert "1019" in always_run
    assert not re.findall(r"= f32\[(?:\d+,)?1019\]\S* copy\(", always_run)


@pytest.mark.slow_on("tensorflow")
def test_a_step_compiled_by_xla_casts_nothing_where_nothing_is_due():
    """The cast of the first values stays in the part of the program that runs once."""
    import tensorflow as tf

    variables = [keras.Variable(np.ones(1019), dtype="bfloat16") for _ in range(2)]
    optimizer = MovingAverage(optimizers.SGD(0.1), average_decay=0.5, average_period=10)
    optimizer.build(variables)

    @tf.function(jit_compile=True)
    def step():
        optimizer.apply([tf.ones(1019, "bfloat16") for _ in variables], variables)

    program = step.experimental_get_compiler_ir()(stage="optimized_hlo")
    always_run = program[program.index("ENTRY") :]
    assert "bf16[1019]" in always_run
    assert not re.findall(r"= f32\[1019\]\S* (?:fusion|convert)\(", always_run)
    step()
    for variable in variables:
        average = optimizer.get_slot(variable, "average")
        np.testing.assert_array_equal(average, np.ones(1019, "float32"))
        np.testing.assert_array_less(small.numpy(variable).astype("float32"), 1.0)


@pytest.mark.slow_on("tensorflow")
@pytest.mark.parametrize("period", [1, 2])
@pytest.mark.parametrize("jit_compile", [False, True])
def test_low_precision_variables_are_averaged_as_they_are_rounded(jit_compile, period):
    """XLA may leave out a rounding that a cast to float32 follows."""
    import tensorflow as tf

    random = np.random.default_rng(0)
    variable = keras.Variable(random.normal(size=64), dtype="bfloat16")
    optimizer = MovingAverage(optimizers.SGD(0.1), average_decay=0.5, average_period=period)
    optimizer.build([variable])

    @tf.function(jit_compile=jit_compile)
    def step(gradient):
        optimizer.apply([gradient], [variable])

    expected = small.numpy(variable).astype("float64")
    for number in range(1, 5):
        step(tf.constant(random.normal(size=64), "bfloat16"))
        if number % period == 0:
            weight = 1 - 0.5**period  # One value counts for all steps of a period.
            expected += weight * (small.numpy(variable).astype("float64") - expected)
    np.testing.assert_array_equal(optimizer.get_slot(variable, "average"), expected)


class TestProgram:
    """A function of many tensors, compiled once for the same dtypes and shapes."""

    def program(self):
        import tensorflow as tf

        from keras_avg._backend._tensorflow.program import Program

        traces = []

        def add_all(tensors, variables):
            traces.append(1)
            for tensor, variable in zip(tensors, variables, strict=True):
                variable.assign_add(tf.cast(tensor, variable.dtype))
            return [tf.identity(variable) for variable in variables]

        return Program(add_all), traces

    def test_other_variables_of_the_same_form_use_the_same_code(self):
        import tensorflow as tf

        program, traces = self.program()
        for number in (1.0, 2.0):
            variables = [tf.Variable([number, 0.0]), tf.Variable(number)]
            found = program([tf.constant([1.0, 1.0]), tf.constant(3.0)], variables)
            np.testing.assert_array_equal(found[0], [number + 1, 1.0])
            np.testing.assert_array_equal(variables[0], [number + 1, 1.0])
            np.testing.assert_array_equal(variables[1], number + 3)
        assert len(traces) == 1

    def test_other_shapes_and_dtypes_are_compiled_anew(self):
        import tensorflow as tf

        program, traces = self.program()
        program([tf.constant([1.0])], [tf.Variable([1.0])])
        (found,) = program([tf.constant([1.0, 2.0])], [tf.Variable([1.0, 1.0])])
        np.testing.assert_array_equal(found, [2.0, 3.0])
        (found,) = program([tf.constant([1.0, 2.0])], [tf.Variable([1.0, 1.0], dtype="float64")])
        assert found.dtype == "float64"
        assert len(traces) == 3

    def test_it_can_be_called_in_a_trace_and_for_replicas(self):
        import tensorflow as tf

        program, _ = self.program()
        variable = tf.Variable([1.0])
        tf.function(lambda: program([tf.constant([2.0])], [variable]))()
        np.testing.assert_array_equal(variable, [3.0])
        with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
            mirrored = tf.Variable([1.0])
        program([tf.constant([2.0])], [mirrored])
        np.testing.assert_array_equal(mirrored, [3.0])
        program([tf.constant([2.0])], [variable])
        np.testing.assert_array_equal(variable, [5.0])
        frozen = tf.Variable([1.0], trainable=False)
        program([tf.constant([2.0])], [frozen])
        np.testing.assert_array_equal(frozen, [3.0])

    def test_it_takes_variables_that_were_made_in_a_trace(self):
        import tensorflow as tf

        program, _ = self.program()
        made = []

        @tf.function
        def make():
            if not made:
                made.append(tf.Variable([1.0]))

        make()
        (found,) = program([tf.constant([2.0])], made)
        np.testing.assert_array_equal(found, [3.0])
        np.testing.assert_array_equal(made[0], [3.0])

    def test_code_does_not_keep_the_memory_of_a_variable(self):
        import gc
        import weakref

        import tensorflow as tf

        program, _ = self.program()
        variable = tf.Variable([1.0])
        program([tf.constant([2.0])], [variable])
        handle = weakref.ref(variable.handle)
        del variable
        gc.collect()
        assert handle() is None

    def test_nothing_is_compiled_for_nothing(self):
        program, traces = self.program()
        assert program([], []) == []
        assert not traces
