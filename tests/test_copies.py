"""Copies without Keras' files: by `copy`, pickles, Orbax, and `tf.train.Checkpoint`."""

import copy
import importlib.util
import pickle

import keras
import pytest
import small_training as small
from keras import optimizers

from keras_avg import SWA, MovingAverage, schedules


def nested():
    return SWA(MovingAverage(optimizers.Adam(0.01), average_decay=0.75), 1, 2)


COPIES = {
    "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),
    "copy.deepcopy": copy.deepcopy,
}
each_copy = pytest.mark.parametrize("route", COPIES)


@each_copy
def test_a_copy_of_an_optimizer_has_its_config(route):
    optimizer = SWA(
        MovingAverage(
            optimizers.SGD(schedules.TriangularCyclicalLearningRate(0.1, 1.0, 2), momentum=0.5),
            average_decay=optimizers.schedules.CosineDecay(0.9, 10),
            start_step=3,
        ),
        start_averaging=2,
        average_period=5,
        average_dtype="float32",
        clipnorm=1.0,
    )
    copied = COPIES[route](optimizer)
    assert type(copied) is SWA
    assert copied.get_config() == optimizer.get_config()
    assert copied.inner_optimizer is not optimizer.inner_optimizer


@pytest.mark.slow_on("jax", "tensorflow")
@pytest.mark.sample(1)
@each_copy
def test_a_copy_of_an_optimizer_with_state_has_its_config_and_no_state(route):
    optimizer = small.fit(small.model(nested())).optimizer
    before = optimizer.get_weights()
    with pytest.warns(UserWarning, match="Skipping variable loading"):  # Keras' own optimizers do.
        copied = COPIES[route](optimizer)
    assert copied.get_config() == optimizer.get_config()
    assert not copied.built
    assert copied.num_snapshots == 0
    small.assert_same_bits(optimizer.get_weights(), before)
    trained = small.fit(small.model(copied), epochs=1)
    expected = small.fit(small.model(nested()), epochs=1)
    small.assert_same_bits(trained.optimizer.get_weights(), expected.optimizer.get_weights())


@pytest.mark.sample(2)
@each_copy
@pytest.mark.parametrize("swapped", [False, True])
def test_a_copy_of_a_model_has_its_optimizers_state(route, swapped):
    model = small.fit(small.model(nested()))
    raw = model.get_weights()
    if swapped:
        model.optimizer.swap_weights()

    copied = COPIES[route](model)

    small.assert_same_bits(copied.get_weights(), model.get_weights())
    small.assert_same_bits(copied.optimizer.get_weights(), model.optimizer.get_weights())
    assert copied.optimizer.averages_in_model == swapped
    if swapped:
        copied.optimizer.swap_weights()
        model.optimizer.swap_weights()
    small.assert_same_bits(copied.get_weights(), raw)
    small.assert_same_bits(small.fit(copied).get_weights(), small.fit(model).get_weights())


def functional_model():
    # Not a Sequential model: Keras 3.15 gives its variables other names when it loads one from
    # Orbax. Then it finds none of them in the checkpoint, and does not say so.
    inputs = keras.Input((5,))
    model = keras.Model(inputs, keras.layers.Dense(1)(keras.layers.Dense(6)(inputs)))
    model.compile(nested(), "mse")
    return model


@pytest.mark.skipif(
    keras.backend.backend() != "jax"
    or not hasattr(keras.callbacks, "OrbaxCheckpoint")
    or importlib.util.find_spec("orbax") is None,
    reason="Orbax is installed where JAX is, and came with a later Keras",
)
def test_a_model_loaded_from_orbax_trains_on_as_if_it_had_never_stopped(tmp_path):
    model = functional_model()
    orbax = keras.callbacks.OrbaxCheckpoint(
        str(tmp_path / "orbax"), save_freq="epoch", save_on_background=False
    )
    small.fit(model, callbacks=[orbax])

    other = keras.saving.load_model(str(tmp_path / "orbax"))

    small.assert_same_bits(other.optimizer.get_weights(), model.optimizer.get_weights())
    small.assert_same_bits(small.fit(other).get_weights(), small.fit(model).get_weights())
    small.assert_same_bits(other.optimizer.get_weights(), model.optimizer.get_weights())
    for optimizer in (other.optimizer, model.optimizer):
        optimizer.swap_weights()
    small.assert_same_bits(other.get_weights(), model.get_weights())


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="tf.train.Checkpoint is TensorFlow's"
)
class TestTensorFlowCheckpoint:
    @pytest.mark.parametrize("built", [True, False])
    def test_a_tensorflow_checkpoint_restores_every_bit(self, tmp_path, built):
        import tensorflow as tf

        model = small.fit(small.model(nested()))
        path = tf.train.Checkpoint(model=model).save(str(tmp_path / "checkpoint"))
        other = small.model(nested())
        if built:
            small.fit(other, epochs=1)
        else:
            other.optimizer.build(other.trainable_variables)

        tf.train.Checkpoint(model=other).restore(path).assert_existing_objects_matched()

        small.assert_same_bits(other.get_weights(), model.get_weights())
        small.assert_same_bits(other.optimizer.get_weights(), model.optimizer.get_weights())
        small.assert_same_bits(small.fit(other).get_weights(), small.fit(model).get_weights())
        small.assert_same_bits(other.optimizer.get_weights(), model.optimizer.get_weights())

    @pytest.mark.slow_on("tensorflow")
    def test_a_tensorflow_checkpoint_of_averages_says_that_it_lost_the_raw_weights(self, tmp_path):
        import tensorflow as tf

        model = small.fit(small.model(nested()))
        model.optimizer.swap_weights()
        path = tf.train.Checkpoint(model=model).save(str(tmp_path / "checkpoint"))
        other = small.fit(small.model(nested()))

        tf.train.Checkpoint(model=other).restore(path)

        assert other.optimizer.averages_in_model
        for use in (other.optimizer.swap_weights, lambda: small.fit(other)):
            with pytest.raises(RuntimeError, match="raw weights are not there"):
                use()
