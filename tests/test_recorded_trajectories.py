"""Replays recordings of TensorFlow Addons and torch, step by step.

There are two kinds of replay. One trains with the recorded gradients. The other averages the
recorded values, so it does not need the same inner optimizer.
"""

import keras
import numpy as np
import pytest
import recordings

import keras_avg

# The tolerance is for  |difference| / (1 + |recorded value|).  All values are float32, whose
# resolution is 6e-8 to 1.2e-7. An average of recorded values differs because the same formula is
# arranged in another way. A training differs further because the inner optimizers of Keras 3 and
# Keras 2 round differently, over up to 40 steps.
AVERAGE_TOLERANCE = 1e-6
TRAINING_TOLERANCE = 5e-6

CLIPPING = {"clipnorm", "clipvalue", "global_clipnorm"}

ADDONS = {
    recording.id: recording
    for family in ("swa", "moving_average", "clipping", "lr_schedule", "sparse", "lookahead")
    for recording in recordings.trainings(family)
}
# If the average flows back, the recorded values are not those that were averaged.
OF_RECORDED_VALUES = {
    name: recording for name, recording in ADDONS.items() if recording.wrapper != "Lookahead"
}
TORCH = {recording.id: recording for recording in recordings.averaged_models()}

# The intended differences from Addons.
SHADOW_COPY = {
    "open/moving_average/059": "after `shadow_copy`, Addons' average started at zeros",
}
TRAINED_OTHERWISE = SHADOW_COPY | {
    **{
        f"open/clipping/{number:03}": "Addons silently ignored clipping on the inner optimizer"
        for number in range(4)
    },
    **{
        f"open/sparse/{number:03}": "Addons' momentum stood still for rows without a gradient"
        for number in range(8, 16)
    },
}


class Assigns(keras.optimizers.Optimizer):
    """An optimizer that assigns each gradient to its variable."""

    def update_step(self, gradient, variable, learning_rate):
        self.assign(variable, gradient)


@pytest.fixture(scope="session")
def note_deviation(record_testsuite_property):
    """Notes the largest deviation of each family. pytest writes it with `--junitxml`."""
    largest = {}

    def note(replay, recording, deviation):
        family = f"{replay}, {recording.id.rpartition('/')[0]}"
        largest[family] = max(deviation, largest.get(family, 0.0))

    yield note
    for family, deviation in largest.items():
        record_testsuite_property(f"largest deviation of {family}", f"{deviation:.1e}")


@pytest.fixture
def as_gradient():
    """Turns a recorded gradient into one for Keras. It is sparse if the backend supports that."""
    if keras.backend.backend() != "tensorflow":
        return lambda grad: _tensor(grad.dense() if _is_sparse(grad) else grad)
    import tensorflow as tf

    def gradient(grad):
        if _is_sparse(grad):
            return tf.IndexedSlices(_tensor(grad.values), _tensor(grad.indices), grad.shape)
        return _tensor(grad)

    return gradient


def _is_sparse(grad):
    return isinstance(grad, recordings.SparseRows)


def _tensor(array):
    return keras.ops.convert_to_tensor(array)


def _recorded(cases, left_out):
    return pytest.mark.parametrize(
        "recording",
        [
            pytest.param(
                recording,
                id=name,
                marks=pytest.mark.skip(reason=left_out[name]) if name in left_out else (),
            )
            for name, recording in cases.items()
        ],
    )


def _inner_optimizer(recorded):
    arguments = dict(recorded["args"])
    if recorded["class"] == "Adam":
        # Keras 2 kept the betas in float32. So `1 - beta` had the same rounding in the moments and
        # in their correction. Keras 3 rounds it only in the correction, and its early steps are too
        # long by 6e-6.
        arguments |= {"beta_1": float(np.float32(0.9)), "beta_2": float(np.float32(0.999))}
    if schedule := recorded.get("learning_rate_schedule"):
        cyclical = getattr(keras_avg.schedules, schedule["class"])
        arguments["learning_rate"] = cyclical(**schedule["args"])
    return getattr(keras.optimizers, recorded["class"])(**arguments)


def _rule(recording, optimizer):
    """The recorded wrapper without its clipping, which only matters in training."""
    arguments = {k: v for k, v in recording.arguments.items() if k not in CLIPPING}
    return getattr(keras_avg, recording.wrapper)(optimizer, **arguments)


def _variables(values):
    return [keras.Variable(value) for value in values]


def _replay(optimizer, variables, gradients):
    """The variables and their averages after each step."""
    values, averages = [], []
    for grads in gradients:
        optimizer.apply(grads, variables)
        values.append(_arrays(variables))
        averages.append(_arrays(optimizer.get_slot(v, "average") for v in variables))
    return values, averages


def _arrays(variables):
    # A copy, because the next step may overwrite the memory of the NumPy array.
    return [np.array(keras.ops.convert_to_numpy(variable)) for variable in variables]


def _check_trajectory(actual, recorded, tolerance):
    """Compare every element of every variable after every step. Return the largest deviation."""
    largest = 0.0
    for step, (values, expected) in enumerate(zip(actual, recorded, strict=True)):
        deviation = _deviation(values, expected)
        assert deviation <= tolerance, f"off by {deviation:.1e} after step {step}"
        largest = max(largest, deviation)
    return largest


def _deviation(values, expected):
    deviations = []
    for value, target in zip(values, expected, strict=True):
        assert value.shape == target.shape
        difference = np.abs(value.astype("float64") - target)
        deviations.append(np.max(difference / (1 + np.abs(target))))
    return np.max(deviations)


def test_recordings_agree_with_values_that_are_computed_by_hand():
    recording = ADDONS["open/swa/014"]  # It has SGD(0.1), and snapshots after steps 0, 2, 4, ...
    first, second, third = recording.values[:3]
    for v, start in enumerate(recording.initial_values):
        grad = recording.gradients[0][v]
        np.testing.assert_allclose(first[v], start - 0.1 * grad, atol=1e-6)
        np.testing.assert_array_equal(recording.averages[1][v], first[v])
        np.testing.assert_allclose(recording.averages[2][v], (first[v] + third[v]) / 2, atol=1e-6)
    assert [value.shape for value in second] == [(3,), (4, 5), ()]


def test_no_recording_is_missing():
    families = [name.split("/")[1] for name in ADDONS]
    assert {family: families.count(family) for family in families} == {
        "swa": 30,
        "moving_average": 60,
        "clipping": 8,
        "lr_schedule": 3,
        "sparse": 20,
        "lookahead": 12,
    }
    assert len(TORCH) == 16


@pytest.mark.slow_on("jax")
@pytest.mark.sample(12)
@_recorded(ADDONS, left_out=TRAINED_OTHERWISE)
def test_training_equals_recordings_of_addons(recording, as_gradient, note_deviation):
    gradients = recording.gradients
    if recording.inner["class"] == "Adam":  # On TensorFlow, Keras 3 does not sum repeated rows.
        gradients = [[g.summed() if _is_sparse(g) else g for g in grads] for grads in gradients]
    optimizer = getattr(keras_avg, recording.wrapper)(
        _inner_optimizer(recording.inner), **recording.arguments
    )
    variables = _variables(recording.initial_values)

    values, averages = _replay(
        optimizer, variables, [[as_gradient(g) for g in grads] for grads in gradients]
    )

    of_values = _check_trajectory(values, recording.values, TRAINING_TOLERANCE)
    of_averages = _check_trajectory(averages, recording.averages, TRAINING_TOLERANCE)
    note_deviation("training", recording, max(of_values, of_averages))
    if recording.assigned is not None:
        optimizer.assign_average_vars(variables)
        assert _deviation(_arrays(variables), recording.assigned) <= TRAINING_TOLERANCE


@pytest.mark.sample(20)
@_recorded(OF_RECORDED_VALUES, left_out=SHADOW_COPY)
def test_averages_of_recorded_values_equal_those_of_addons(recording, note_deviation):
    optimizer = _rule(recording, Assigns(learning_rate=1.0))
    variables = _variables(recording.initial_values)

    values, averages = _replay(
        optimizer, variables, [[_tensor(v) for v in step] for step in recording.values]
    )

    assert _check_trajectory(values, recording.values, tolerance=0.0) == 0.0
    deviation = _check_trajectory(averages, recording.averages, AVERAGE_TOLERANCE)
    note_deviation("averages", recording, deviation)


# In torch the model begins with weights[0], and step t gives weights[t]. torch averages when
#     t > after  and  (t - after - 1) % every == 0.
# The replay takes weights[0] as step 0, so its step t is torch's step t:
#     SWA            is due at  after + 1, after + 1 + every, ...  These are the same steps.
#     MovingAverage  is due when  (t + 1) % every == 0.  These are the same steps if
#                    (after + 2) % every == 0.
# torch's first average is a copy. So the decay is 0 up to step after + 1. torch's decay is that of
# one averaging. The decay of MovingAverage is that of one step, the every-th root of torch's.


def _as_averaged_model(recording):
    after, every = recording.update_after, recording.update_every
    inner = Assigns(learning_rate=1.0)
    if recording.function.startswith("swa"):
        return keras_avg.SWA(inner, start_averaging=after + 1, average_period=every)
    assert (after + 2) % every == 0
    decay = float(recording.function.rpartition("_")[2])
    return keras_avg.MovingAverage(
        inner, average_decay=decay ** (1 / every), start_step=after + 2, average_period=every
    )


@pytest.mark.sample(6)
@_recorded(TORCH, left_out={})
def test_averages_of_recorded_weights_equal_those_of_torch(recording, note_deviation):
    optimizer = _as_averaged_model(recording)
    variables = _variables(recording.weights[0])

    _, averages = _replay(
        optimizer, variables, [[_tensor(w) for w in step] for step in recording.weights]
    )

    # Before its first update, torch's average is a copy of the new model.
    first = recording.num_averaged.index(1)
    deviation = _check_trajectory(
        averages[1 + first :], recording.averages[first:], AVERAGE_TOLERANCE
    )
    note_deviation("averages", recording, deviation)
    if isinstance(optimizer, keras_avg.SWA):
        assert optimizer.num_snapshots == recording.num_averaged[-1]


# The replays can fail: these rules are slightly wrong, and do not pass.


class SlowerSWA(keras_avg.SWA):
    def value_weight(self, step):
        return 1 / (1 / super().value_weight(step) + 1)


class ForgetfulAverage(keras_avg.MovingAverage):
    def value_weight(self, step):
        return 1.0001 * super().value_weight(step)


@pytest.mark.parametrize(
    ("wrong", "name"),
    [(SlowerSWA, "open/swa/012"), (ForgetfulAverage, "open/moving_average/003")],
)
def test_a_wrong_weight_is_noticed(wrong, name):
    recording = ADDONS[name]
    optimizer = wrong(Assigns(learning_rate=1.0), **recording.arguments)
    _, averages = _replay(
        optimizer,
        _variables(recording.initial_values),
        [[_tensor(v) for v in step] for step in recording.values],
    )
    with pytest.raises(AssertionError, match="after step"):
        _check_trajectory(averages, recording.averages, AVERAGE_TOLERANCE)
