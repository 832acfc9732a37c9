"""LAWA: the mean of the last few snapshots, computed from them."""

import keras
import numpy as np
import pytest
import small_training as small
from keras import optimizers

from keras_avg import LAWA, SWA


def averages(optimizer, steps):
    variable, found = keras.Variable([10.0]), []
    for _ in range(steps):
        small.apply(optimizer, [variable], [[1.0]])
        found.append(float(keras.ops.convert_to_numpy(optimizer.averages()[0])[0]))
    return found


def test_lawa_is_the_mean_of_all_snapshots_and_then_of_the_last_ones():
    # SGD(1) moves the variable to 9, 8, 7, ...
    assert averages(LAWA(optimizers.SGD(1.0), window=3, average_period=1), 5) == [9, 8.5, 8, 7, 6]


def test_a_window_of_one_is_the_last_snapshot():
    found = averages(LAWA(optimizers.SGD(1.0), 1, start_averaging=1, average_period=2), 5)
    assert found[1:] == [8, 8, 6, 6]


@pytest.mark.slow_on("jax", "tensorflow")
def test_a_window_that_is_never_full_equals_swa():
    models = [small.fit(small.model(o), epochs=2) for o in (LAWA("sgd", 7, 1, 2), SWA("sgd", 1, 2))]
    for ours, swa in zip(*(m.optimizer.averages() for m in models), strict=True):
        np.testing.assert_allclose(small.numpy(ours), small.numpy(swa), rtol=1e-6, atol=1e-6)


def test_a_snapshot_that_left_the_window_leaves_no_rounding_error():
    """A running sum would still have the rounding error of the value 1e8."""
    optimizer, variable = LAWA(optimizers.SGD(1.0), 2, average_period=1), keras.Variable([1e8])
    small.apply(optimizer, [variable], [[0.0]])
    variable.assign([0.1])
    small.apply(optimizer, [variable], [[0.0]], times=2)
    (average,) = optimizer.averages()
    np.testing.assert_array_equal(small.numpy(average), np.float32([0.1]))


@pytest.mark.parametrize(
    ("arguments", "received"),
    [
        ({"window": 0}, "window=0"),
        ({"window": 2.5}, "window=2.5"),
        ({"start_averaging": -1}, "start_averaging=-1"),
        ({"average_period": 0}, "average_period=0"),
    ],
)
def test_bad_arguments_of_lawa_are_refused(arguments, received):
    with pytest.raises(ValueError, match=f"must be an integer.*Received: {received}"):
        LAWA("sgd", **arguments)
