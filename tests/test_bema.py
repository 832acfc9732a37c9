"""BEMA: a moving average that is corrected for its lag."""

import keras
import numpy as np
import oracles
import pytest
import small_training as small
from keras import optimizers

from keras_avg import BEMA

TOLERANCE = 1e-6  # rounding of a few float32 operations on numbers of order 1


def trl(trajectory, update_freq=1, update_after=0, power=0.5, bias_power=0.2, lag=10.0, slope=1.0):
    """The average after each step, computed like TRL's callback in float64.

    Up to `update_after` the average follows the weights. After that it is updated every
    `update_freq` steps, and `t` counts from there.
    """
    start = average = read = np.asarray(trajectory[0], "float64")
    for step, value in enumerate(trajectory[1:], start=1):
        theta = np.asarray(value, "float64")
        if step <= update_after:
            start = average = read = theta
        elif step % update_freq == 0:
            age = lag + slope * (step - update_after)
            average = (1 - age**-power) * average + age**-power * theta
            read = average + age**-bias_power * (theta - start)
        yield read


def test_bema_of_two_values_is_computed_in_the_head():
    # With these arguments the age is 1 at the first update.
    optimizer = BEMA(optimizers.SGD(1.0), power=0.5, bias_power=1.0, lag=0.0, multiplier=1.0)
    variable = keras.Variable([4.0])
    # The variable goes from 4 to 2. EMA = 4 + 1 (2 - 4), and average = 2 + 1 (2 - 4).
    small.apply(optimizer, [variable], [[2.0]])
    np.testing.assert_allclose(optimizer.get_slot(variable, "average"), [2.0])
    np.testing.assert_allclose(optimizer.get_slot(variable, "start"), [4.0])
    np.testing.assert_allclose(optimizer.get_slot(variable, "read"), [0.0])


@pytest.mark.sample(3, jax=1, tensorflow=1)
@pytest.mark.parametrize("start_step", [0, 3])
@pytest.mark.parametrize("average_period", [1, 2, 5])
def test_bema_equals_that_of_trl(average_period, start_step):
    arguments = {"average_period": average_period, "start_step": start_step}
    model = small.model(BEMA(optimizers.Adam(0.05), **arguments))
    trajectories = small.trajectories(model, 11)
    for average, values in zip(model.optimizer.averages(), trajectories, strict=True):
        (*_, expected) = trl(values, average_period, start_step)
        np.testing.assert_allclose(small.numpy(average), expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.slow_on("jax")
def test_bema_with_other_exponents_equals_the_oracle():
    arguments = {"power": 0.7, "bias_power": 0.4, "lag": 3.0, "multiplier": 0.5}
    model = small.model(BEMA(optimizers.Adam(0.05), **arguments))
    trajectories = small.trajectories(model, 11)
    for average, values in zip(model.optimizer.averages(), trajectories, strict=True):
        expected = oracles.bema(values, **arguments)
        np.testing.assert_allclose(small.numpy(average), expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.slow_on("jax", "tensorflow")
def test_bema_shows_the_variable_before_the_start_step():
    model = small.model(BEMA(optimizers.Adam(0.05), start_step=4, average_period=1))
    small.trajectories(model, 3)
    raw = [small.numpy(v) for v in model.trainable_variables]
    with model.optimizer.average_weights():
        small.assert_same_bits([small.numpy(v) for v in model.trainable_variables], raw)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"power": -1}, "Received: power=-1"),
        ({"bias_power": "x"}, "Received: bias_power='x'"),
        ({"lag": -1}, "Received: lag=-1"),
        ({"multiplier": float("inf")}, "Received: multiplier=inf"),
        ({"lag": 0.5, "multiplier": 0.1}, "at least 1.*Received: lag=0.5, multiplier=0.1"),
        ({"start_step": 0.5}, "in steps. Received: start_step=0.5"),
        ({"average_period": 0}, "Received: average_period=0"),
    ],
)
def test_bad_arguments_of_bema_are_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        BEMA("sgd", **arguments)
