"""State in lists, files and configs is loaded completely if it fits, and otherwise refused."""

import json
import zipfile

import h5py
import keras
import numpy as np
import pytest
import small_training as small
from keras import optimizers

from keras_avg import SWA, MovingAverage


def trained(optimizer):
    return small.fit(small.model(optimizer), epochs=1)


def test_weights_are_first_the_wrappers_variables_and_then_the_inner_ones():
    optimizer = trained(SWA("adam", 0, 2)).optimizer

    own = len(optimizer.variables) - len(optimizer.inner_optimizer.variables)

    assert own == 3 + 6  # three counters, and an average for each trainable variable
    assert [v is w for v, w in zip(optimizer.weights, optimizer.variables, strict=True)]
    assert optimizer.variables[own:] == optimizer.inner_optimizer.variables
    for array, variable in zip(optimizer.get_weights(), optimizer.variables, strict=True):
        assert isinstance(array, np.ndarray)
        np.testing.assert_array_equal(array, small.numpy(variable))


@keras.saving.register_keras_serializable(package="keras_avg_tests")
class Drift(SWA):
    """Sums gradients in variables that it makes in the way of Keras' own optimizers."""

    def build(self, variables):
        super().build(variables)
        self.steps = self.add_variable(shape=(), dtype="int32", name="steps")
        self.sums, self.last = self.add_optimizer_variables(variables, ["sum", "last"])

    def apply(self, grads, trainable_variables=None):
        super().apply(grads, trainable_variables)
        self.steps.assign_add(1)
        for total, last, grad in zip(self.sums, self.last, grads, strict=True):
            total.assign_add(grad)
            last.assign(grad)


@pytest.mark.slow_on("jax", "tensorflow")
@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["model.keras", "model.weights.h5"])
def test_the_state_of_a_subclass_is_part_of_variables_and_files(name, tmp_path):
    model = trained(Drift("adam", 0, 2))
    assert int(model.optimizer.steps) == 6
    assert (
        len(model.optimizer.variables) == len(trained(SWA("adam", 0, 2)).optimizer.variables) + 13
    )

    if name == "model.keras":
        model.save(tmp_path / name)
        loaded = keras.saving.load_model(tmp_path / name)
    else:
        model.save_weights(tmp_path / name)
        loaded = small.model(Drift("adam", 0, 2))
        loaded.optimizer.build(loaded.trainable_variables)
        loaded.load_weights(tmp_path / name)

    assert np.any(loaded.optimizer.sums[0])
    small.assert_same_bits(loaded.optimizer.get_weights(), model.optimizer.get_weights())
    for each in (model, loaded):
        small.fit(each)
    small.assert_same_bits(loaded.optimizer.get_weights(), model.optimizer.get_weights())


@pytest.mark.slow_on("tensorflow")
def test_a_file_without_the_state_of_a_subclass_is_refused(tmp_path):
    trained(SWA("adam", 0, 2)).save_weights(tmp_path / "m.weights.h5")
    model = trained(Drift("adam", 0, 2))
    before = model.optimizer.get_weights()
    with pytest.raises(ValueError, match=r"has 22 variables\. Received: 9 variables"):
        model.load_weights(tmp_path / "m.weights.h5")
    small.assert_same_bits(model.optimizer.get_weights(), before)


@pytest.mark.slow_on("tensorflow")
def test_set_weights_takes_the_list_that_get_weights_returns():
    one, other = trained(SWA("adam", 0, 2)), small.model(SWA("adam", 0, 2))
    other.optimizer.build(other.trainable_variables)

    other.optimizer.set_weights(one.optimizer.get_weights())

    small.assert_same_bits(other.optimizer.get_weights(), one.optimizer.get_weights())
    assert other.optimizer.num_snapshots == one.optimizer.num_snapshots == 3


def test_set_weights_sets_all_variables_or_none():
    optimizer = trained(SWA("adam", 0, 2)).optimizer
    before = optimizer.get_weights()
    with pytest.raises(ValueError, match=r"has 23 variables. Received: 22 variables"):
        optimizer.set_weights([np.zeros_like(w) for w in before[:-1]])
    with pytest.raises(ValueError, match=r"shape \(1,\). Received: shape \(7,\)"):
        optimizer.set_weights([np.zeros_like(w) for w in before[:-1]] + [np.zeros(7)])
    small.assert_same_bits(optimizer.get_weights(), before)


def test_set_weights_before_build_is_refused():
    with pytest.raises(ValueError, match="no variables to set before it is built"):
        SWA("adam").set_weights([])


@pytest.mark.slow_on("tensorflow")
def test_a_file_has_each_own_variable_once(tmp_path):
    model = trained(SWA(MovingAverage("adam"), 0, 2))
    model.save(tmp_path / "model.keras")
    with zipfile.ZipFile(tmp_path / "model.keras") as archive:
        archive.extract("model.weights.h5", tmp_path)

    arrays = []
    with h5py.File(tmp_path / "model.weights.h5") as file:
        file["optimizer"].visititems(
            lambda name, item: arrays.append(name) if isinstance(item, h5py.Dataset) else None
        )

    assert len(arrays) == len(model.optimizer.variables)


@pytest.mark.slow_on("jax", "tensorflow")
@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["model.keras", "model.weights.h5"])
def test_files_restore_every_bit(tmp_path, name):
    model = trained(SWA(MovingAverage(optimizers.Adam(0.01)), 0, 2))
    other = trained(SWA(MovingAverage(optimizers.Adam(0.5)), 0, 2))
    save = model.save if name.endswith("keras") else model.save_weights
    save(tmp_path / name)

    other.load_weights(tmp_path / name)

    small.assert_same_bits(other.get_weights(), model.get_weights())
    small.assert_same_bits(other.optimizer.get_weights(), model.optimizer.get_weights())


@pytest.mark.slow_on("tensorflow")
# With a momentum of 0.9, the other optimizer has as many arrays, and of the same shapes.
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_file_of_another_optimizer_is_refused_and_changes_nothing(tmp_path, momentum):
    trained(optimizers.SGD(0.1, momentum=momentum)).save_weights(tmp_path / "other.weights.h5")
    model = trained(SWA(MovingAverage("adam"), 0, 2))
    before = model.optimizer.get_weights()

    with pytest.raises(ValueError, match="skip_mismatch=True"):
        model.load_weights(tmp_path / "other.weights.h5")

    small.assert_same_bits(model.optimizer.get_weights(), before)


def test_averaging_can_start_from_a_file_of_another_optimizer(tmp_path):
    plain = trained(optimizers.SGD(0.1, momentum=0.9))
    plain.save_weights(tmp_path / "plain.weights.h5")
    model = small.model(SWA(optimizers.SGD(0.1, momentum=0.9), 0, 1))
    model.optimizer.build(model.trainable_variables)

    # These are warnings of Keras about the averages and the inner optimizer. Their text changes
    # between releases.
    with pytest.warns(UserWarning, match="could not be loaded|Skipping variable loading"):
        model.load_weights(tmp_path / "plain.weights.h5", skip_mismatch=True)

    small.assert_same_bits(model.get_weights(), plain.get_weights())
    assert model.optimizer.num_snapshots == 0


def test_loading_into_an_optimizer_that_is_not_built_warns_and_says_to_build(tmp_path):
    trained(SWA("sgd")).save_weights(tmp_path / "model.weights.h5")
    model = small.model(SWA("sgd"))
    with pytest.warns(UserWarning, match="Call `optimizer.build") as caught:
        model.load_weights(tmp_path / "model.weights.h5")
    assert caught


def test_a_config_has_the_public_names_of_inner_optimizers():
    text = json.dumps(SWA(MovingAverage(optimizers.Adam())).get_config())
    assert "keras.src.backend" not in text
    assert '"class_name": "Adam"' in text


@pytest.mark.skipif(
    not hasattr(optimizers, "MultiOptimizer"), reason="MultiOptimizer came with Keras 3.15"
)
def test_a_config_has_the_public_names_of_the_members_of_a_multi_optimizer():
    members = optimizers.OptimizerMap(optimizers.Adam(), {".*bias": optimizers.SGD()})
    text = json.dumps(SWA(optimizers.MultiOptimizer(members)).get_config())
    assert "keras.src.backend" not in text
    assert '"class_name": "SGD"' in text


def test_an_optimizer_is_saved_and_loaded_by_its_registered_name():
    optimizer = SWA("adam", 3, 4)
    config = optimizers.serialize(optimizer)
    assert config["registered_name"] == "keras_avg>SWA"
    assert optimizers.deserialize(config).get_config() == optimizer.get_config()


def test_averages_of_low_precision_weights_survive_a_file(tmp_path, dtype_policy):
    dtype_policy("bfloat16")
    model = trained(MovingAverage("sgd", average_decay=0.999))
    model.save(tmp_path / "model.keras")

    loaded = keras.saving.load_model(tmp_path / "model.keras")

    small.assert_same_bits(loaded.optimizer.get_weights(), model.optimizer.get_weights())


@pytest.mark.slow_on("jax", "tensorflow")
def test_an_optimizer_built_for_no_variables_can_be_built_for_some():
    model = small.model()
    optimizer = SWA(MovingAverage("nadam"), 0, 2)
    optimizer.build([])
    assert not optimizer.has_average
    assert not optimizer.averages_in_model

    model.compile(optimizer, "mse")
    optimizer.build(model.trainable_variables)

    expected = trained(SWA(MovingAverage("nadam"), 0, 2)).optimizer
    assert len(optimizer.variables) == len(expected.variables)
    small.assert_same_bits(
        small.fit(model, epochs=1).optimizer.get_weights(), expected.get_weights()
    )


@pytest.mark.slow_on("jax", "tensorflow")
# Keras gives this warning about its own optimizers.
@pytest.mark.filterwarnings("ignore:Skipping variable loading")
@pytest.mark.parametrize(
    "optimizer",
    [
        lambda: SWA("sgd"),
        lambda: SWA(MovingAverage("adam")),
        lambda: optimizers.LossScaleOptimizer(SWA("sgd")),
    ],
    ids=["one", "nested", "under a LossScaleOptimizer"],
)
def test_a_model_saved_before_training_is_loaded_and_trained(optimizer, tmp_path):
    model = small.model(optimizer())
    model.save(tmp_path / "untrained.keras")

    loaded = keras.saving.load_model(tmp_path / "untrained.keras")

    for each in (model, loaded):
        small.fit(each, epochs=1)
    small.assert_same_bits(loaded.get_weights(), model.get_weights())
    small.assert_same_bits(
        [small.numpy(v) for v in loaded.optimizer.variables],
        [small.numpy(v) for v in model.optimizer.variables],
    )


def test_weights_from_before_training_are_not_loaded_over_averages(tmp_path):
    model = small.model(SWA("sgd", 0, 1))
    model.save_weights(tmp_path / "untrained.weights.h5")
    small.fit(model, epochs=1)
    model.load_weights(tmp_path / "untrained.weights.h5")
    model.optimizer.swap_weights()
    with pytest.raises(ValueError, match="without raw weights is refused"):
        model.load_weights(tmp_path / "untrained.weights.h5")
