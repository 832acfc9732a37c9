"""Files that version 0.1 wrote on torch are loaded bit for bit on every backend.

They hold the small model after six steps of `SWA(MovingAverage(Adam))`, with an added slot and an
added weight. In one file the model has the raw weights. In the other it is swapped, and has
batch-normalization statistics of the averages.
"""

import pathlib

import keras
import numpy as np
import pytest
import small_training as small
from keras import optimizers

import keras_avg

FILES = pathlib.Path(__file__).parent / "files_of_0_1"


def expected(kind):
    with np.load(FILES / "expected.npz") as arrays:
        return [arrays[name] for name in sorted(arrays.files) if name.startswith(kind)]


def built():
    inner = keras_avg.MovingAverage(optimizers.Adam(0.01))
    model = small.model(keras_avg.SWA(inner, 0, 2))
    model.optimizer.build(model.trainable_variables)
    return model


@pytest.mark.slow_on("jax", "tensorflow")
@pytest.mark.parametrize("name", ["raw.keras", "raw.weights.h5"])
def test_a_file_of_0_1_with_raw_weights_is_loaded(name):
    if name == "raw.keras":
        model = keras.saving.load_model(FILES / name)
    else:
        model = built()
        model.load_weights(FILES / name)
    small.assert_same_bits(model.get_weights(), expected("raw"))
    small.assert_same_bits(model.optimizer.get_weights(), expected("state"))
    small.fit(model, epochs=1)
    assert model.optimizer.num_snapshots == 6


def test_a_file_of_0_1_with_averages_is_loaded():
    model = keras.saving.load_model(FILES / "swapped.keras")
    small.assert_same_bits(model.get_weights(), expected("averaged"))
    assert model.optimizer.averages_in_model
    keras_avg.swap_weights(model)
    small.assert_same_bits(model.get_weights(), expected("raw"))
    small.assert_same_bits(model.optimizer.get_weights(), expected("state"))
