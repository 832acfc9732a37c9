"""Every rule is tried on a problem with a known answer: gradient descent on a noisy quadratic.

    x' = (1 - eta h) x - eta c xi,   a = 1 - eta h,   V = eta^2 c^2 / (1 - a^2)

V is the variance of x in equilibrium. The average of each rule has a known share of this variance.
The test measures it over many coordinates, each with its own noise.
"""

import math

import keras
import numpy as np
import pytest
import small_training as small
from keras import ops, optimizers

from keras_avg import BEMA, LAWA, SWA, SWAG, Lookahead, MovingAverage, decays

ETA, H, C = 0.1, 1.0, 1.0
A = 1 - ETA * H
V = ETA**2 * C**2 / (1 - A**2)
COORDINATES = 20_000
STEPS = 240
# The standard error of a variance over so many coordinates is 1 %. Five of them are allowed.
TOLERANCE = 0.05


def measured(wrapper, steps=STEPS):
    """The variance of the shown values over the coordinates, after training."""
    random = np.random.default_rng(11)
    x = keras.Variable(random.normal(size=COORDINATES, scale=V**0.5))
    optimizer = wrapper(optimizers.SGD(ETA))
    optimizer.build([x])
    for _ in range(steps):
        gradient = H * small.numpy(x) + C * random.normal(size=COORDINATES)
        small.apply(optimizer, [x], [gradient])
    (shown,) = optimizer.averages()
    return float(np.mean(ops.convert_to_numpy(shown).astype("float64") ** 2))


def of_weights(weights, lags):
    """The variance of a weighted sum in equilibrium: V times sum of w_i w_j a^|lag_i - lag_j|."""
    weights, lags = np.asarray(weights, "float64"), np.asarray(lags)
    return V * weights @ A ** np.abs(lags[:, None] - lags[None, :]) @ weights


def of_moving_average(decay, period):
    b, a = decay**period, A**period
    return V * (1 - b) / (1 + b) * (1 + a * b) / (1 - a * b)


def of_mean(number, period):
    j = np.arange(1, number)
    return V / number * (1 + 2 * np.sum((1 - j / number) * A ** (period * j)))


def of_lookahead(k, share):
    fast = share**2 * (1 - A ** (2 * k))
    return V * fast / (fast + 2 * share * (1 - share) * (1 - A**k))


def of_power_function(gamma, steps):
    edges = (np.arange(steps + 1) / steps) ** (gamma + 1)
    return of_weights(np.diff(edges), np.arange(steps))


def of_bema(steps, power=0.5, bias_power=0.2, lag=10.0):
    ages = lag + np.arange(1.0, steps + 1)
    weights = ages**-power * np.append(np.cumprod((1 - ages**-power)[::-1])[::-1][1:], 1.0)
    start = np.prod(1 - ages**-power)
    share = ages[-1] ** -bias_power
    weights = np.append(start - share, weights)
    weights[-1] += share
    return of_weights(weights, np.arange(steps + 1))


RULES = {
    "EMA": (lambda o: MovingAverage(o, average_decay=0.95), of_moving_average(0.95, 1)),
    "EMA every fourth step": (
        lambda o: MovingAverage(o, average_decay=0.95, average_period=4),
        of_moving_average(0.95, 4),
    ),
    "half-life": (
        lambda o: MovingAverage(o, average_decay=decays.HalfLife(8)),
        of_moving_average(0.5 ** (1 / 8), 1),
    ),
    "power function": (
        lambda o: MovingAverage(o, average_decay=decays.PowerFunction(0.1)),
        of_power_function(decays.PowerFunction(0.1).gamma, STEPS),
    ),
    "warm-up": (
        lambda o: MovingAverage(o, average_decay=decays.PowerWarmup(0.95)),
        of_moving_average(0.95, 1),
    ),
    "SWA": (lambda o: SWA(o, 0, 3), of_mean(STEPS // 3, 3)),
    "SWAG": (lambda o: SWAG(o, 0, 3, rank=1), of_mean(STEPS // 3, 3)),
    "LAWA": (lambda o: LAWA(o, 6, 0, 5), of_mean(6, 5)),
    "Lookahead": (lambda o: Lookahead(o, 5, 0.4), of_lookahead(5, 0.4)),
    "BEMA": (BEMA, of_bema(STEPS)),
    "SWA of EMA is its own": (
        lambda o: SWA(MovingAverage(o, average_decay=0.95), 0, 3),
        of_mean(STEPS // 3, 3),
    ),
}


@pytest.mark.slow_on("jax", "tensorflow")
@pytest.mark.parametrize("rule", RULES)
def test_the_variance_of_the_average_equals_the_formula(rule, record_property):
    make, expected = RULES[rule]
    found = measured(make)
    record_property("relative", float(found / expected - 1))
    assert found == pytest.approx(expected, rel=TOLERANCE)


def test_the_variance_without_a_wrapper_is_that_of_the_process():
    assert measured(lambda o: LAWA(o, 1, 0, 1)) == pytest.approx(V, rel=TOLERANCE)
    assert pytest.approx(of_mean(1, 1)) == V
    assert math.isclose(of_moving_average(0.0, 1), V)
