"""Learning rates equal numbers by hand, another formula, and recordings of Addons and torch.

A deviation is |difference| / the largest rate of the schedule. Deviations come from float32, whose
resolution is 6e-8 to 1.2e-7. Here a few operations round. In Addons, the subtraction in
`t / step_size - 2 cycle` loses a digit.
"""

import fractions
import inspect
import math

import keras
import numpy as np
import pytest
import recordings
import small_training as small
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops
from keras.optimizers.schedules import CosineDecay, ExponentialDecay, PiecewiseConstantDecay

import keras_avg
from keras_avg import schedules
from keras_avg.schedules import (
    CyclicalLearningRate,
    ExponentialCyclicalLearningRate,
    SWALearningRate,
    Triangular2CyclicalLearningRate,
    TriangularCyclicalLearningRate,
)

FORMULA_TOLERANCE = 3e-7
RECORDED_TOLERANCE = 1e-6

ANNEALED = {recording.id: recording for recording in recordings.annealed_rates()}
CYCLICAL = {recording.id: recording for recording in recordings.cyclical_rates()}


@keras.saving.register_keras_serializable(package="test_schedules")
def one_over_5_pow(x):
    return 1 / 5 ** (x * 1e-4)


@keras.saving.register_keras_serializable(package="test_schedules")
def one_over_x_plus_1(x):
    return 1 / (x + 1)


SCALE_FUNCTIONS = {
    "one_over_5_pow_1e-4x": one_over_5_pow,
    "one_over_x_plus_1": one_over_x_plus_1,
}


@pytest.fixture(scope="session")
def note_deviation(record_testsuite_property):
    """Notes the largest deviation of each family. pytest writes it with `--junitxml`."""
    largest = {}

    def note(family, deviation):
        largest[family] = max(deviation, largest.get(family, 0.0))

    yield note
    for family, deviation in largest.items():
        record_testsuite_property(f"largest deviation of {family}", f"{deviation:.1e}")


@pytest.fixture
def floatx():
    before = keras.config.floatx()
    yield keras.config.set_floatx
    keras.config.set_floatx(before)


def rates(schedule, steps):
    return np.array([ops.convert_to_numpy(schedule(integer(step))) for step in steps])


def integer(step):
    """A step number in the form in which Keras' optimizers pass it."""
    return ops.convert_to_tensor(step, "int32")


def deviation(actual, expected):
    assert len(actual) == len(expected)
    difference = np.abs(np.asarray(actual, "float64") - np.asarray(expected, "float64"))
    return np.max(difference) / np.max(np.abs(expected))


def annealed(strategy, first, last, start_step, anneal_steps, steps):
    """Annealing to the last rate in NumPy float64. `first` is the rate up to `start_step`."""
    if strategy == "linear":
        return np.interp(steps, [start_step, start_step + anneal_steps], [first, last])
    angles = np.interp(steps, [start_step, start_step + anneal_steps], [0.0, np.pi])
    return (first + last) / 2 + (first - last) / 2 * np.cos(angles)


def triangles(initial, maximal, step_size, steps, scale, scale_mode):
    """A zigzag line through given corners, in NumPy float64."""
    corners = step_size * np.arange(0, 4 + max(steps) // step_size)
    heights = np.interp(steps, corners, np.arange(len(corners)) % 2)
    cycles = np.searchsorted(corners[::2], steps, side="right")
    scales = scale(np.asarray(cycles if scale_mode == "cycle" else steps, "float64"))
    return initial + (maximal - initial) * heights * scales


def recorded(cases):
    return pytest.mark.parametrize("recording", cases.values(), ids=cases)


# By hand.


def test_linear_annealing_begins_after_the_start_step():
    schedule = SWALearningRate(1.0, 0.0, start_step=2, anneal_steps=4, anneal_strategy="linear")

    assert rates(schedule, range(8)).tolist() == [1, 1, 1, 0.75, 0.5, 0.25, 0, 0]


def test_cosine_annealing_has_half_of_the_way_in_the_middle():
    schedule = SWALearningRate(1.0, 3.0, start_step=0, anneal_steps=2)

    np.testing.assert_allclose(rates(schedule, range(4)), [1, 2, 3, 3], rtol=FORMULA_TOLERANCE)


def test_the_rate_jumps_at_the_start_step_without_annealing():
    schedule = SWALearningRate(1.0, 0.25, start_step=2, anneal_steps=0)

    assert rates(schedule, range(4)).tolist() == [1, 1, 0.25, 0.25]


def test_the_schedule_is_followed_up_to_the_start_step_and_then_frozen():
    stairs = PiecewiseConstantDecay([0, 1, 3], [8.0, 4.0, 2.0, 1.0])
    schedule = SWALearningRate(stairs, 0.0, 2, anneal_steps=4, anneal_strategy="linear")

    assert rates(schedule, range(7)).tolist() == [8, 4, 2, 1.5, 1, 0.5, 0]


def test_a_triangle_goes_up_and_down():
    schedule = TriangularCyclicalLearningRate(1.0, 3.0, step_size=2)

    assert rates(schedule, range(9)).tolist() == [1, 2, 3, 2, 1, 2, 3, 2, 1]


def test_half_a_cycle_need_not_be_a_whole_number_of_steps():
    schedule = TriangularCyclicalLearningRate(0, 5, step_size=2.5)

    assert rates(schedule, range(7)).tolist() == [0, 2, 4, 4, 2, 0, 2]


def test_triangular2_halves_each_cycle():
    schedule = Triangular2CyclicalLearningRate(1.0, 5.0, step_size=1)

    assert rates(schedule, range(7)).tolist() == [1, 5, 1, 3, 1, 2, 1]


def test_exponential_decays_with_each_step_or_cycle():
    by_step = ExponentialCyclicalLearningRate(0, 16, step_size=1, gamma=0.5)
    by_cycle = ExponentialCyclicalLearningRate(0, 16, 1, scale_mode="cycle", gamma=0.5)

    np.testing.assert_allclose(rates(by_step, range(4)), [0, 8, 0, 2], rtol=FORMULA_TOLERANCE)
    np.testing.assert_allclose(rates(by_cycle, range(4)), [0, 8, 0, 4], rtol=FORMULA_TOLERANCE)


def test_a_scale_function_gets_cycles_from_one_and_steps_from_zero():
    seen = []
    for mode in ("cycle", "iterations"):
        rates(CyclicalLearningRate(0, 1, 2, lambda x: seen.append(float(x)) or 1, mode), range(6))

    assert seen == [1, 1, 1, 1, 2, 2, 0, 1, 2, 3, 4, 5]


# By another formula.


@settings(max_examples=40, deadline=None)
@given(
    strategy=st.sampled_from(["cos", "linear"]),
    last=st.floats(0.0, 2.0),
    start_step=st.integers(0, 2000),
    anneal_steps=st.integers(1, 2000),
    steps=st.lists(st.integers(0, 5000), min_size=1, max_size=4),
)
def test_annealing_equals_the_formula_in_float64(strategy, last, start_step, anneal_steps, steps):
    schedule = SWALearningRate(1.0, last, start_step, anneal_steps, strategy)

    expected = annealed(strategy, 1.0, last, start_step, anneal_steps, [*steps, start_step])

    assert deviation(rates(schedule, [*steps, start_step]), expected) <= FORMULA_TOLERANCE


@settings(max_examples=40, deadline=None)
@given(
    initial=st.floats(0.0, 0.5),
    step_size=st.integers(2, 400).map(lambda quarters: quarters / 2) | st.floats(1.0, 50.0),
    scale_mode=st.sampled_from(["cycle", "iterations"]),
    gamma=st.floats(0.9, 1.0),
    steps=st.lists(st.integers(0, 5000), min_size=1, max_size=4),
)
def test_cycles_equal_a_zigzag_line(initial, step_size, scale_mode, gamma, steps):
    schedule = ExponentialCyclicalLearningRate(initial, 1.0, step_size, scale_mode, gamma)

    # Half of the period that the schedule uses. The next test says how exact this period is.
    half = float(schedule._period / 2)
    expected = triangles(initial, 1.0, half, steps, lambda x: gamma**x, scale_mode)

    difference = np.abs(rates(schedule, steps) - expected)
    assert np.max(difference) <= FORMULA_TOLERANCE


@given(
    samples=st.integers(1, 10**6),
    batch_size=st.integers(1, 512),
    any_size=st.floats(1.0, 2.0**29),
)
def test_the_period_is_exact_for_the_steps_of_whole_epochs(samples, batch_size, any_size):
    def period(step_size):
        found = TriangularCyclicalLearningRate(0, 1, step_size)._period
        assert found.numerator * found.denominator < 2**31
        return found

    step_size = fractions.Fraction(samples, batch_size)
    if step_size >= 1 and 2 * step_size * batch_size**2 < 2**29:
        assert period(samples / batch_size) == 2 * step_size
    assert abs(period(any_size) - 2 * any_size) <= math.sqrt(2 * any_size) / 2**15


# As recorded.


def test_no_recording_is_missing():
    assert len({name.rpartition("/")[0] for name in ANNEALED}) == 48
    assert (len(ANNEALED), len(CYCLICAL)) == (80, 67)


@recorded(ANNEALED)
def test_rates_equal_recordings_of_torch(recording, note_deviation):
    start = len(recording.decayed)
    before = ExponentialDecay(recording.learning_rate, decay_steps=1, decay_rate=0.9)
    schedule = SWALearningRate(
        before if start else recording.learning_rate,
        recording.swa_learning_rate,
        start,
        recording.anneal_steps,
        recording.anneal_strategy,
    )

    decayed, at_start, *after = np.split(
        rates(schedule, range(start + 1 + len(recording.annealed))), [start, start + 1]
    )

    largest = deviation(*after, recording.annealed)
    if recording.anneal_steps > 0:  # Otherwise torch jumps at construction, before these steps.
        expected = [recording.learning_rate, *recording.decayed]
        largest = max(largest, deviation([*decayed, *at_start], expected))
    note_deviation(f"SWALR, {recording.anneal_strategy}", largest)
    assert largest <= RECORDED_TOLERANCE


def _recorded_schedule(recording, **changes):
    arguments = recording.arguments | changes
    if "scale_fn" in arguments:
        arguments["scale_fn"] = SCALE_FUNCTIONS[arguments["scale_fn"]]
    return getattr(schedules, recording.schedule)(**arguments)


@pytest.mark.slow_on("tensorflow")
@recorded(CYCLICAL)
def test_rates_equal_recordings_of_addons(recording, note_deviation):
    schedule = _recorded_schedule(recording)

    of_tensors = rates(schedule, range(len(recording.rates)))
    of_numbers = [float(schedule(step)) for step in range(len(recording.rates))]

    np.testing.assert_array_equal(of_numbers, of_tensors)
    largest = max(
        deviation(of_tensors, recording.rates),
        deviation(of_numbers, recording.rates_of_python_steps),
    )
    note_deviation(recording.schedule, largest)
    assert largest <= RECORDED_TOLERANCE


# Edges.

ALL = [
    SWALearningRate(CosineDecay(0.1, decay_steps=10), 0.05, start_step=5, anneal_steps=3),
    SWALearningRate(0.1, 0.05, 5, 0, anneal_strategy="linear"),
    CyclicalLearningRate(0.001, 0.1, 2.5, one_over_x_plus_1, "iterations", name="mine"),
    TriangularCyclicalLearningRate(0, 1, 3, scale_mode="iterations", name="mine"),
    Triangular2CyclicalLearningRate(0.001, 0.1, 4, name=None),
    ExponentialCyclicalLearningRate(0.001, 0.1, 2, gamma=0.9),
]


def _name(schedule):
    return type(schedule).__name__


each = pytest.mark.parametrize("schedule", ALL, ids=_name)


@each
def test_any_kind_of_step_gives_the_same_float32_scalar(schedule):
    kinds = [
        7,
        7.0,
        np.int64(7),
        integer(7),
        ops.convert_to_tensor(7.0, "float32"),
        keras.Variable(7, dtype="int32", trainable=False),
    ]

    given_rates = [schedule(step) for step in kinds]

    assert all(ops.is_tensor(rate) and rate.shape == () for rate in given_rates)
    assert {keras.backend.standardize_dtype(rate.dtype) for rate in given_rates} == {"float32"}
    assert len({float(rate) for rate in given_rates}) == 1


# The first is left out, because Keras' CosineDecay computes in floatx.
@pytest.mark.parametrize("schedule", ALL[1:], ids=_name)
def test_rates_do_not_depend_on_floatx(schedule, floatx):
    before = rates(schedule, range(8))

    floatx("float16")

    np.testing.assert_array_equal(rates(schedule, range(8)), before)


def test_annealing_counts_single_steps_beyond_the_integers_of_float32():
    start = 2**24 + 1
    schedule = SWALearningRate(1.0, 0.0, start, anneal_steps=4, anneal_strategy="linear")

    assert rates(schedule, range(start - 1, start + 6)).tolist() == [1, 1, 0.75, 0.5, 0.25, 0, 0]


@pytest.mark.parametrize("step_size", [1, 2, 2.5, 100 / 3, 1000.25, 2**20])
def test_cycles_count_single_steps_beyond_the_integers_of_float32(step_size):
    schedule = TriangularCyclicalLearningRate(0, 1, step_size)
    period = fractions.Fraction(2 * step_size).limit_denominator(100)
    late = (2**31 - 10) // period.numerator * period.numerator
    assert late > 2**30

    steps = np.arange(9)

    np.testing.assert_array_equal(rates(schedule, late + steps), rates(schedule, steps))


def test_a_decay_near_one_keeps_its_digits():
    schedule = ExponentialCyclicalLearningRate(0, 1, step_size=1, gamma=0.99999)

    # float32(0.99999) to this power has an error of 5e-3.
    np.testing.assert_allclose(rates(schedule, [200_001]), [0.99999**200_001], rtol=1e-6)


@pytest.mark.parametrize("strategy", ["cos", "linear"])
def test_the_ends_of_annealing_are_exact(strategy):
    schedule = SWALearningRate(0.3, 0.07, 3, anneal_steps=7, anneal_strategy=strategy)

    ends = rates(schedule, [0, 3, 10, 11, 10**6])

    assert ends.tolist() == np.float32([0.3, 0.3, 0.07, 0.07, 0.07]).tolist()


# Configs.


@each
def test_a_config_has_every_argument_and_gives_the_same_schedule(schedule):
    config = schedule.get_config()
    arguments = inspect.signature(type(schedule)).parameters
    assert set(config) == set(arguments)

    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(schedule))

    assert type(again) is type(schedule)
    assert again.get_config() == config
    np.testing.assert_array_equal(rates(again, range(12)), rates(schedule, range(12)))


@each
def test_from_config_does_not_change_the_config(schedule):
    config = schedule.get_config()

    type(schedule).from_config(config)

    assert config == schedule.get_config()


@pytest.mark.parametrize("scale_fn", [lambda x: x, abs, keras.activations.relu])
def test_a_scale_function_that_is_not_registered_has_no_config(scale_fn):
    schedule = CyclicalLearningRate(0.1, 1.0, 4, scale_fn)

    with pytest.raises(ValueError, match=r"must be registered.*Received: scale_fn="):
        schedule.get_config()


@pytest.mark.sample(2, jax=1, tensorflow=1)
@each
def test_a_saved_model_goes_on_with_the_schedule(schedule, tmp_path):
    inner = keras.optimizers.SGD(schedule, momentum=0.5)
    model = small.fit(small.model(keras_avg.SWA(inner, start_averaging=4)), epochs=1)
    model.save(tmp_path / "model.keras")

    loaded = keras.saving.load_model(tmp_path / "model.keras")

    assert loaded.optimizer.get_config() == model.optimizer.get_config()
    assert loaded.get_compile_config() == model.get_compile_config()
    for values, others in zip(
        small.trajectories(loaded, steps=4), small.trajectories(model, steps=4), strict=True
    ):
        small.assert_same_bits(values, others)


# Training.


@pytest.mark.slow_on("tensorflow")
@pytest.mark.sample(3)
@each
def test_compiled_training_follows_the_rates(schedule):
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])
    model.layers[0].kernel.assign([[0.0]])
    optimizer = keras_avg.SWA(keras.optimizers.SGD(schedule), start_averaging=2, average_period=1)
    model.compile(optimizer, loss=lambda _, prediction: prediction)  # The gradient is 1.
    weights = [0.0]
    remember = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda *_: weights.append(small.numpy(model.layers[0].kernel).item())
    )

    model.fit(np.ones((1, 1)), np.ones((1, 1)), epochs=10, verbose=0, callbacks=[remember])

    expected = -np.cumsum(rates(schedule, range(10)))
    np.testing.assert_allclose(weights[1:], expected, rtol=1e-6, atol=1e-7)
    average = optimizer.get_slot(model.layers[0].kernel, "average")
    np.testing.assert_allclose(small.numpy(average).item(), np.mean(expected[2:]), rtol=1e-6)
    np.testing.assert_array_equal(float(optimizer.learning_rate), rates(schedule, [10])[0])


def test_the_largest_step_numbers_work_on_every_backend():
    schedule = SWALearningRate(0.1, 0.05, start_step=2**31 - 1, anneal_steps=2**31 - 1)
    np.testing.assert_array_equal(rates(schedule, [0, 10]), np.float32([0.1, 0.1]))


# Errors.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "cosine"}, "LearningRateSchedule or a number >= 0.*schedule='cosine'"),
        ({"schedule": None}, "schedule=None"),
        ({"schedule": -0.1}, "`schedule` must be a number >= 0.*schedule=-0.1"),
        ({"swa_learning_rate": float("inf")}, "swa_learning_rate=inf"),
        ({"swa_learning_rate": True}, "swa_learning_rate=True"),
        ({"start_step": -1}, "start_step=-1"),
        ({"start_step": 1.5}, "start_step=1.5"),
        ({"start_step": 2**31}, "start_step=2147483648"),
        ({"anneal_steps": -1}, "anneal_steps=-1"),
        ({"anneal_steps": 2**31}, "anneal_steps=2147483648"),
        ({"anneal_strategy": "cosine"}, "must be 'cos' or 'linear'.*anneal_strategy='cosine'"),
    ],
)
def test_bad_arguments_of_annealing_are_refused(changes, message):
    arguments = {"schedule": 0.1, "swa_learning_rate": 0.05, "start_step": 3, "anneal_steps": 2}
    with pytest.raises(ValueError, match=message):
        SWALearningRate(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"initial_learning_rate": -1}, "initial_learning_rate=-1"),
        ({"initial_learning_rate": "0.1"}, "initial_learning_rate='0.1'"),
        ({"maximal_learning_rate": float("nan")}, "maximal_learning_rate=nan"),
        ({"step_size": 0}, "number of steps.*step_size=0"),
        ({"step_size": 0.5}, "step_size=0.5"),
        ({"step_size": None}, "step_size=None"),
        ({"step_size": 2**29 + 1}, "step_size=536870913"),
        ({"scale_mode": "epochs"}, "must be 'cycle' or 'iterations'.*scale_mode='epochs'"),
        ({"scale_mode": None}, "scale_mode=None"),
        ({"gamma": 0.0}, "gamma=0.0"),
        ({"gamma": 1.1}, "0 < gamma <= 1.*gamma=1.1"),
        ({"gamma": "half"}, "gamma='half'"),
        ({"name": ""}, "name=''"),
    ],
)
def test_bad_arguments_of_cycles_are_refused(changes, message):
    arguments = {"initial_learning_rate": 0.1, "maximal_learning_rate": 1.0, "step_size": 4}
    with pytest.raises(ValueError, match=message):
        ExponentialCyclicalLearningRate(**(arguments | changes))


def test_a_scale_function_must_be_a_function():
    with pytest.raises(TypeError, match=r"`scale_fn` must be a function.*scale_fn=0\.5"):
        CyclicalLearningRate(0.1, 1.0, 4, 0.5)
