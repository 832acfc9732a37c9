"""Rules of users work in training, in files, in swaps, when nested, and in bfloat16."""

import inspect

import keras
import numpy as np
import pytest
import small_training as small
from keras import optimizers
from rules import Corrected, LastThree, PlainSWA, WithSquares

import keras_avg
from keras_avg import SWA, MovingAverage

TOLERANCE = 1e-6  # rounding of a few float32 operations on numbers of order 1
LONGEST = 40  # lines


def last_three(values):
    return np.mean(np.asarray(values[2::2], "float64")[-3:], axis=0)


def mean(values):
    return np.mean(np.asarray(values[1:], "float64"), axis=0)


def corrected(values):
    weights = 0.25 * 0.75 ** np.arange(len(values) - 1)[::-1]
    average = np.tensordot(weights, np.asarray(values[1:], "float64"), axes=1)
    average += 0.75 ** (len(values) - 1) * np.asarray(values[0], "float64")
    return average + 0.5 * (np.asarray(values[-1], "float64") - values[0])


RULES = {
    "a ring": (LastThree, last_three),
    "squares beside": (WithSquares, mean),
    "a corrected average": (Corrected, corrected),
    "SWA": (lambda inner, **kw: PlainSWA(inner, 0, 1, **kw), mean),
}
WAYS = {
    "plain": lambda rule: rule(optimizers.Adam(0.01)),
    "skip_nonfinite": lambda rule: rule(optimizers.Adam(0.01), skip_nonfinite=True),
    "inside": lambda rule: SWA(rule(optimizers.Adam(0.01)), start_averaging=1000),
    "outside": lambda rule: rule(MovingAverage(optimizers.Adam(0.01))),
}


def wrapper_of(model, rule):
    kind = type(rule(optimizers.SGD()))
    (found,) = [w for w in keras_avg.averaging_optimizers(model) if type(w) is kind]
    return found


@pytest.mark.parametrize("rule", [LastThree, WithSquares, Corrected, PlainSWA])
def test_a_rule_is_short(rule):
    assert len(inspect.getsource(rule).splitlines()) <= LONGEST


@pytest.mark.sample(8, jax=2, tensorflow=2)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", RULES)
def test_the_shown_values_of_a_rule_equal_the_oracle(name, way):
    rule, oracle = RULES[name]
    model = small.model(WAYS[way](rule))
    trajectories = small.trajectories(model, 9)
    wrapper = wrapper_of(model, rule)
    with wrapper.average_weights():
        for variable, values in zip(model.trainable_variables, trajectories, strict=True):
            np.testing.assert_allclose(
                small.numpy(variable), oracle(values), rtol=TOLERANCE, atol=TOLERANCE
            )


@pytest.mark.sample(6, jax=1, tensorflow=1)
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("way", ["plain", "inside"])
@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_saved_resumed_and_swapped_bit_for_bit(name, way, swapped, tmp_path):
    rule, _ = RULES[name]
    model = small.fit(small.model(WAYS[way](rule)), epochs=1)
    raw = model.get_weights()
    wrapper = wrapper_of(model, rule)
    if swapped:
        wrapper.swap_weights()
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    small.assert_same_bits(loaded.get_weights(), model.get_weights())
    small.assert_same_bits(loaded.optimizer.get_weights(), model.optimizer.get_weights())
    for each in (model, loaded):
        if swapped:
            wrapper_of(each, rule).swap_weights()
        small.assert_same_bits(each.get_weights(), raw)
        small.fit(each, epochs=1)
    small.assert_same_bits(loaded.optimizer.get_weights(), model.optimizer.get_weights())
    small.assert_same_bits(loaded.get_weights(), model.get_weights())
    raw = model.get_weights()
    for each in (model, loaded):
        wrapper_of(each, rule).swap_weights()
        assert np.any(each.get_weights()[0] != raw[0])
    small.assert_same_bits(loaded.get_weights(), model.get_weights())


@pytest.mark.slow_on("jax", "tensorflow")
@pytest.mark.parametrize("name", RULES)
def test_stores_beside_bfloat16_variables_are_float32(name, dtype_policy):
    dtype_policy("bfloat16")
    rule, oracle = RULES[name]
    model = small.model(rule(optimizers.SGD(0.01)))
    trajectories = small.trajectories(model, 6)
    raw, wrapper = model.get_weights(), model.optimizer
    kept = [v for store in wrapper.kept.values() for v in store.kept]
    assert {keras.backend.standardize_dtype(v.dtype) for v in kept} == {"float32"}
    for average, values in zip(wrapper.averages(), trajectories, strict=True):
        expected = oracle([np.asarray(value, "float64") for value in values])
        np.testing.assert_allclose(
            keras.ops.convert_to_numpy(average), expected, rtol=TOLERANCE, atol=TOLERANCE
        )
    wrapper.swap_weights()
    wrapper.swap_weights()
    small.assert_same_bits(model.get_weights(), raw)


@pytest.mark.parametrize("name", RULES)
def test_a_rule_does_not_change_training_and_skips_a_nonfinite_step(name):
    rule, _ = RULES[name]
    variable, bare = keras.Variable([1.0, 2.0]), keras.Variable([1.0, 2.0])
    optimizer, inner = rule(optimizers.SGD(0.5), skip_nonfinite=True), optimizers.SGD(0.5)
    for gradient in ([0.1, 0.2], [0.3, -0.1], [np.nan, 0.0]):
        before = [small.numpy(v) for store in optimizer.kept.values() for v in store.kept]
        snapshots = optimizer.num_snapshots
        small.apply(optimizer, [variable], [gradient])
        small.apply(inner, [bare], [gradient])
        np.testing.assert_array_equal(variable, bare)
    after = [small.numpy(v) for store in optimizer.kept.values() for v in store.kept]
    small.assert_same_bits(after, before)
    assert optimizer.num_snapshots == snapshots


@pytest.mark.slow_on("jax")
@pytest.mark.parametrize("name", RULES)
def test_steps_by_hand_leave_buffers_that_a_compiled_step_can_donate(name):
    rule, _ = RULES[name]
    model = small.model(rule("sgd"))
    ones = [np.ones(v.shape) for v in model.trainable_variables]
    small.apply(model.optimizer, model.trainable_variables, ones, times=4)
    small.fit(model, epochs=1)
    assert int(model.optimizer.iterations) == 4 + small.BATCHES


def test_a_slot_is_found_by_its_store():
    optimizer, variable = WithSquares(optimizers.SGD(1.0)), keras.Variable([1.0, 3.0])
    small.apply(optimizer, [variable], [[0.0, 1.0]], times=2)
    assert optimizer.get_slot_names()[:2] == ["average", "square"]
    np.testing.assert_allclose(optimizer.get_slot(variable, "average"), [1.0, 1.5])
    np.testing.assert_allclose(optimizer.get_slot(variable, "square"), [1.0, (4 + 1) / 2])


@pytest.mark.slow_on("jax", "tensorflow")
@pytest.mark.parametrize("name", RULES)
def test_averages_of_a_rule_are_computed_from_a_functional_state(name):
    rule, _ = RULES[name]
    model = small.fit(small.model(rule("sgd")), epochs=1)
    state = [v.value for v in model.optimizer.variables]
    raw = [v.value for v in model.trainable_variables]
    averages = model.optimizer.stateless_average(state, raw)
    with model.optimizer.average_weights():
        for average, variable in zip(averages, model.trainable_variables, strict=True):
            np.testing.assert_array_equal(
                keras.ops.convert_to_numpy(average), small.numpy(variable)
            )


def test_a_rule_needs_no_additional_traces():
    traces = []

    class Counts(LastThree):
        def accumulate(self, due, step):
            traces.append(1)
            super().accumulate(due, step)

    model = small.fit(small.model(Counts("sgd")), epochs=1)
    before = len(traces)
    small.fit(model, epochs=2)
    # Torch compiles nothing, and calls it where something is due: at every second step.
    expected = small.BATCHES if keras.backend.backend() == "torch" else 0
    assert len(traces) - before == expected


@pytest.mark.parametrize("name", ["", "a/b", "slot_x", "raw_y"])
def test_a_store_needs_a_name_of_its_own(name):
    class Misnamed(LastThree):
        def stores(self):
            return {name: "zeros"}

    with pytest.raises(ValueError, match="A store needs a name of its own"):
        Misnamed("sgd").build([keras.Variable([1.0])])
