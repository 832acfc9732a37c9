"""Files of unusual models: low-rank, quantized and float8 ones, members, and very large files."""

import h5py
import keras
import numpy as np
import pytest
import small_training as small
from keras import layers, optimizers

import keras_avg
from keras_avg import SWA, MovingAverage

X = np.random.default_rng(0).normal(size=(32, 4)).astype("float32")
Y = X.sum(1, keepdims=True)
TOLERANCE = 1e-4  # of predictions of order 1, after a kernel and its factors were merged


def predictions(model, x=X):
    return model.predict(x, verbose=0)


def dropped(caught):
    """The number of warnings about dropped averages. Keras itself warns of the inner optimizer."""
    return sum("belong to no variable any more" in str(warning.message) for warning in caught)


def has_method(layer, method):
    return pytest.mark.skipif(not hasattr(layer, method), reason=f"this Keras has no {method}")


def low_rank(layer, inputs):
    """A model with one layer of low-rank factors. Only these and the last bias are trained."""
    x = keras.Input(inputs)
    model = keras.Model(x, layers.Dense(1)(layers.Flatten()(layer(x))))
    layer.enable_lora(2)
    return model


LOW_RANK = {
    "Dense": lambda: low_rank(layers.Dense(5), (4,)),
    "EinsumDense": lambda: low_rank(layers.EinsumDense("ab,bc->ac", 5), (4,)),
    "Embedding": lambda: low_rank(layers.Embedding(7, 3), (4,)),
    "Conv1D": lambda: low_rank(layers.Conv1D(3, 2), (4, 1)),
}


class TestLayersThatStoreSomethingElse:
    """Keras merges low-rank factors into the kernel when it saves."""

    def trained(self, kind):
        keras.utils.set_random_seed(0)
        model = LOW_RANK[kind]()
        model.compile(MovingAverage(optimizers.Adam(0.05), average_decay=0.9), "mse")
        x = X.reshape(32, *model.input_shape[1:])
        if kind == "Embedding":
            x = np.abs(x * 2).astype("int32") % 7
        model.fit(x, Y, epochs=5, batch_size=8, verbose=0)
        return model, x

    @pytest.mark.slow_on("jax", "tensorflow")
    @pytest.mark.sample(2)
    @pytest.mark.parametrize("kind", LOW_RANK)
    def test_averages_that_a_low_rank_file_lacks_are_refused_with_advice(self, kind, tmp_path):
        model, x = self.trained(kind)
        raw = predictions(model, x)
        model.save(tmp_path / "model.keras")

        loaded = keras.saving.load_model(tmp_path / "model.keras")

        np.testing.assert_allclose(predictions(loaded, x), raw, atol=TOLERANCE)
        for use in (keras_avg.swap_weights, keras_avg.assign_average_vars):
            with pytest.raises(
                ValueError, match=r"`keras_avg.swap_weights\(model\)`, then `model.s"
            ):
                use(loaded)
        np.testing.assert_allclose(predictions(loaded, x), raw, atol=TOLERANCE)
        with model.optimizer.average_weights():  # The averages in this process are still there.
            assert np.abs(predictions(model, x) - raw).max() > 10 * TOLERANCE

    @pytest.mark.sample(1)
    @pytest.mark.parametrize("kind", LOW_RANK)
    def test_a_low_rank_file_of_the_averages_says_that_raw_weights_are_lost(self, kind, tmp_path):
        model, x = self.trained(kind)
        with model.optimizer.average_weights():
            averaged = predictions(model, x)
            model.save(tmp_path / "model.keras")

        loaded = keras.saving.load_model(tmp_path / "model.keras")

        for use in (keras_avg.swap_weights, lambda m: m.fit(x, Y, verbose=0)):
            with pytest.raises(RuntimeError, match=r"assign_average_vars\(model\)"):
                use(loaded)
        np.testing.assert_allclose(predictions(loaded, x), averaged, atol=TOLERANCE)
        loaded.save(tmp_path / "again.keras")
        again = keras.saving.load_model(tmp_path / "again.keras")
        np.testing.assert_allclose(predictions(again, x), averaged, atol=TOLERANCE)
        keras_avg.assign_average_vars(again)
        again.fit(x, Y, verbose=0)

    def test_layers_with_a_file_format_of_their_own_keep_their_averages(self, tmp_path):
        model = keras.Sequential(
            [keras.Input((4,)), Transposed(), layers.SpectralNormalization(layers.Dense(1))]
        )
        model.compile(SWA("sgd", 0, 1), "mse")
        model.fit(X, Y, batch_size=8, verbose=0)
        model.save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras")
        small.assert_same_bits(loaded.optimizer.get_weights(), model.optimizer.get_weights())
        for each in (model, loaded):
            keras_avg.swap_weights(each)
        small.assert_same_bits(loaded.get_weights(), model.get_weights())


@keras.saving.register_keras_serializable(package="keras_avg_tests")
class Transposed(layers.Layer):
    def build(self, shape):
        self.matrix = self.add_weight(shape=(shape[-1], 3), name="matrix")

    def call(self, x):
        return x @ self.matrix

    def save_own_variables(self, store):
        store["transposed"] = small.numpy(self.matrix).T

    def load_own_variables(self, store):
        self.matrix.assign(store["transposed"][...].T)


USES = {
    "raw": lambda model: None,
    "assigned": keras_avg.assign_average_vars,
    "swapped": keras_avg.swap_weights,
}


@has_method(layers.Dense, "quantize")
class TestQuantizedModels:
    def trained(self, optimizer=None):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((4,)), layers.Dense(8), layers.Dense(1)])
        model.compile(optimizer or SWA(optimizers.Adam(0.01), 0, 1), "mse")
        model.fit(X, Y, epochs=2, batch_size=8, verbose=0)
        return model

    def quantized(self, model):
        for layer in model.layers:
            layer.quantize("int8")
        model.compile(model.optimizer, "mse")
        return model

    @pytest.mark.slow_on("jax", "tensorflow")
    @pytest.mark.sample(2)
    @pytest.mark.parametrize("use", USES)
    @pytest.mark.parametrize("optimizer", [None, lambda: SWA(MovingAverage("sgd"), 0, 1)])
    def test_a_quantized_model_loads_with_one_warning_for_dropped_averages(
        self, use, optimizer, tmp_path
    ):
        model = self.trained(optimizer and optimizer())
        USES[use](model)
        expected = predictions(self.quantized(model))
        model.save(tmp_path / "model.keras")

        with pytest.warns(UserWarning, match=".") as caught:
            loaded = keras.saving.load_model(tmp_path / "model.keras")

        np.testing.assert_allclose(predictions(loaded), expected, atol=1e-3)
        assert dropped(caught) == len(keras_avg.averaging_optimizers(model))
        assert keras_avg.averaging_optimizers(loaded)[0].num_snapshots == 0
        with pytest.raises(ValueError, match="then quantize and save"):
            keras_avg.swap_weights(loaded)

    @pytest.mark.slow_on("jax", "tensorflow")
    def test_weights_of_a_quantized_model_load_into_a_new_one(self, tmp_path):
        model = self.quantized(self.trained())
        model.save_weights(tmp_path / "model.weights.h5")
        fresh = keras.Sequential([keras.Input((4,)), layers.Dense(8), layers.Dense(1)])
        fresh.compile(SWA("adam"), "mse")
        self.quantized(fresh)
        with pytest.warns(UserWarning, match="no variable any more|Skipping"):
            fresh.load_weights(tmp_path / "model.weights.h5")
        np.testing.assert_allclose(predictions(fresh), predictions(model), atol=1e-3)

    def test_low_rank_factors_enabled_after_training_do_not_stop_a_model_from_loading(
        self, tmp_path
    ):
        model = self.trained()
        model.layers[0].enable_lora(2)
        expected = predictions(model)
        model.save(tmp_path / "model.keras")
        with pytest.warns(UserWarning, match=".") as caught:
            loaded = keras.saving.load_model(tmp_path / "model.keras")
        assert dropped(caught) == 1
        np.testing.assert_allclose(predictions(loaded), expected, atol=TOLERANCE)

    def test_layers_frozen_after_training_do_not_stop_a_model_from_loading(self, tmp_path):
        model = self.trained()
        model.layers[0].trainable = False
        model.save(tmp_path / "model.keras")
        with pytest.warns(UserWarning, match=".") as caught:
            loaded = keras.saving.load_model(tmp_path / "model.keras")
        assert dropped(caught) == 1
        small.assert_same_bits(loaded.get_weights(), model.get_weights())

    def test_averages_of_a_removed_layer_are_dropped_and_others_are_kept(self, tmp_path):
        model = self.trained(SWA(optimizers.SGD(0.01), 0, 1))
        averages = small.slots(model.optimizer, model.layers[0].trainable_variables)
        model.pop()
        model.save(tmp_path / "model.keras")
        with pytest.warns(UserWarning, match=".") as caught:
            loaded = keras.saving.load_model(tmp_path / "model.keras")
        assert dropped(caught) == 1
        assert loaded.optimizer.num_snapshots == model.optimizer.num_snapshots
        small.assert_same_bits(small.slots(loaded.optimizer, loaded.trainable_variables), averages)


class TestFloat8:
    @pytest.mark.sample(2)
    @pytest.mark.parametrize("swapped", [False, True])
    @pytest.mark.parametrize(
        "wrapper",
        [
            lambda: SWA(MovingAverage(optimizers.SGD(momentum=0.9)), 0, 1),
            lambda: MovingAverage("adam"),
        ],
        ids=["nested", "adam"],
    )
    def test_averages_of_float8_models_go_to_the_variables_of_their_paths(
        self, wrapper, swapped, tmp_path
    ):
        keras.utils.set_random_seed(0)
        layer = layers.Dense(6)
        layer.build((None, 4))
        layer.quantize("float8")
        model = keras.Sequential([layer])
        model.compile(wrapper(), "mse")
        model.fit(X, np.repeat(Y, 6, axis=1), batch_size=8, verbose=0)
        raw = {self.name(v): small.numpy(v) for v in model.trainable_variables}
        averages = self.averages(model)
        if swapped:
            keras_avg.swap_weights(model)
        model.save(tmp_path / "model.keras")

        loaded = keras.saving.load_model(tmp_path / "model.keras")

        found = self.averages(loaded)
        assert found.keys() == averages.keys()
        for key in found:
            np.testing.assert_array_equal(found[key], averages[key])
        if swapped:
            keras_avg.swap_weights(loaded)
        for variable in loaded.trainable_variables:
            np.testing.assert_array_equal(small.numpy(variable), raw[self.name(variable)])

    def name(self, variable):
        """The names of the layer and of the variable. Keras 3.16 leaves out that of the model."""
        return tuple(variable.path.split("/")[-2:])

    def averages(self, model):
        return {
            (i, *self.name(variable)): small.numpy(wrapper.get_slot(variable, "average"))
            for i, wrapper in enumerate(keras_avg.averaging_optimizers(model))
            for variable in model.trainable_variables
            if wrapper.get_slot(variable, "average") is not None
        }


def named(names, optimizer):
    """A model of layers with the same shape and these names, in this order."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((4,)), *(layers.Dense(4, name=name) for name in names)], name="named"
    )
    model.compile(optimizer, "mse")
    return model


@pytest.mark.slow_on("tensorflow")
def test_an_average_goes_to_the_variable_of_its_path_and_not_of_its_number(tmp_path):
    """The file numbers the averages in another order than that of the model's variables."""
    model = named("ab", SWA(optimizers.SGD(0.01), 0, 1))
    model.fit(X, X, batch_size=8, verbose=0)
    model.save_weights(tmp_path / "model.weights.h5")
    with h5py.File(tmp_path / "model.weights.h5", "r+") as file:
        arrays = file["optimizer/vars"]
        for one, other in ((0, 2), (1, 3)):
            arrays.move(f"average_{one}", "aside")
            arrays.move(f"average_{other}", f"average_{one}")
            arrays.move("aside", f"average_{other}")
    other = named("ab", SWA(optimizers.SGD(0.01), 0, 1))
    other.optimizer.build(other.trainable_variables)
    other.load_weights(tmp_path / "model.weights.h5")
    small.assert_same_bits(other.optimizer.get_weights(), model.optimizer.get_weights())


@pytest.mark.slow_on("tensorflow")
@pytest.mark.parametrize("without", ["paths", "names"])
def test_averages_go_by_order_if_paths_are_missing_as_in_files_of_0_1(tmp_path, without):
    model = named("ab", SWA(MovingAverage("sgd"), 0, 1))
    model.fit(X, X, batch_size=8, verbose=0)
    model.optimizer.swap_weights()
    model.save_weights(tmp_path / "model.weights.h5")
    if without == "paths":
        with h5py.File(tmp_path / "model.weights.h5", "r+") as file:
            file.visititems(lambda _, item: item.attrs.pop("path", None))
    other = named("ab" if without == "paths" else "cd", SWA(MovingAverage("sgd"), 0, 1))
    other.optimizer.build(other.trainable_variables)
    other.load_weights(tmp_path / "model.weights.h5")
    small.assert_same_bits(other.optimizer.get_weights(), model.optimizer.get_weights())
    for each in (model, other):
        keras_avg.swap_weights(each)
    small.assert_same_bits(other.get_weights(), model.get_weights())


@pytest.mark.skipif(
    not hasattr(optimizers, "MultiOptimizer"), reason="MultiOptimizer came with Keras 3.15"
)
# Keras gives this warning about its own optimizers.
@pytest.mark.filterwarnings("ignore:Skipping variable loading")
class TestMembersOfAMultiOptimizer:
    """Keras loads a member twice. The second time its store is empty."""

    def model(self, pattern, wrap=lambda member: member):
        model = named("ab", wrap(self.members(pattern)))
        model.fit(X, X, batch_size=8, verbose=0)
        return model

    def members(self, pattern):
        wrapper = MovingAverage(optimizers.SGD(0.1))
        members = optimizers.OptimizerMap(wrapper, {pattern: optimizers.SGD(0.1)})
        return optimizers.MultiOptimizer(members)

    @pytest.mark.parametrize("swapped", [False, True])
    def test_a_state_of_members_that_does_not_fit_is_refused_completely(self, tmp_path, swapped):
        saved, other = self.model("named/b/.*"), self.model("nothing")
        if swapped:
            keras_avg.swap_weights(saved)
        saved.save_weights(tmp_path / "m.weights.h5")
        (wrapper,) = keras_avg.averaging_optimizers(other)
        state = wrapper.get_weights()
        with pytest.raises(ValueError, match="does not fit optimizer 'MovingAverage'"):
            other.load_weights(tmp_path / "m.weights.h5")
        assert not wrapper.averages_in_model
        small.assert_same_bits(wrapper.get_weights()[:7], state[:7])

    @pytest.mark.slow_on("tensorflow")
    def test_a_state_of_members_that_fits_is_loaded_after_one_that_did_not_fit(self, tmp_path):
        saved, other = self.model("named/b/.*"), self.model("nothing")
        saved.save_weights(tmp_path / "m.weights.h5")
        other.save_weights(tmp_path / "o.weights.h5")
        with pytest.raises(ValueError, match="does not fit optimizer"):
            other.load_weights(tmp_path / "m.weights.h5")
        other.load_weights(tmp_path / "o.weights.h5")
        fresh = named("ab", self.members("nothing"))
        fresh.save_weights(tmp_path / "unbuilt.weights.h5")  # This store is empty.
        other.load_weights(tmp_path / "unbuilt.weights.h5")


BOMBS = {
    "average_{}": r"shape \(\d, ?\d?\)|shape \(\d+,\)|has \d variables",
    "weight_{}": "it would add .* numbers",
    "slot_s{}_0": r"Received: shape \(268435456,\)|it would add",
    "raw_{}": "has",
    "raw_statistic_{}": "has",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_file_that_claims_gigabytes_is_refused_before_it_is_read(name, tmp_path):
    import resource

    model = small.fit(small.model(SWA("sgd", 0, 1)), epochs=1)
    model.save_weights(tmp_path / "m.weights.h5")
    with h5py.File(tmp_path / "m.weights.h5", "r+") as file:
        group = file["optimizer/vars"]
        for i in range(3):
            key = name.format(i)
            if key in group:
                del group[key]
            group.create_dataset(key, (1 << 28,), "f4", chunks=(1 << 20,), fillvalue=1.0)
    state = model.optimizer.get_weights()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=BOMBS[name]):
        model.load_weights(tmp_path / "m.weights.h5")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB
    assert grown < 2**19, "half of one of the three arrays"
    small.assert_same_bits(model.optimizer.get_weights(), state)


@pytest.mark.slow_on("jax", "tensorflow")
def test_a_file_with_too_many_small_slots_is_refused(tmp_path):
    model = small.fit(small.model(SWA("sgd", 0, 1)), epochs=1)
    model.save_weights(tmp_path / "m.weights.h5")
    shape = tuple(model.trainable_variables[0].shape)
    with h5py.File(tmp_path / "m.weights.h5", "r+") as file:
        for i in range(2**16 // np.prod(shape) + 1):
            file["optimizer/vars"].create_dataset(f"slot_s{i}_0", shape, "f4")
    with pytest.raises(ValueError, match="call `add_weight` or `add_slot` before loading"):
        model.load_weights(tmp_path / "m.weights.h5")


class TestOptimizersWithoutVariables:
    def test_the_state_of_an_optimizer_without_variables_is_set_from_a_list(self):
        for optimizer in (SWA("adam"), SWA(MovingAverage("sgd"))):
            optimizer.build([])
            before = optimizer.get_weights()
            optimizer.set_weights([array + 1 for array in before])
            small.assert_same_bits(optimizer.get_weights(), [array + 1 for array in before])

    def test_a_list_of_the_wrong_length_is_refused(self):
        optimizer = SWA("adam")
        optimizer.build([])
        with pytest.raises(ValueError, match="no variables to set before it is built"):
            optimizer.set_weights([np.zeros(3)] * 20)

    @pytest.mark.slow_on("jax", "tensorflow")
    def test_an_optimizer_that_is_not_built_takes_nothing_from_a_file(self, tmp_path):
        model = small.fit(small.model(SWA(MovingAverage(optimizers.SGD(0.5)), 0, 1)), epochs=1)
        model.save_weights(tmp_path / "m.weights.h5")
        other = small.model(SWA(MovingAverage(optimizers.SGD(0.1)), 0, 1))
        with pytest.warns(UserWarning, match="Call `optimizer.build") as caught:
            other.load_weights(tmp_path / "m.weights.h5")
        assert len(caught) == 1
        small.assert_same_bits(
            [small.numpy(v) for v in model.weights], [small.numpy(v) for v in other.weights]
        )
        assert int(other.optimizer.iterations) == 0
        assert float(other.optimizer.learning_rate) == np.float32(0.1)
        other.optimizer.build(other.trainable_variables)
        other.load_weights(tmp_path / "m.weights.h5")
        small.assert_same_bits(other.optimizer.get_weights(), model.optimizer.get_weights())
