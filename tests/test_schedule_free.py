"""ScheduleFree and PrimalAverage train between an average and an iterate."""

import json
import pathlib

import keras
import numpy as np
import pytest
import small_training as small
from keras import ops, optimizers

import keras_avg
from keras_avg import SWA, Lookahead, ModelAverage, MovingAverage, PrimalAverage, ScheduleFree

GOLDEN = json.loads((pathlib.Path(__file__).parent / "golden" / "schedule_free.json").read_text())
RECORD_TOLERANCE = 5e-6  # of a dozen float32 steps that round in another order
TOLERANCE = 1e-6  # rounding of a few float32 operations on numbers of order 1


def recorded():
    shapes = GOLDEN["shapes"]

    def arrays(flat):
        return [np.reshape(a, s).astype("float32") for a, s in zip(flat, shapes, strict=True)]

    variables = [keras.Variable(value) for value in arrays(GOLDEN["initial"])]
    return variables, [arrays(step) for step in GOLDEN["gradients"]]


@pytest.mark.parametrize("case", GOLDEN["cases"])
def test_schedule_free_training_equals_that_of_the_original(case):
    given = GOLDEN["cases"][case]["arguments"]
    variables, gradients = recorded()
    inner = optimizers.SGD(given["lrs"][0], momentum=given.get("momentum", 0.0))
    optimizer = ScheduleFree(
        inner,
        interpolation=given.get("interp", 0.9),
        weight_power=given.get("r", 0.0),
        rate_power=given.get("p", 2.0),
        weight_decay_at_y=given.get("wd", 0.0),
    )
    for t, (rate, grads) in enumerate(zip(given["lrs"], gradients, strict=True)):
        optimizer.learning_rate = rate
        optimizer.apply([ops.convert_to_tensor(g) for g in grads], variables)
        for v, variable in enumerate(variables):
            for found, name in ((variable, "y"), (optimizer.get_slot(variable, "average"), "x")):
                expected = np.reshape(GOLDEN["cases"][case][name][v][t], variable.shape)
                deviation = np.abs(small.numpy(found) - expected) / (1 + np.abs(expected))
                assert np.max(deviation) <= RECORD_TOLERANCE, (name, t)


def by_hand(inner, gradients, interpolation, shares, start):
    """y and x after each step, in float64. The bare optimizer steps z."""
    z = keras.Variable(start)
    x = np.asarray(start, "float64")
    for gradient, c in zip(gradients, shares, strict=True):
        inner.apply([ops.convert_to_tensor(gradient)], [z])
        new = small.numpy(z).astype("float64")
        x = x + c * (new - x)
        yield interpolation * x + (1 - interpolation) * new, x


@pytest.mark.parametrize(
    "inner",
    [
        lambda: optimizers.Adam(0.1),
        lambda: optimizers.RMSprop(0.1),
        lambda: optimizers.Lion(0.01),
        lambda: optimizers.Adafactor(0.1),
        lambda: optimizers.SGD(0.1, momentum=0.9, nesterov=True),
    ],
    ids=["Adam", "RMSprop", "Lion", "Adafactor", "nesterov"],
)
@pytest.mark.parametrize(
    ("wrap", "interpolation", "shares"),
    [
        (ScheduleFree, 0.9, [1.0 / t for t in range(1, 9)]),
        (lambda inner: PrimalAverage(inner, average_decay=0.75), 0.7, [0.25] * 8),
    ],
    ids=["ScheduleFree", "PrimalAverage"],
)
def test_the_bare_optimizer_takes_the_same_steps_of_z(wrap, interpolation, shares, inner):
    random = np.random.default_rng(2)
    start = random.normal(size=(3, 2)).astype("float32")
    gradients = random.normal(size=(8, 3, 2)).astype("float32")
    optimizer, variable = wrap(inner()), keras.Variable(start)
    for gradient, (y, x) in zip(
        gradients, by_hand(inner(), gradients, interpolation, shares, start), strict=True
    ):
        small.apply(optimizer, [variable], [gradient])
        np.testing.assert_allclose(variable, y, rtol=TOLERANCE, atol=TOLERANCE)
        average = optimizer.get_slot(variable, "average")
        np.testing.assert_allclose(average, x, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.slow_on("jax", "tensorflow")
def test_primal_averaging_with_interpolation_1_equals_heavy_ball():
    rate, m = 0.1, 0.9
    average = small.model(PrimalAverage(optimizers.SGD(rate), interpolation=1.0, average_decay=m))
    heavy = small.model(optimizers.SGD(rate * (1 - m), momentum=m))
    for model in (average, heavy):
        small.fit(model, epochs=2)
    for ours, theirs in zip(average.get_weights(), heavy.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.slow_on("jax", "tensorflow")
@pytest.mark.parametrize("inner", [lambda: optimizers.Adam(0.01), lambda: optimizers.SGD(0.1)])
def test_primal_averaging_without_decay_equals_the_inner_optimizer(inner):
    average, bare = small.model(PrimalAverage(inner(), average_decay=0.0)), small.model(inner())
    for model in (average, bare):
        small.fit(model, epochs=2)
    for ours, theirs in zip(average.get_weights(), bare.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.slow_on("jax", "tensorflow")
def test_a_learning_rate_of_zero_moves_nothing_and_gives_no_nan():
    model = small.model(ScheduleFree(optimizers.SGD(0.0)))
    before = [small.numpy(v) for v in model.trainable_variables]
    small.fit(model, epochs=1)
    small.assert_same_bits([small.numpy(v) for v in model.trainable_variables], before)
    with model.optimizer.average_weights():
        small.assert_same_bits([small.numpy(v) for v in model.trainable_variables], before)
    model.optimizer.learning_rate = 0.1
    small.fit(model, epochs=1)
    assert all(np.all(np.isfinite(w)) for w in model.optimizer.get_weights())
    assert np.any(small.numpy(model.trainable_variables[0]) != before[0])


def test_micro_steps_and_skipped_steps_change_no_bit():
    inner = optimizers.SGD(0.1, gradient_accumulation_steps=2)
    optimizer, variable = ScheduleFree(inner), keras.Variable([0.1, 0.2, 0.3])
    small.apply(optimizer, [variable], [[1.0, 2.0, 3.0]], times=2)
    y, x = small.numpy(variable), small.numpy(optimizer.get_slot(variable, "average"))
    small.apply(optimizer, [variable], [[1.0, 2.0, 3.0]])
    np.testing.assert_array_equal(variable, y)
    np.testing.assert_array_equal(optimizer.get_slot(variable, "average"), x)
    small.apply(optimizer, [variable], [[1.0, 2.0, 3.0]])
    assert np.all(small.numpy(variable) != y)
    assert int(optimizer.iterations) == optimizer.num_snapshots == 2


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("wrap", [ScheduleFree, PrimalAverage])
def test_training_goes_on_from_averages_that_were_assigned(wrap, swapped):
    optimizer, variable = wrap(optimizers.SGD(0.5)), keras.Variable([1.0, 2.0])
    small.apply(optimizer, [variable], [[0.1, 0.2]], times=5)
    average = small.numpy(optimizer.get_slot(variable, "average"))
    if swapped:
        optimizer.swap_weights()
        optimizer.keep_averages()
    else:
        optimizer.assign_average_vars([variable])
    small.apply(optimizer, [variable], [[0.0, 0.0]])
    np.testing.assert_array_equal(variable, average)


@pytest.mark.slow_on("jax", "tensorflow")
def test_a_file_resumes_bit_for_bit_also_after_a_swap(tmp_path):
    model = small.fit(small.model(ScheduleFree(optimizers.Adam(0.01))), epochs=1)
    with model.optimizer.average_weights():
        model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    keras_avg.swap_weights(loaded)
    for each in (model, loaded):
        small.fit(each, epochs=1)
    small.assert_same_bits(loaded.get_weights(), model.get_weights())
    small.assert_same_bits(loaded.optimizer.get_weights(), model.optimizer.get_weights())


@pytest.mark.slow_on("jax")
def test_wrappers_around_schedule_free_average_the_trained_variables():
    model = small.model(SWA(ScheduleFree(optimizers.SGD(0.1)), 0, 1))
    trajectories = small.trajectories(model, 6)
    for variable, values in zip(model.trainable_variables, trajectories, strict=True):
        expected = np.mean(np.asarray(values[1:], "float64"), axis=0)
        average = model.optimizer.get_slot(variable, "average")
        np.testing.assert_allclose(average, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("wrap", [ScheduleFree, PrimalAverage])
class TestNesting:
    def test_a_wrapper_inside_schedule_free_or_primal_average_is_refused(self, wrap):
        with pytest.raises(ValueError, match=r"innermost.*Nest the other way: SWA\("):
            wrap(SWA("sgd"))

    def test_a_wrapper_that_changes_the_variables_is_refused_around_schedule_free(self, wrap):
        for around in (
            Lookahead,
            lambda inner: ModelAverage(inner, outer_optimizer=optimizers.SGD(0.7)),
            lambda inner: MovingAverage(Lookahead(inner)),
        ):
            with pytest.raises(ValueError, match="made of what it keeps"):
                around(wrap("sgd"))

    @pytest.mark.slow_on("jax", "tensorflow")
    def test_model_average_around_schedule_free_is_accepted(self, wrap):
        model = small.fit(small.model(ModelAverage(wrap("sgd"), interval_steps=2)), epochs=1)
        alone = small.fit(small.model(wrap("sgd")), epochs=1)
        small.assert_same_bits(model.get_weights(), alone.get_weights())


@pytest.mark.parametrize(
    ("make", "received"),
    [
        (lambda: ScheduleFree("sgd", interpolation=1.5), "interpolation=1.5"),
        (lambda: ScheduleFree("sgd", weight_power=-1), "weight_power=-1"),
        (lambda: ScheduleFree("sgd", rate_power=-1), "rate_power=-1"),
        (lambda: ScheduleFree("sgd", weight_decay_at_y="x"), "weight_decay_at_y='x'"),
        (lambda: PrimalAverage("sgd", average_decay=2), "average_decay=2"),
        (lambda: PrimalAverage("sgd", interpolation=-0.1), "interpolation=-0.1"),
    ],
)
def test_bad_arguments_of_schedule_free_are_refused(make, received):
    with pytest.raises(ValueError, match=f"Received: {received}"):
        make()


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_z_decays_once_an_update_and_not_at_each_micro_step(decay):
    rows = np.random.default_rng(5).normal(size=(4, 1, 3)).astype("float32")
    reached = []
    for micro_steps in (1, 3):
        accumulating = micro_steps if micro_steps > 1 else None
        inner = keras.optimizers.SGD(0.1, gradient_accumulation_steps=accumulating)
        optimizer = ScheduleFree(inner, weight_decay_at_y=decay)
        variable = keras.Variable([1.0, -2.0, 0.5])
        for gradient in rows:
            small.apply(optimizer, [variable], gradient, times=micro_steps)
        reached.append([small.numpy(variable), small.numpy(optimizer.get_slot(variable, "z"))])
    np.testing.assert_allclose(reached[0], reached[1], rtol=1e-6)


def test_decay_of_primal_average_is_refused_and_names_average_decay():
    with pytest.raises(TypeError, match="average_decay"):
        PrimalAverage("sgd", decay=0.9)
