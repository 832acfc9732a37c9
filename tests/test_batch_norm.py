"""`update_batch_norm` recomputes the statistics exactly by one pass, and changes nothing else."""

import gc
import inspect
import itertools
import weakref

import keras
import numpy as np
import pytest
import small_training as small
from keras import layers, ops

from keras_avg.batch_norm import update_batch_norm

BACKEND = keras.backend.backend()
TOLERANCE = 2e-6  # rounding of moments that the framework computes in float32, of order 1
HALF_TOLERANCE = {"float16": 1e-3, "bfloat16": 8e-3}  # half a unit in the last place, plus rounding

# In batches of 8, these are 8 + 8 + 8 + 5 samples.
X = np.random.default_rng(3).normal(3.0, 2.0, size=(29, 5)).astype("float32")


def update(model, x, **arguments):
    return update_batch_norm(model, x, **({"verbose": 0} | arguments))


def batches_of(x, size=8):
    return [x[i : i + size] for i in range(0, len(x), size)]


def statistics(layer):
    return small.numpy(layer.moving_mean), small.numpy(layer.moving_variance)


def assert_statistics(layer, mean, variance, tolerance=TOLERANCE):
    for actual, expected in zip(statistics(layer), (mean, variance), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def whole_data(x, axis=-1):
    """The oracle: the moments of all elements at once, without a pool."""
    x = np.moveaxis(np.asarray(x, "float64"), axis, -1).reshape(-1, np.shape(x)[axis])
    return x.mean(axis=0), x.var(axis=0)


def normalized(layer, x):
    """The output of the layer in training mode for one batch, computed in NumPy."""
    x = np.asarray(x, "float64")
    axes = tuple(range(x.ndim - 1))
    x = (x - x.mean(axis=axes)) / np.sqrt(x.var(axis=axes) + layer.epsilon)
    return x * np.asarray(small.numpy(layer.gamma), "float64") + small.numpy(layer.beta)


def randomized(model):
    """Give the model random weights, as after training. Variances stay positive."""
    random = np.random.default_rng(5)
    for variable in model.weights:
        if "seed" not in variable.path:
            value = random.uniform(0.5, 1.5, size=variable.shape)
            variable.assign(ops.cast(ops.convert_to_tensor(value), variable.dtype))
    return model


def everything(model):
    """The values of all variables, and all other state of the layers, by layer."""
    flags = ("trainable", "momentum", "renorm", "synchronized", "renorm_momentum")
    found = model._flatten_layers()
    state = [(getattr(layer, f, None)) for layer in found for f in flags]
    own = [("call" in vars(layer), "_moments" in vars(layer)) for layer in found]
    return [small.numpy(v) for v in model.variables], state, own


STATISTICS = ("moving_mean", "moving_variance", "moving_stddev")


def assert_unchanged(model, before, but=()):
    arrays, state, own = everything(model)
    assert (state, own) == before[1:]
    free = {id(getattr(layer, name, None)) for layer in but for name in STATISTICS}
    kept = [i for i, v in enumerate(model.variables) if id(v) not in free]
    assert kept
    small.assert_same_bits([arrays[i] for i in kept], [before[0][i] for i in kept])


def sequential(*parts, shape=(5,)):
    return randomized(keras.Sequential([keras.Input(shape), *parts]))


class TestNumbers:
    @pytest.mark.slow_on("jax")
    def test_three_numbers_in_two_batches_give_their_mean_and_variance(self):
        model = keras.Sequential([keras.Input((1,)), layers.BatchNormalization()])

        assert update(model, np.array([[0.0], [2.0], [7.0]], "float32"), batch_size=2) is None

        # The batches (0, 2) and (7) have the means 1 and 7, and the variances 1 and 0. All three
        # numbers have the mean 3 and the variance (9 + 1 + 16) / 3.
        assert_statistics(model.layers[0], [3.0], [26 / 3])

    @pytest.mark.slow_on("jax")
    def test_the_statistics_are_not_a_plain_mean_over_batches(self):
        norm = layers.BatchNormalization()
        update(sequential(norm), X, batch_size=8)

        batches = [batch.astype("float64") for batch in batches_of(X)]
        plain_mean = np.mean([batch.mean(axis=0) for batch in batches], axis=0)
        plain_variance = np.mean([batch.var(axis=0, ddof=1) for batch in batches], axis=0)

        mean, variance = statistics(norm)
        assert np.abs(mean - plain_mean).max() > 1000 * TOLERANCE
        assert np.abs(variance - plain_variance).max() > 1000 * TOLERANCE
        assert_statistics(norm, *whole_data(X))

    @pytest.mark.parametrize("batch_size", [1, 4, 8, 29, 100, None])
    def test_the_first_layer_gets_the_moments_of_the_whole_data(self, batch_size):
        norm = layers.BatchNormalization(momentum=0.3)
        update(sequential(norm), X, batch_size=batch_size)
        assert_statistics(norm, *whole_data(X))

    def test_the_variance_is_exact_for_a_mean_far_from_zero(self):
        # These values are exact in float32, and so are the moments of a single element. Their
        # squares need all digits of float64.
        values = 2.0**30 + 128 * np.arange(6.0).reshape(-1, 1)
        norm = layers.BatchNormalization()
        update(sequential(norm, shape=(1,)), values.astype("float32"), batch_size=1)
        assert_statistics(norm, *whole_data(values))

    @pytest.mark.slow_on("jax")
    def test_the_second_layer_sees_batches_normalized_by_their_own_moments(self):
        first, hidden, second = (
            layers.BatchNormalization(),
            layers.Dense(4, activation="tanh"),
            layers.BatchNormalization(),
        )
        update(sequential(first, hidden, second), X, batch_size=8)

        kernel, bias = (np.asarray(small.numpy(v), "float64") for v in hidden.weights)
        activations = [np.tanh(normalized(first, b) @ kernel + bias) for b in batches_of(X)]
        assert_statistics(first, *whole_data(X))
        assert_statistics(second, *whole_data(np.concatenate(activations)))

    @pytest.mark.slow_on("jax")
    @pytest.mark.parametrize("axis", [1, 2, -1, -2])
    def test_statistics_are_computed_for_any_axis(self, axis):
        images = np.random.default_rng(1).normal(1, 2, size=(7, 3, 4, 5)).astype("float32")
        norm = layers.BatchNormalization(axis=axis)
        update(sequential(norm, shape=images.shape[1:]), images, batch_size=3)
        assert_statistics(norm, *whole_data(images, axis))

    def test_each_call_of_a_shared_layer_counts(self):
        norm = layers.BatchNormalization()
        left, right = keras.Input((5,)), keras.Input((5,))
        model = keras.Model([left, right], layers.Add()([norm(left), norm(right)]))

        update(model, [X, 2 * X + 1], batch_size=8)

        assert_statistics(norm, *whole_data(np.concatenate([X, 2 * X + 1])))

    def test_earlier_passes_do_not_change_the_statistics(self):
        norm = layers.BatchNormalization()
        model = sequential(norm)
        update(model, X, batch_size=8)
        first = statistics(norm)
        update(model, X + 5, batch_size=8)
        update(model, X, batch_size=8)
        small.assert_same_bits(statistics(norm), first)

    @pytest.mark.slow_on("jax")
    def test_training_with_a_momentum_of_zero_agrees_on_a_single_batch(self):
        model = sequential(layers.Dense(3), layers.BatchNormalization(momentum=0.0))
        model(X, training=True)
        expected = statistics(model.layers[1])

        update(randomized(model), X, batch_size=100)

        assert_statistics(model.layers[1], *expected)


class TestMasks:
    def sequences(self):
        sequences = np.random.default_rng(2).normal(2, 3, size=(11, 6, 3)).astype("float32")
        for length, sequence in zip(itertools.cycle([6, 1, 4, 0]), sequences, strict=False):
            sequence[length:] = 0.0
        return sequences

    @pytest.mark.slow_on("jax")
    def test_masked_elements_are_not_counted(self):
        sequences, norm = self.sequences(), layers.BatchNormalization()
        update(sequential(layers.Masking(), norm, shape=(6, 3)), sequences, batch_size=4)
        assert_statistics(norm, *whole_data(sequences[sequences.any(axis=-1)]))

    def test_a_mask_may_leave_each_channel_another_number_of_elements(self):
        sequences, norm = self.sequences(), layers.BatchNormalization(axis=1)
        update(sequential(layers.Masking(), norm, shape=(6, 3)), sequences, batch_size=4)

        present = sequences.any(axis=-1)
        channels = [sequences[present[:, t], t].astype("float64") for t in range(6)]
        mean, variance = [c.mean() for c in channels], [c.var() for c in channels]
        assert_statistics(norm, mean, variance)

    @pytest.mark.parametrize("place", [0, 1])
    def test_a_batch_that_is_all_masked_does_not_count(self, place):
        batches = [self.sequences()[:4], self.sequences()[4:8]]
        batches.insert(place, np.zeros((4, 6, 3), "float32"))
        norm = layers.BatchNormalization()
        model = sequential(layers.Masking(), norm, shape=(6, 3))

        update(model, ((batch,) for batch in batches))

        sequences = self.sequences()[:8]
        assert_statistics(norm, *whole_data(sequences[sequences.any(axis=-1)]))

    def test_data_that_is_all_masked_gives_a_warning_and_changes_nothing(self):
        model = sequential(layers.Masking(), layers.BatchNormalization(), shape=(6, 3))
        before = everything(model)
        with pytest.warns(UserWarning, match="No data reached '.*batch_normalization"):
            update(model, np.zeros((4, 6, 3), "float32"))
        assert_unchanged(model, before)

    def test_a_channel_that_no_element_reached_keeps_its_statistics(self):
        sequences = self.sequences()[:3]  # of lengths 6, 1, 4
        norm = layers.BatchNormalization(axis=1)
        model = sequential(layers.Masking(), norm, shape=(6, 3))
        sequences[:, 5] = 0.0
        before = statistics(norm)
        with pytest.warns(UserWarning, match="not all of its channels"):
            update(model, sequences)
        small.assert_same_bits([s[5:] for s in statistics(norm)], [s[5:] for s in before])
        assert not np.any(statistics(norm)[0][:5] == before[0][:5])


class Block(layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.parts = [layers.Dense(4), layers.BatchNormalization(), layers.Dropout(0.5)]

    def call(self, inputs, training=False):
        for part in self.parts:
            inputs = part(inputs, training=training)
        return inputs


class Network(keras.Model):
    """A model whose layers are in lists of other layers."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first = layers.BatchNormalization(name="first")
        self.blocks = [Block(), Block()]

    def call(self, inputs):
        inputs = self.first(inputs)
        for block in self.blocks:
            inputs = block(inputs)
        return inputs

    def expected(self, x):
        """The statistics of the three layers over batches of 8, computed in NumPy."""
        inputs, results = x, [whole_data(x)]
        norms = [self.first] + [block.parts[1] for block in self.blocks]
        batches = [normalized(self.first, b) for b in batches_of(inputs)]
        for block in self.blocks:
            kernel, bias = (np.asarray(small.numpy(v), "float64") for v in block.parts[0].weights)
            batches = [batch @ kernel + bias for batch in batches]
            results.append(whole_data(np.concatenate(batches)))
            batches = [normalized(block.parts[1], batch) for batch in batches]
        return list(zip(norms, results, strict=True))


class TestDepth:
    def test_layers_in_lists_in_subclassed_layers_are_found(self):
        model = Network()
        model(X)
        update(randomized(model), X, batch_size=8)
        for norm, expected in model.expected(X):
            assert_statistics(norm, *expected)

    def test_layers_of_models_in_models_are_found(self):
        inner_norm, outer_norm = layers.BatchNormalization(), layers.BatchNormalization()
        inner = keras.Sequential([keras.Input((5,)), inner_norm])
        middle = keras.Sequential([keras.Input((5,)), inner])
        inputs = keras.Input((5,))
        model = randomized(keras.Model(inputs, outer_norm(middle(inputs))))

        update(model, X, batch_size=8)

        assert_statistics(inner_norm, *whole_data(X))
        outputs = [normalized(inner_norm, batch) for batch in batches_of(X)]
        assert_statistics(outer_norm, *whole_data(np.concatenate(outputs)))

    def test_a_layer_without_a_model_is_updated(self):
        norm = layers.BatchNormalization()
        norm.build((None, 5))
        update(norm, X, batch_size=8)
        assert_statistics(norm, *whole_data(X))

    @pytest.mark.slow_on("tensorflow")
    def test_a_time_distributed_layer_is_updated(self):
        sequences = np.random.default_rng(2).normal(2, 3, size=(11, 6, 3)).astype("float32")
        norm = layers.BatchNormalization()
        update(sequential(layers.TimeDistributed(norm), shape=(6, 3)), sequences, batch_size=4)
        assert_statistics(norm, *whole_data(sequences))

    @pytest.mark.slow_on("tensorflow")
    def test_a_model_that_was_never_called_is_built_on_the_first_batch(self):
        model = Network()
        update(model, X, batch_size=8)
        for norm, expected in model.expected(X):
            assert_statistics(norm, *expected)

        before = [small.numpy(v) for v in model.variables]
        update(model, X, batch_size=8)
        small.assert_same_bits([small.numpy(v) for v in model.variables], before)

    @pytest.mark.slow_on("jax")
    def test_building_a_model_does_not_change_its_seeds_and_counters(self):
        model = keras.Sequential([Noise(), layers.BatchNormalization()])
        update(model, X, batch_size=8)
        noise = model.layers[0]
        assert small.numpy(noise.calls) == 0
        fresh = keras.random.SeedGenerator(1).state
        small.assert_same_bits([small.numpy(noise.seed_generator.state)], [small.numpy(fresh)])

    def test_a_layer_that_no_data_reaches_is_named_and_keeps_its_statistics(self):
        class Auxiliary(keras.Model):
            def __init__(self):
                super().__init__()
                self.main = layers.BatchNormalization(name="main")
                self.auxiliary = layers.BatchNormalization(name="auxiliary")

            def call(self, inputs, training=False):
                return self.auxiliary(inputs) if training else self.main(inputs)

        model = Auxiliary()
        model.auxiliary.build((None, 5))
        model(X)
        before = statistics(model.auxiliary)
        with pytest.warns(UserWarning, match="No data reached '.*auxiliary'"):
            update(model, X)
        small.assert_same_bits(statistics(model.auxiliary), before)
        assert_statistics(model.main, *whole_data(X))


class Noise(layers.Layer):
    """A layer that draws random numbers and counts its calls, in inference too."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seed_generator = keras.random.SeedGenerator(1)

    def build(self, input_shape):
        self.calls = self.add_weight(shape=(), initializer="zeros", trainable=False)

    def call(self, inputs):
        self.calls.assign_add(1.0)
        return inputs + keras.random.normal(ops.shape(inputs), seed=self.seed_generator)


class TestNothingElseMoves:
    def model(self):
        norms = [layers.BatchNormalization(momentum=0.9) for _ in range(2)]
        spectral = layers.SpectralNormalization(layers.Dense(4))
        dropout = layers.Dropout(0.5)
        model = sequential(norms[0], dropout, spectral, Noise(), norms[1])
        model.compile("adam", "mse", metrics=["mae"])
        model.fit(X, np.zeros((29, 4)), verbose=0)
        return model, norms

    @pytest.mark.slow_on("jax", "tensorflow")
    def test_weights_state_flags_and_the_optimizer_do_not_change(self):
        model, norms = self.model()
        before, others = everything(model), model.optimizer.variables + model.metrics_variables
        values = [small.numpy(v) for v in others]

        update(model, X, batch_size=8)

        assert_unchanged(model, before, but=norms)
        small.assert_same_bits([small.numpy(v) for v in others], values)
        assert_statistics(norms[0], *whole_data(X))

    def test_dropout_is_off_during_the_pass(self):
        norm = layers.BatchNormalization()
        model = sequential(layers.Dropout(0.9), layers.GaussianNoise(1.0), norm)
        update(model, X, batch_size=8)
        assert_statistics(norm, *whole_data(X))

    @pytest.mark.slow_on("jax")
    def test_layers_that_draw_in_inference_draw_new_numbers_for_each_batch(self):
        norm = layers.BatchNormalization()
        model = sequential(Noise(), norm)
        update(model, np.zeros((8, 5), "float32"), batch_size=1)
        assert np.all(statistics(norm)[1] > 0.01)

    def test_frozen_layers_keep_their_statistics_and_apply_them(self):
        frozen, norm = layers.BatchNormalization(trainable=False), layers.BatchNormalization()
        model = sequential(frozen, norm)
        before = everything(model)

        update(model, X, batch_size=8)

        assert_unchanged(model, before, but=[norm])
        assert_statistics(norm, *whole_data(ops.convert_to_numpy(frozen(X, training=False))))

    @pytest.mark.parametrize("place", ["model", "data"])
    def test_an_exception_during_the_pass_leaves_the_model_unchanged(self, place):
        class Fuse(layers.Layer):
            left = np.inf

            def call(self, inputs):
                self.left -= 1
                if self.left < 0:
                    raise RuntimeError("blown")
                return inputs

        def data():
            yield from ((batch,) for batch in batches_of(X)[:3])
            if place == "data":
                raise RuntimeError("blown")

        fuse = Fuse()
        model = sequential(layers.BatchNormalization(), fuse, Noise(), layers.BatchNormalization())
        before = everything(model)
        fuse.left = 2 if place == "model" else np.inf

        with pytest.raises(Exception, match="blown"):  # TensorFlow has a type of its own for data
            update(model, data())

        assert_unchanged(model, before)

    @pytest.mark.parametrize("kind", ["none", "frozen"])
    def test_without_a_layer_to_update_the_data_is_not_read(self, kind):
        def data():
            raise AssertionError("touched")
            yield

        parts = [layers.BatchNormalization(trainable=False)] if kind == "frozen" else []
        model = sequential(layers.Dense(2), *parts)
        before = everything(model)
        untouched = data()
        update(model, untouched)
        update(model, None)
        assert_unchanged(model, before)
        with pytest.raises(AssertionError, match="touched"):
            next(untouched)

    @pytest.mark.slow_on("jax", "tensorflow")
    def test_training_after_the_pass_moves_the_statistics_with_the_momentum(self):
        model = small.fit(small.model("sgd"), epochs=1)
        update(model, small.X)
        before = statistics(model.layers[1])
        small.fit(model, epochs=1)
        after = statistics(model.layers[1])
        assert not np.array_equal(before, after)
        assert np.all(np.abs(after[0] - before[0]) < 0.2)  # momentum 0.99, six steps


class Compiled(keras.Model):
    def __init__(self):
        super().__init__()
        self.norm = layers.BatchNormalization()
        self.compiled = compiled(lambda inputs: self.norm(inputs))

    def call(self, inputs):
        return self.compiled(inputs)


def compiled(function):
    """As the framework's users do it themselves."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.function(function)
    if BACKEND == "jax":
        import jax

        return jax.jit(function)
    import torch

    return torch.compile(function, backend="eager")


has_renorm = pytest.mark.skipif(
    "renorm" not in inspect.signature(layers.BatchNormalization).parameters,
    reason="renorm came with a later Keras",
)


class TestVariants:
    @has_renorm
    def test_renorm_layers_are_normalized_by_the_batch_alone(self):
        norm, second = layers.BatchNormalization(renorm=True), layers.BatchNormalization()
        model = sequential(norm, second)
        before = everything(model)

        update(model, X, batch_size=8)

        assert_statistics(norm, *whole_data(X))
        deviation = np.sqrt(small.numpy(norm.moving_variance).astype("float64") + norm.epsilon)
        np.testing.assert_allclose(norm.moving_stddev, deviation, rtol=TOLERANCE)
        outputs = [normalized(norm, batch) for batch in batches_of(X)]
        assert_statistics(second, *whole_data(np.concatenate(outputs)))
        assert_unchanged(model, before, but=[norm, second])

    @has_renorm
    def test_the_next_training_step_of_a_renorm_layer_starts_from_the_new_variance(self):
        norm = layers.BatchNormalization(renorm=True, momentum=1.0)
        model = sequential(norm)
        update(model, X, batch_size=8)
        model(X, training=True)
        assert_statistics(norm, *whole_data(X))

    @pytest.mark.skipif(BACKEND != "tensorflow", reason="Keras has it on TensorFlow only")
    def test_synchronized_layers_get_the_same_statistics_as_plain_layers(self):
        import tensorflow as tf

        norm = layers.BatchNormalization(synchronized=True)
        model = sequential(norm)
        update(model, X, batch_size=8)
        assert norm.synchronized
        assert_statistics(norm, *whole_data(X))
        with tf.distribute.MirroredStrategy(["cpu:0"]).scope():
            norm = layers.BatchNormalization(synchronized=True)
            model = sequential(norm)
            update(model, X, batch_size=8)
        assert_statistics(norm, *whole_data(X))

    def test_a_subclass_of_the_layer_may_change_its_inputs(self):
        class Halved(layers.BatchNormalization):
            def call(self, inputs, training=None):
                return super().call(inputs[::2] / 2, training=training)

        norm = Halved()
        update(sequential(norm), X, batch_size=8)
        halves = np.concatenate([batch[::2] / 2 for batch in batches_of(X)])
        assert_statistics(norm, *whole_data(halves))

    def test_a_subclass_with_moments_of_its_own_is_refused_by_name(self):
        class Own(layers.BatchNormalization):
            def call(self, inputs, training=None, mask=None):
                if training:
                    self.moving_mean.assign(ops.mean(inputs, axis=0))
                return inputs

        class Deaf(layers.BatchNormalization):
            def call(self, inputs):
                return super().call(inputs)

        for kind in (Own, Deaf):
            model = sequential(layers.BatchNormalization(), kind(name="strange"))
            before = everything(model)
            with pytest.raises(
                ValueError, match=f"moments of '.*strange', of type {kind.__name__}"
            ):
                update(model, X)
            assert_unchanged(model, before)

    @pytest.mark.parametrize("called_before", [False, True])
    @pytest.mark.skipif(BACKEND == "jax", reason="state cannot change in a jax.jit of one's own")
    def test_a_compiled_call_is_observed_and_leaves_no_compiled_training_mode(self, called_before):
        model = Compiled()
        model.norm.build((None, 5))
        if called_before:
            model(X[:8])
        model.built = True

        update(model, X, batch_size=8)

        assert_statistics(model.norm, *whole_data(X))
        np.testing.assert_allclose(
            ops.convert_to_numpy(model(X[:8])),
            ops.convert_to_numpy(model.norm(X[:8], training=False)),
            rtol=TOLERANCE,
            atol=TOLERANCE,
        )

    @pytest.mark.skipif(BACKEND != "jax", reason="about jax.jit")
    def test_a_call_from_jax_jit_is_refused_by_name_and_leaves_no_compiled_training_mode(self):
        model = Compiled()
        model.norm.build((None, 5))
        model.built = True
        before = everything(model)

        with pytest.raises(ValueError, match="compiled code"):
            update(model, X, batch_size=8)

        assert_unchanged(model, before)
        np.testing.assert_allclose(model(X[:8]), model.norm(X[:8]), rtol=TOLERANCE, atol=TOLERANCE)

    @pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
    def test_mixed_precision_computes_moments_in_float32(self, policy):
        dtype = policy.removeprefix("mixed_")
        norm = layers.BatchNormalization(dtype=policy)
        update(sequential(norm), X, batch_size=8)
        rounded = ops.convert_to_numpy(ops.cast(ops.cast(X, dtype), "float32"))
        assert keras.backend.standardize_dtype(norm.moving_mean.dtype) == "float32"
        assert_statistics(norm, *whole_data(rounded))

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_half_precision_statistics_are_rounded_once(self, dtype):
        norm = layers.BatchNormalization(dtype=dtype)
        update(sequential(norm), X, batch_size=1)
        rounded = ops.convert_to_numpy(ops.cast(ops.cast(X, dtype), "float32"))
        mean, variance = (
            ops.convert_to_numpy(ops.cast(v, "float32"))
            for v in (norm.moving_mean, norm.moving_variance)
        )
        for actual, expected in zip((mean, variance), whole_data(rounded), strict=True):
            np.testing.assert_allclose(actual, expected, rtol=HALF_TOLERANCE[dtype])

    @pytest.mark.slow_on("jax")
    def test_statistics_are_recomputed_under_the_global_policy(self, dtype_policy):
        dtype_policy("mixed_float16")
        model = sequential(layers.Dense(4), layers.BatchNormalization(), layers.Dense(1))
        update(model, X, batch_size=8)
        hidden = ops.convert_to_numpy(ops.cast(model.layers[0](X), "float32"))
        assert_statistics(model.layers[1], *whole_data(hidden))


class TestCompiledPasses:
    """From ten batches on, the pass is compiled on JAX and TensorFlow."""

    def model(self, *more):
        norms = [layers.BatchNormalization(name=name) for name in ("first", "second")]
        return sequential(norms[0], layers.Dense(6, activation="tanh"), *more, norms[1]), norms

    def in_one_pass(self, model, runs):
        """The statistics, and how often the model's code ran in Python."""
        runs.clear()
        update(model, X, batch_size=2)
        norms = [each for each in model.layers if isinstance(each, layers.BatchNormalization)]
        return [s for norm in norms for s in statistics(norm)], len(runs)

    @pytest.mark.skipif(BACKEND == "torch", reason="torch runs eagerly")
    def test_the_compiled_code_gives_the_same_and_is_kept_for_later_passes(self):
        runs = []

        class Counted(layers.Layer):
            def call(self, inputs):
                runs.append(1)
                return inputs

        model, _ = self.model(Counted())
        compiled, times = self.in_one_pass(model, runs)
        assert times <= 3, "it is traced, and runs once for the short last batch"
        again, times = self.in_one_pass(model, runs)
        assert times == 1, "only the short last batch ran in Python"
        small.assert_same_bits(again, compiled)
        model.compile(run_eagerly=True)
        eager, times = self.in_one_pass(model, runs)
        assert times == 15
        for ours, theirs in zip(compiled, eager, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)
        model.compile()
        model.layers[1].kernel.assign(model.layers[1].kernel * 2)
        changed, _ = self.in_one_pass(model, runs)
        assert np.abs(changed[-1] - compiled[-1]).max() > 0.01, "new weights are used"

    @pytest.mark.parametrize("change", ["frozen", "attribute"])
    def test_a_change_of_the_model_is_not_missed(self, change):
        class Scaled(layers.Layer):
            factor = 1.0

            def call(self, inputs):
                return inputs * self.factor

        scaled = Scaled()
        model, norms = self.model(scaled)
        update(model, X, batch_size=2)
        before = statistics(norms[1])
        if change == "frozen":
            norms[0].trainable = False
        else:
            scaled.factor = 3.0
        update(model, X, batch_size=2)
        after = statistics(norms[1])
        if change == "attribute":
            np.testing.assert_allclose(after[0], 3 * before[0], rtol=1e-5)
        else:
            hidden = model.layers[1](norms[0](X, training=False))
            assert_statistics(norms[1], *whole_data(ops.convert_to_numpy(hidden)))

    def test_a_layer_that_draws_in_inference_draws_new_numbers_for_each_batch(self):
        norm = layers.BatchNormalization()
        model = sequential(Noise(), norm)
        before = everything(model)
        update(model, np.zeros((24, 5), "float32"), batch_size=1)
        assert np.all(statistics(norm)[1] > 0.01)
        assert_unchanged(model, before, but=[norm])

    def test_masked_elements_do_not_count(self):
        norm = layers.BatchNormalization()
        model = keras.Sequential([keras.Input((3, 5)), layers.Masking(), norm])
        x = np.random.default_rng(0).normal(size=(24, 3, 5)).astype("float32")
        x[:, 2] = x[5] = 0
        update(model, x, batch_size=2)
        assert_statistics(norm, *whole_data(np.delete(x, 5, 0)[:, :2]))

    def test_code_that_cannot_be_compiled_runs_eagerly_and_is_tried_once(self):
        runs = []

        class Peeking(layers.Layer):
            def call(self, inputs):
                runs.append(1)
                return inputs + float(ops.convert_to_numpy(inputs).max())

            def compute_output_spec(self, inputs):
                return keras.KerasTensor(inputs.shape, inputs.dtype)

        norm = layers.BatchNormalization()
        model = sequential(Peeking(), norm)
        for _ in range(2):
            runs.clear()
            update(model, X, batch_size=1)
            assert_statistics(norm, *whole_data(X + X.max(1, keepdims=True)))
        assert len(runs) == len(X)

    def test_data_of_unknown_length_gives_the_same(self):
        model, norms = self.model()
        update(model, ((batch,) for batch in batches_of(X, 2)))
        unknown = [s for norm in norms for s in statistics(norm)]
        update(model, X, batch_size=2)
        for ours, theirs in zip(unknown, (s for n in norms for s in statistics(n)), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)

    def test_a_layer_that_raises_changes_nothing(self):
        class Fuse(layers.Layer):
            blown = False

            def call(self, inputs):
                if self.blown:
                    raise RuntimeError("blown")
                return inputs

        model = sequential(layers.BatchNormalization(), Fuse())
        model.layers[-1].blown = True
        before = everything(model)
        with pytest.raises(RuntimeError, match="blown"):
            update(model, X, batch_size=1)
        assert_unchanged(model, before)

    def test_a_model_that_is_no_longer_used_is_freed(self):
        model, _ = self.model()
        update(model, X, batch_size=2)
        freed = weakref.ref(model)
        del model, _
        gc.collect()
        assert freed() is None


class Batches(keras.utils.PyDataset):
    def __init__(self, batches, endless=False, **kwargs):
        super().__init__(**kwargs)
        self.batches, self.endless = batches, endless

    @property
    def num_batches(self):
        return None if self.endless else len(self.batches)

    def __getitem__(self, index):
        batch = self.batches[index % len(self.batches)]
        return batch, np.full((len(batch), 1), np.nan), np.full(len(batch), np.nan)


class Named(keras.Model):
    def __init__(self):
        super().__init__()
        self.norm = layers.BatchNormalization()

    def call(self, inputs):
        return self.norm(inputs["a"]) + inputs["b"]


class TestData:
    def check(self, data, expected=X, **arguments):
        norm = layers.BatchNormalization()
        update(sequential(norm), data, **arguments)
        assert_statistics(norm, *whole_data(expected))

    def test_arrays_and_tensors_are_accepted(self):
        self.check(X)
        self.check(X.astype("float64"), batch_size=8)
        self.check(ops.convert_to_tensor(X), batch_size=8)

    def test_dicts_of_arrays_are_accepted(self):
        model = Named()
        update(model, {"a": X, "b": 0 * X}, batch_size=8)
        assert_statistics(model.norm, *whole_data(X))

    @pytest.mark.parametrize("rest", [0, 1, 2])
    def test_generators_with_and_without_targets_are_accepted(self, rest):
        self.check((batch,) + (np.zeros((len(batch), 1)),) * rest for batch in batches_of(X))

    @pytest.mark.parametrize("workers", [1, 2])
    def test_py_datasets_are_accepted(self, workers):
        self.check(Batches(batches_of(X), workers=workers))
        endless = Batches(batches_of(X), endless=True, workers=workers)
        self.check(endless, steps=3, expected=X[:24])

    @pytest.mark.skipif(BACKEND != "tensorflow", reason="tf.data needs TensorFlow")
    def test_tf_data_is_accepted(self):
        import tensorflow as tf

        data = tf.data.Dataset.from_tensor_slices((X, X[:, 0])).batch(8)
        self.check(data)
        self.check(data.filter(lambda x, y: True))  # of unknown length
        self.check(data.repeat(), steps=3, expected=X[:24])
        with pytest.raises(ValueError, match=r"has no end\. Received: .*_RepeatDataset"):
            update(sequential(layers.BatchNormalization()), data.repeat())

    @pytest.mark.skipif(BACKEND != "torch", reason="DataLoader needs torch")
    def test_torch_data_loaders_are_accepted(self):
        import torch
        from torch.utils import data

        tensors = data.TensorDataset(torch.tensor(X), torch.tensor(X[:, 0]))
        self.check(data.DataLoader(tensors, batch_size=8))
        self.check(data.DataLoader(tensors, batch_size=8), steps=2, expected=X[:16])

    def test_steps_end_the_pass(self):
        self.check(X, batch_size=8, steps=2, expected=X[:16])
        generator = ((X,) for _ in itertools.count())
        self.check(generator, steps=2)

    @pytest.mark.parametrize("kind", ["array", "generator"])
    def test_more_steps_than_batches_give_a_warning_and_use_all_batches(self, kind):
        data = X if kind == "array" else ((batch,) for batch in batches_of(X))
        with pytest.warns(UserWarning, match=r"of 4 batches\. Received: steps=9"):
            self.check(data, steps=9, **({"batch_size": 8} if kind == "array" else {}))

    def test_endless_data_need_steps(self):
        model = sequential(layers.BatchNormalization())
        before = everything(model)
        with pytest.raises(ValueError, match=r"no end\. Received: x of type Batches and steps=No"):
            update(model, Batches(batches_of(X), endless=True))
        assert_unchanged(model, before)

    @pytest.mark.parametrize(
        "empty",
        [
            lambda: X[:0],
            lambda: [],
            lambda: {},
            lambda: None,
            lambda: Batches([]),
            lambda: (batch for batch in ()),
        ],
        ids=["array", "list", "dict", "none", "dataset", "generator"],
    )
    def test_empty_data_are_an_error_and_change_nothing(self, empty):
        model = sequential(layers.BatchNormalization())
        before = everything(model)
        with pytest.raises(ValueError, match="Received"):
            update(model, empty())
        assert_unchanged(model, before)

    @pytest.mark.parametrize(
        ("argument", "value"),
        [
            ("steps", 0),
            ("steps", 1.5),
            ("batch_size", 0),
            ("batch_size", 2.5),
            ("batch_size", "a"),
            ("verbose", 3),
            ("verbose", "loud"),
        ],
    )
    def test_arguments_out_of_range_are_refused(self, argument, value):
        message = f"`{argument}` must be .*Received: {argument}={value!r}"
        with pytest.raises(ValueError, match=message):
            update(sequential(layers.BatchNormalization()), X, **{argument: value})


class TestProgress:
    def shown(self, capsys, data=X, **arguments):
        update_batch_norm(sequential(layers.BatchNormalization()), data, **arguments)
        return capsys.readouterr().out

    def test_verbose_0_prints_nothing(self, capsys):
        assert self.shown(capsys, verbose=0) == ""

    @pytest.mark.parametrize("arguments", [{}, {"verbose": "auto"}, {"verbose": 1}])
    def test_a_progress_bar_is_the_default(self, capsys, arguments):
        shown = self.shown(capsys, batch_size=8, **arguments)
        assert "4/4" in shown
        assert "━" in shown

    def test_verbose_2_prints_one_line(self, capsys):
        shown = self.shown(capsys, batch_size=8, verbose=2)
        assert shown.startswith("4/4 - ")
        assert shown.count("\n") == 1

    def test_the_number_of_steps_is_shown_when_known(self, capsys):
        assert "3/3" in self.shown(capsys, batch_size=8, steps=3)
        unknown = self.shown(capsys, data=((batch,) for batch in batches_of(X)))
        assert "1/Unknown" in unknown
        assert "4/4" in unknown
