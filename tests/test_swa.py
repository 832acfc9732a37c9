"""SWA takes the right snapshots, and averages them right."""

import keras
import numpy as np
import oracles
import pytest
import small_training as small
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import optimizers

from keras_avg import SWA

# Rounding of float32 sums of a few dozen numbers of order 1.
TOLERANCE = 1e-6


def walk(optimizer, steps, gradient=0.1, start=1.0):
    """A variable with a constant gradient, and its values before and after each step."""
    variable = keras.Variable([start], dtype="float32")
    values = [small.numpy(variable)]
    for _ in range(steps):
        small.apply(optimizer, [variable], [[gradient]])
        values.append(small.numpy(variable))
    return variable, values


def test_three_snapshots_average_to_the_middle_one():
    optimizer = SWA(optimizers.SGD(1.0), start_averaging=0, average_period=1)

    variable, _ = walk(optimizer, steps=3)

    np.testing.assert_allclose(variable, [0.7], rtol=TOLERANCE)
    np.testing.assert_allclose(optimizer.get_slot(variable, "average"), [0.8], rtol=TOLERANCE)


@pytest.mark.slow_on("jax", "tensorflow")
@settings(max_examples=25, deadline=None)
@given(start=st.integers(0, 12), period=st.integers(1, 6), updates=st.integers(1, 16))
def test_average_is_the_mean_of_the_snapshots(start, period, updates):
    optimizer = SWA(optimizers.SGD(0.1, momentum=0.9), start, period)

    variable, values = walk(optimizer, updates)

    expected = 0 if updates <= start else (updates - 1 - start) // period + 1
    assert optimizer.num_snapshots == expected
    assert optimizer.has_average == (expected > 0)
    if expected:
        np.testing.assert_allclose(
            optimizer.get_slot(variable, "average"),
            oracles.swa(values, start, period),
            rtol=TOLERANCE,
            atol=TOLERANCE,
        )


@pytest.mark.slow_on("jax")
def test_the_first_snapshot_is_the_variable_bit_for_bit():
    optimizer = SWA(optimizers.SGD(0.3), start_averaging=2, average_period=5)
    variable = keras.Variable(np.geomspace(1e-8, 1e8, 50), dtype="float32")

    small.apply(optimizer, [variable], [np.geomspace(1e8, 1e-8, 50)], times=3)

    np.testing.assert_array_equal(optimizer.get_slot(variable, "average"), variable)


def test_the_first_snapshot_keeps_an_infinite_value():
    optimizer = SWA(optimizers.SGD(1.0), 0, 1)
    variable = keras.Variable([np.inf, 1.0], dtype="float32")

    small.apply(optimizer, [variable], [[0.0, 0.0]])

    np.testing.assert_array_equal(optimizer.get_slot(variable, "average"), [np.inf, 1.0])


def test_float32_counts_snapshots_beyond_its_own_integers():
    optimizer = SWA(optimizers.SGD(1.0), 0, 1)
    variable = keras.Variable([0.0], dtype="float32")
    optimizer.build([variable])
    count = 2**24 + 1  # float32 cannot hold this integer.
    state = optimizer.get_weights()
    state[1] = np.asarray(count)
    optimizer.set_weights(state)

    small.apply(optimizer, [variable], [[-1.0]])

    assert optimizer.num_snapshots == count + 1


def test_training_that_ends_before_the_start_has_no_average():
    optimizer = SWA(optimizers.SGD(1.0), start_averaging=5)
    variable, _ = walk(optimizer, steps=5)

    assert not optimizer.has_average
    with pytest.raises(ValueError, match=r"no snapshot yet.*Received: 5 updates"):
        optimizer.assign_average_vars([variable])
    np.testing.assert_allclose(variable, [0.5], rtol=TOLERANCE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start_averaging": -1}, "start_averaging=-1"),
        ({"start_averaging": 0.5}, "start_averaging=0.5"),
        ({"start_averaging": True}, "start_averaging=True"),
        ({"average_period": 0}, "average_period=0"),
        ({"average_period": 2.0}, "average_period=2.0"),
        ({"average_period": "10"}, "average_period='10'"),
    ],
)
def test_steps_that_are_not_nonnegative_integers_are_refused(arguments, message):
    with pytest.raises(ValueError, match=f"integer >= .*Received: {message}"):
        SWA("sgd", **arguments)


def test_positional_arguments_of_swa_are_those_of_addons():
    optimizer = SWA("sgd", 3, np.int64(4), "Mean", False)

    config = optimizer.get_config()

    assert (config["start_averaging"], config["average_period"]) == (3, 4)
    assert (config["name"], config["sequential_update"]) == ("Mean", False)
