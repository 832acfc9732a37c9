"""Decays give the weight of the new value. It is exact at ten million steps too."""

import json
import math
import pathlib

import keras
import numpy as np
import oracles
import pytest
import small_training as small
from keras import ops, optimizers

from keras_avg import MovingAverage, decays

GOLDEN = pathlib.Path(__file__).parent / "golden" / "ema_pytorch.json"
TOLERANCE = 1e-6  # rounding of a few float32 operations on numbers of order 1
# The relative tolerance of a weight. float32 rounds t, the logarithm and the exponential.
WEIGHT_TOLERANCE = 1e-5 if keras.backend.backend() == "jax" else 1e-13
LATE = [1, 2, 3, 10, 1000, 10**5, 10**7, 2**30]


def weight(decay, t, period=1):
    return float(ops.convert_to_numpy(decay.value_weight(ops.convert_to_tensor(t), period)))


def fed(optimizer, values):
    """The averages after each of the given values of a variable. SGD(1) moves it to each value."""
    variable, averages = keras.Variable(values[0]), []
    for value in values[1:]:
        gradient = small.numpy(variable) - value
        optimizer.apply([ops.convert_to_tensor(gradient)], [variable])
        variable.assign(value)
        averages.append(small.numpy(optimizer.get_slot(variable, "average")))
    return averages


def test_averages_of_each_decay_are_computed_in_the_head():
    assert decays.HalfLife(1).value_weight(1, 1) == pytest.approx(0.5)
    assert decays.HalfLife(10).value_weight(1, 20) == pytest.approx(0.75)
    mean = decays.PowerFunction(gamma=0)
    assert [weight(mean, t) for t in (1, 2, 4)] == pytest.approx([1.0, 0.5, 0.25])
    assert mean.sigma_rel == pytest.approx(12**-0.5)
    warmup = decays.PowerWarmup(0.9, inv_gamma=1, power=1)
    assert [weight(warmup, t) for t in (1, 2, 4, 100)] == pytest.approx([1.0, 0.5, 0.25, 0.1])


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_the_exponents_are_those_of_the_paper(sigma_rel, gamma):
    decay = decays.PowerFunction(sigma_rel)
    assert decay.gamma == pytest.approx(gamma, abs=0.005)
    assert decay.sigma_rel == pytest.approx(sigma_rel, rel=1e-12)
    assert decays.PowerFunction(gamma=decay.gamma).sigma_rel == pytest.approx(sigma_rel, rel=1e-12)


@pytest.mark.parametrize("period", [1, 7])
@pytest.mark.parametrize("t", LATE)
def test_weights_equal_those_of_float64_at_any_time(t, period):
    power = decays.PowerFunction(0.05)
    expected = 1.0
    if t > period:
        expected = -math.expm1((power.gamma + 1) * math.log1p(-period / t))
    assert weight(power, t, period) == pytest.approx(expected, rel=WEIGHT_TOLERANCE)

    warmup = decays.PowerWarmup(0.999999)
    left = min(max(1 - float(t) ** (-2 / 3), 0.0), 0.999999) if t > 1 else 0.0
    assert weight(warmup, t, period) == pytest.approx(
        1 - left**period, rel=max(WEIGHT_TOLERANCE, 1e-9)
    )

    constant = decays.HalfLife(1e7)
    assert constant.value_weight(t, period) == pytest.approx(period * math.log(2) / 1e7, rel=1e-5)


@pytest.mark.parametrize("f", [0.05, 0.5])
def test_a_half_life_fraction_is_the_half_life_divided_by_the_time(f):
    """After further f t steps, the average of time t has half of its weight."""
    decay, t = decays.PowerFunction(half_life_fraction=f), 10**6
    left = math.exp((decay.gamma + 1) * math.log(1 - f))
    assert left == pytest.approx(0.5, abs=f / 2)  # This is exact only for small f.
    assert weight(decay, t) * t == pytest.approx(math.log(2) / f, rel=1e-4)


@pytest.mark.parametrize("period", [1, 3])
def test_the_profile_is_a_power_of_the_step(period):
    values = np.random.default_rng(5).normal(size=(13, 4)).astype("float32")
    decay = decays.PowerFunction(0.2)
    optimizer = MovingAverage(optimizers.SGD(1.0), average_decay=decay, average_period=period)
    average = fed(optimizer, values)[-1]
    seen = np.arange(period, 13, period)
    edges = np.append(0.0, seen / seen[-1]) ** (decay.gamma + 1)
    expected = np.tensordot(np.diff(edges), values[seen].astype("float64"), axes=1)
    np.testing.assert_allclose(average, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.slow_on("jax", "tensorflow")
def test_nested_averages_each_have_their_own_length():
    short, long = decays.PowerFunction(0.05), decays.PowerFunction(0.10)
    inner = MovingAverage(optimizers.SGD(0.1), average_decay=short)
    model = small.model(MovingAverage(inner, average_decay=long))
    trajectories = small.trajectories(model, 9)
    for optimizer, decay in ((model.optimizer, long), (inner, short)):
        for variable, values in zip(model.trainable_variables, trajectories, strict=True):
            edges = (np.arange(10) / 9) ** (decay.gamma + 1)
            expected = np.tensordot(np.diff(edges), np.asarray(values[1:], "float64"), axes=1)
            average = optimizer.get_slot(variable, "average")
            np.testing.assert_allclose(average, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.slow_on("jax", "tensorflow")
@pytest.mark.parametrize("case", ["warm-up", "warm-up 3/4, least 0.2"])
def test_the_warm_up_equals_that_of_ema_pytorch(case):
    record = json.loads(GOLDEN.read_text())
    given, recorded = record["cases"][case]["arguments"], record["cases"][case]["average"]
    for v, shape in enumerate(record["shapes"]):
        decay = decays.PowerWarmup(
            given["beta"], given["inv_gamma"], given["power"], given["min_value"]
        )
        values = [np.reshape(value[v], shape).astype("float32") for value in record["values"]]
        averages = fed(MovingAverage(optimizers.SGD(1.0), average_decay=decay), values)
        for average, expected in zip(averages, recorded[v], strict=True):
            expected = np.reshape(expected, shape)
            np.testing.assert_allclose(average, expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_a_half_life_equals_the_constant_decay_of_that_length():
    values = np.random.default_rng(6).normal(size=(9, 3)).astype("float32")
    optimizer = MovingAverage(
        optimizers.SGD(1.0), average_decay=decays.HalfLife(4), average_period=2
    )
    averages = fed(optimizer, values)
    expected = oracles.moving_average(values[::2], [0.5 ** (2 / 4)] * 4)
    np.testing.assert_allclose(averages[-1], expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize(
    "decay", [decays.PowerFunction(0.1), decays.PowerWarmup(0.9), decays.HalfLife(3)]
)
def test_the_average_follows_until_the_start_step_and_time_counts_from_there(decay):
    values = np.random.default_rng(7).normal(size=(9, 3)).astype("float32")
    late = MovingAverage(optimizers.SGD(1.0), average_decay=decay, start_step=3)
    averages = fed(late, values)
    np.testing.assert_allclose(averages[:3], values[1:4], rtol=TOLERANCE, atol=TOLERANCE)
    again = MovingAverage(optimizers.SGD(1.0), average_decay=decay)
    for average, expected in zip(averages[3:], fed(again, values[3:]), strict=True):
        np.testing.assert_allclose(average, expected, rtol=TOLERANCE, atol=TOLERANCE)


@keras.saving.register_keras_serializable(package="keras_avg_tests")
class OneOverT(decays.Decay):
    def value_weight(self, t, period):
        return 1.0 / ops.cast(t, "float32")


@pytest.mark.sample(2, jax=1, tensorflow=1)
@pytest.mark.parametrize(
    "decay",
    [
        decays.HalfLife(50),
        decays.PowerFunction(0.05),
        decays.PowerFunction(gamma=3),
        decays.PowerFunction(half_life_fraction=0.1),
        decays.PowerWarmup(0.99, 2.0, 0.75, 0.1),
        OneOverT(),
    ],
)
def test_a_decay_is_part_of_config_and_file(decay, tmp_path):
    model = small.fit(small.model(MovingAverage("sgd", average_decay=decay)), epochs=1)
    config = model.optimizer.get_config()
    again = MovingAverage.from_config(config)
    assert type(again.average_decay) is type(decay)
    assert again.get_config() == config
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for each in (model, loaded):
        small.fit(each, epochs=1)
    small.assert_same_bits(loaded.optimizer.get_weights(), model.optimizer.get_weights())


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: decays.PowerFunction(), "exactly one.*Received: none of them"),
        (lambda: decays.PowerFunction(0.1, gamma=1), "exactly one.*'gamma': 1"),
        (lambda: decays.PowerFunction(0.3), r"sigma_rel.*\(0, 12.*Received: sigma_rel=0.3"),
        (lambda: decays.PowerFunction(0), "Received: sigma_rel=0"),
        (lambda: decays.PowerFunction(gamma=-1), "Received: gamma=-1"),
        (lambda: decays.PowerFunction(half_life_fraction=0.7), "ln 2.*half_life_fraction=0.7"),
        (lambda: decays.HalfLife(0), "Received: steps=0"),
        (lambda: decays.HalfLife("x"), "Received: steps='x'"),
        (lambda: decays.PowerWarmup(1.5), "Received: decay=1.5"),
        (lambda: decays.PowerWarmup(0.9, inv_gamma=0), "Received: inv_gamma=0"),
        (lambda: decays.PowerWarmup(0.9, power=-1), "Received: power=-1"),
        (lambda: decays.PowerWarmup(0.5, min_decay=0.6), "Received: min_decay=0.6, decay=0.5"),
        (
            lambda: MovingAverage("sgd", average_decay=decays.HalfLife(2), dynamic_decay=True),
            "Received: dynamic_decay=True",
        ),
        (
            lambda: MovingAverage("sgd", average_decay=decays.HalfLife(2), num_updates=3),
            "Received: num_updates=3",
        ),
    ],
)
def test_bad_arguments_of_decays_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_the_base_class_of_decays_cannot_be_constructed():
    with pytest.raises(TypeError, match="value_weight"):
        decays.Decay()
