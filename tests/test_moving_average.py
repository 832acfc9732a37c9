"""MovingAverage: decays, warm-up, periods, low precision."""

import keras
import numpy as np
import oracles
import pytest
import small_training as small
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import optimizers

from keras_avg import MovingAverage

# Rounding of float32 sums of a few dozen numbers of order 1.
TOLERANCE = 1e-6


def walk(optimizer, steps, gradient=0.1, dtype="float32"):
    """A variable with a constant gradient, and its values before and after each step."""
    variable = keras.Variable([1.0], dtype=dtype)
    values = [small.numpy(variable)]
    for _ in range(steps):
        small.apply(optimizer, [variable], [[gradient]])
        values.append(small.numpy(variable))
    return variable, values


@pytest.mark.parametrize(
    ("rate", "steps", "arguments", "raw", "average"),
    [
        (2.0, 1, {}, 0.8, 0.9),
        (2.0, 2, {}, 0.6, 0.75),
        (2.0, 2, {"dynamic_decay": True}, 0.6, 0.64),
        (1.0, 2, {"start_step": 1}, 0.8, 0.85),
    ],
)
def test_the_examples_of_addons_give_the_same_averages(rate, steps, arguments, raw, average):
    optimizer = MovingAverage(optimizers.SGD(rate), average_decay=0.5, **arguments)

    variable, _ = walk(optimizer, steps)

    np.testing.assert_allclose(variable, [raw], rtol=TOLERANCE)
    np.testing.assert_allclose(optimizer.get_slot(variable, "average"), [average], rtol=TOLERANCE)


@pytest.mark.slow_on("jax", "tensorflow")
@settings(max_examples=40, deadline=None)
@given(
    decay=st.floats(0.0, 1.0),
    start_step=st.integers(0, 5),
    dynamic=st.booleans(),
    period=st.integers(1, 4),
    updates=st.integers(1, 12),
)
def test_average_is_the_weighted_sum_of_all_values(decay, start_step, dynamic, period, updates):
    optimizer = MovingAverage(
        optimizers.SGD(0.5, momentum=0.5),
        average_decay=decay,
        start_step=start_step,
        dynamic_decay=dynamic,
        average_period=period,
    )

    def decay_at(i):
        if i < start_step:
            return 0.0
        s = i - start_step
        return (min(decay, (1 + s) / (10 + s)) if dynamic else decay) ** period

    variable, values = walk(optimizer, updates)

    due = [i for i in range(updates) if (i + 1) % period == 0]
    assert optimizer.num_snapshots == len(due)
    seen = [values[0], *(values[i + 1] for i in due)]
    expected = oracles.moving_average(seen, [decay_at(i) for i in due])
    np.testing.assert_allclose(
        optimizer.get_slot(variable, "average"), expected, rtol=TOLERANCE, atol=TOLERANCE
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_averages_of_low_precision_weights_are_float32_and_move(dtype):
    """Keras' own average in bfloat16 with decay 0.999 never moves, because 0.999 rounds to 1."""
    optimizer = MovingAverage(optimizers.SGD(1.0), average_decay=0.999)

    variable, values = walk(optimizer, steps=50, gradient=-1.0, dtype=dtype)

    average = optimizer.get_slot(variable, "average")
    assert average.dtype == "float32"
    expected = oracles.moving_average([v.astype("float64") for v in values], [0.999] * 50)
    np.testing.assert_allclose(average, expected, rtol=TOLERANCE)


def test_one_minus_a_decay_near_one_keeps_its_digits():
    optimizer = MovingAverage(optimizers.SGD(1.0), average_decay=0.99999)
    variable = keras.Variable([0.0], dtype="float32")

    small.apply(optimizer, [variable], [[-1.0]])

    # 1 - float32(0.99999) has an error of 1.4e-3.
    np.testing.assert_allclose(optimizer.get_slot(variable, "average"), [1e-5], rtol=TOLERANCE)


def test_a_period_keeps_the_half_life():
    every = MovingAverage(optimizers.SGD(1.0), average_decay=0.9)
    each_fifth = MovingAverage(optimizers.SGD(1.0), average_decay=0.9, average_period=5)
    variable = keras.Variable([0.0], dtype="float32")
    for optimizer in (every, each_fifth):
        variable.assign([0.0])
        small.apply(optimizer, [variable], [[-1.0]])  # The variable moves to 1, and stays there.
        small.apply(optimizer, [variable], [[0.0]], times=4)

    every, each_fifth = (o.get_slot(variable, "average") for o in (every, each_fifth))

    np.testing.assert_allclose(each_fifth, [1 - 0.9**5], rtol=TOLERANCE)
    np.testing.assert_allclose(each_fifth, every, rtol=TOLERANCE)


def test_a_decay_of_zero_keeps_a_copy_of_the_variable():
    optimizer = MovingAverage(optimizers.SGD(0.3), average_decay=0.0)
    variable, _ = walk(optimizer, steps=2)
    average = optimizer.get_slot(variable, "average")
    np.testing.assert_array_equal(average, variable)

    variable.assign([7.0])

    assert small.numpy(average)[0] != 7.0


def test_a_decay_of_one_keeps_the_start():
    optimizer = MovingAverage(optimizers.SGD(0.3), average_decay=1.0)

    variable, _ = walk(optimizer, steps=4)

    np.testing.assert_array_equal(optimizer.get_slot(variable, "average"), [1.0])


def test_a_schedule_gives_the_decay_of_each_step():
    ramp = optimizers.schedules.PolynomialDecay(0.5, decay_steps=4, end_learning_rate=0.9)
    optimizer = MovingAverage(optimizers.SGD(1.0), average_decay=ramp)

    variable, values = walk(optimizer, steps=6)

    decays = [0.5, 0.6, 0.7, 0.8, 0.9, 0.9]
    expected = oracles.moving_average(values, decays)
    np.testing.assert_allclose(optimizer.get_slot(variable, "average"), expected, rtol=TOLERANCE)
    again = MovingAverage.from_config(optimizer.get_config())
    assert again.average_decay.get_config() == ramp.get_config()


def test_the_average_starts_at_weights_that_were_loaded_after_build():
    optimizer = MovingAverage(optimizers.SGD(1.0), average_decay=0.5)
    model = small.model(optimizer)
    optimizer.build(model.trainable_variables)
    pretrained = [np.full(v.shape, 3.0, "float32") for v in model.trainable_variables]
    for variable, value in zip(model.trainable_variables, pretrained, strict=True):
        variable.assign(value)

    trajectories = small.trajectories(model, steps=3)

    for variable, values in zip(model.trainable_variables, trajectories, strict=True):
        np.testing.assert_allclose(
            optimizer.get_slot(variable, "average"),
            oracles.moving_average(values, [0.5] * 3),
            rtol=TOLERANCE,
            atol=TOLERANCE,
        )


def test_num_updates_caps_the_decay_once():
    assert MovingAverage("sgd", num_updates=7).average_decay == 8 / 17
    assert MovingAverage("sgd", average_decay=0.2, num_updates=100).average_decay == 0.2
    assert MovingAverage("sgd", num_updates=0).average_decay == 0.1


@pytest.mark.parametrize("wrong", [1.0, "a", True])
def test_num_updates_that_is_not_an_integer_is_refused(wrong):
    with pytest.raises(TypeError, match=r"`num_updates` must be an integer.*Received"):
        MovingAverage("sgd", num_updates=wrong)


def test_num_updates_together_with_a_schedule_is_refused():
    ramp = optimizers.schedules.PolynomialDecay(0.5, 4)
    with pytest.raises(ValueError, match="Leave one of them out"):
        MovingAverage("sgd", average_decay=ramp, num_updates=3)


def test_a_schedule_that_begins_out_of_range_is_refused():
    for start in (1.5, -0.5):
        ramp = optimizers.schedules.PolynomialDecay(start, 4, 0.9)
        with pytest.raises(ValueError, match=rf"\[0, 1\].*Received: .* is {start} at step 0"):
            MovingAverage("sgd", average_decay=ramp)
    MovingAverage("sgd", average_decay=optimizers.schedules.PolynomialDecay(0.0, 4, 1.0))


def test_the_error_recognizes_a_decay_that_was_passed_as_sequential_update():
    with pytest.raises(TypeError, match=r"Did you mean average_decay=0\.999"):
        MovingAverage("sgd", 0.999)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"average_decay": 1.5}, "average_decay=1.5"),
        ({"average_decay": -0.1}, "average_decay=-0.1"),
        ({"average_decay": float("nan")}, "average_decay=nan"),
        ({"average_decay": "0.9"}, "average_decay='0.9'"),
        ({"start_step": -1}, "start_step=-1"),
        ({"average_period": 0}, "average_period=0"),
        ({"num_updates": -5}, "num_updates=-5"),
    ],
)
def test_arguments_of_moving_average_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=f"Received: {message}"):
        MovingAverage("sgd", **arguments)


def test_positional_arguments_of_moving_average_are_those_of_addons():
    config = MovingAverage("sgd", False, 0.9, 5, "Polyak").get_config()

    assert config["sequential_update"] is False
    assert config["average_decay"] == 6 / 15
    assert (config["num_updates"], config["name"]) == (5, "Polyak")
