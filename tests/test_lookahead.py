"""Lookahead: the rule, the flow back into the model, and the Lookahead of other libraries."""

import keras
import numpy as np
import pytest
import small_training as small
from keras import optimizers

from keras_avg import SWA, Lookahead, MovingAverage

TOLERANCE = 1e-6  # float32, relative to 1 + |value|, over a dozen steps


def descend(optimizer, values, grads):
    """The variables and the slow weights after each step."""
    variables = [keras.Variable(value, dtype="float32") for value in values]
    seen = []
    for grad in grads:
        small.apply(optimizer, variables, grad)
        slow = small.slots(optimizer, variables)
        seen.append(([small.numpy(v) for v in variables], slow))
    return seen


def test_two_fast_steps_are_followed_by_one_slow_step():
    optimizer = Lookahead(optimizers.SGD(1.0), sync_period=2, slow_step_size=0.5)
    seen = descend(optimizer, [[1.0]], [[[0.25]]] * 4)
    fast = [values[0][0] for values, _ in seen]
    slow = [slow[0][0] for _, slow in seen]
    assert fast == [0.75, 0.75, 0.5, 0.5]  # At 0.5 it is moved back half of the way to 1.
    assert slow == [1.0, 0.75, 0.75, 0.5]
    assert optimizer.num_snapshots == 2


@pytest.mark.parametrize("period", [1, 3, 20])
@pytest.mark.parametrize("step_size", [0.0, 0.3, 1.0])
def test_fast_and_slow_weights_are_those_of_algorithm_1(period, step_size):
    random = np.random.default_rng(period)
    start, grads = random.normal(size=(2, 3)), random.normal(size=(12, 2, 3))
    optimizer = Lookahead(optimizers.SGD(0.1), period, step_size)

    seen = descend(optimizer, list(start), [list(g) for g in grads])

    slow, step = start, 0
    for _ in range(len(grads) // period):  # the outer loop of the paper, and then its inner loop
        fast = slow
        for _ in range(period):
            fast = fast - 0.1 * grads[step]
            step += 1
        slow = slow + step_size * (fast - slow)
        values, averages = seen[step - 1]
        np.testing.assert_allclose(averages, slow, rtol=TOLERANCE, atol=TOLERANCE)
        np.testing.assert_array_equal(values, averages)


@pytest.mark.slow_on("jax", "tensorflow")
def test_fit_gives_the_same_weights_as_steps_by_hand():
    def optimizer():
        return Lookahead(optimizers.SGD(0.05, momentum=0.9), sync_period=4)

    model, by_hand = small.model(optimizer()), small.model(optimizers.SGD(0.05, momentum=0.9))
    small.fit(model, epochs=2)

    trainable = by_hand.trainable_variables
    slow = [small.numpy(v) for v in trainable]
    for step in range(12):
        batch = slice(8 * (step % 6), 8 * (step % 6 + 1))
        by_hand.train_on_batch(small.X[batch], small.Y[batch])
        if (step + 1) % 4 == 0:
            slow = [s + 0.5 * (small.numpy(v) - s) for s, v in zip(slow, trainable, strict=True)]
            for variable, value in zip(trainable, slow, strict=True):
                variable.assign(value)
    for variable, expected in zip(model.get_weights(), by_hand.get_weights(), strict=True):
        np.testing.assert_allclose(variable, expected, rtol=10 * TOLERANCE, atol=10 * TOLERANCE)


def test_weights_that_are_loaded_after_build_are_the_first_slow_weights():
    variable = keras.Variable([1.0], dtype="float32")
    optimizer = Lookahead(optimizers.SGD(1.0), sync_period=2)
    optimizer.build([variable])
    variable.assign([9.0])
    small.apply(optimizer, [variable], [[1.0]], times=2)
    np.testing.assert_array_equal(variable, [8.0])  # This is half of the way from 9 to 7.


def test_slow_weights_of_bfloat16_variables_are_float32():
    variable = keras.Variable([1.0], dtype="bfloat16")
    optimizer = Lookahead(optimizers.SGD(2.0**-7), sync_period=1, slow_step_size=0.25)
    small.apply(optimizer, [variable], [[-1.0]], times=1)
    average = optimizer.get_slot(variable, "average")
    assert average.dtype == "float32"
    np.testing.assert_array_equal(average, [1 + 2.0**-9])  # bfloat16 cannot hold this number.
    assert float(small.numpy(variable)[0]) == 1.0


def test_averages_around_lookahead_see_the_weights_after_the_slow_step():
    inner = Lookahead(optimizers.SGD(1.0), sync_period=2)
    optimizer, variable = SWA(inner, 1, 2), keras.Variable([1.0], dtype="float32")
    small.apply(optimizer, [variable], [[0.25]], times=4)
    np.testing.assert_array_equal(optimizer.get_slot(variable, "average"), [(0.75 + 0.5) / 2])


def test_an_average_inside_sees_the_fast_weights():
    inner = MovingAverage(optimizers.SGD(1.0), average_decay=0.0)
    optimizer, variable = Lookahead(inner, sync_period=2), keras.Variable([1.0], dtype="float32")
    small.apply(optimizer, [variable], [[0.25]], times=2)
    np.testing.assert_array_equal(inner.get_slot(variable, "average"), [0.5])
    np.testing.assert_array_equal(variable, [0.75])


def test_nonfinite_weights_do_not_reach_the_slow_weights():
    variable = keras.Variable([1.0], dtype="float32")
    optimizer = Lookahead(optimizers.SGD(1.0), sync_period=1, skip_nonfinite=True)
    small.apply(optimizer, [variable], [[np.inf]])
    np.testing.assert_array_equal(optimizer.get_slot(variable, "average"), [1.0])
    assert optimizer.num_snapshots == 0


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="optax is installed where JAX is")
@pytest.mark.parametrize(("period", "step_size"), [(1, 0.5), (3, 0.2), (5, 0.8)])
def test_lookahead_equals_that_of_optax(period, step_size):
    import optax

    random = np.random.default_rng(0)
    start, grads = random.normal(size=4), random.normal(size=(12, 4)).astype("float32")
    theirs = optax.lookahead(optax.sgd(0.1, momentum=0.9), period, step_size)
    params = optax.LookaheadParams.init_synced(np.asarray(start, "float32"))
    state = theirs.init(params)

    optimizer = Lookahead(optimizers.SGD(0.1, momentum=0.9), period, step_size)
    seen = descend(optimizer, [start], [[g] for g in grads])

    for grad, (values, slow) in zip(grads, seen, strict=True):
        updates, state = theirs.update(grad, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(values[0], params.fast, rtol=TOLERANCE, atol=TOLERANCE)
        np.testing.assert_allclose(slow[0], params.slow, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sync_period": 0}, r"`sync_period` must be an integer >= 1.*Received: sync_period=0"),
        ({"sync_period": 2.5}, "Received: sync_period=2.5"),
        ({"slow_step_size": 1.5}, r"range \[0, 1\].*Received: slow_step_size=1.5"),
    ],
)
def test_arguments_of_lookahead_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Lookahead("sgd", **arguments)
