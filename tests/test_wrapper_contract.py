"""Every wrapper around every kind of inner optimizer keeps the same promises.

A new wrapper needs one row in `wrappers.py`.
"""

import keras
import numpy as np
import pytest
import small_training as small
import trainings
from bare_training import AVERAGE_TOLERANCE, assert_averages, assert_same_training
from wrappers import INNER, TRANSPARENT, WRAPPERS, chain, each_wrapper, pairs, shown, wrapped

import keras_avg


@pytest.fixture(scope="module")
def training(request, tmp_path_factory):
    """The training of a pair. pytest runs all tests of a pair before those of the next."""
    return trainings.of_pair(*request.param, tmp_path_factory.mktemp("training"))


def each_training(rows=tuple(WRAPPERS)):
    return pytest.mark.parametrize("training", pairs(rows), indirect=True, scope="module")


@pytest.mark.complete
@each_training(TRANSPARENT)
def test_training_equals_that_of_the_inner_optimizer_bit_for_bit(training):
    assert_same_training(training.model, trainings.without_wrapper(training.inner))


@pytest.mark.complete
@each_training()
def test_averages_equal_the_oracle(training):
    assert int(training.model.optimizer.iterations) == trainings.UPDATES
    assert_averages(training.model, training.trajectories, training.wrapper)


@pytest.mark.complete
@each_training()
def test_a_loaded_model_trains_on_as_if_it_had_never_stopped(training):
    loaded = keras.saving.load_model(training.file)
    small.assert_same_bits(loaded.optimizer.get_weights(), training.state_in_file)

    trainings.finish(loaded)

    small.assert_same_bits(loaded.get_weights(), training.model.get_weights())
    small.assert_same_bits(loaded.optimizer.get_weights(), training.model.optimizer.get_weights())


@pytest.mark.sample(6, jax=3, tensorflow=2)
@pytest.mark.skipif(keras.backend.backend() == "torch", reason="torch runs Python at each step")
@pytest.mark.parametrize("inner", ["adam", "accumulation"])
@each_wrapper
def test_the_train_step_is_traced_as_often_as_without_the_wrapper(wrapper, inner):
    traces = {}
    for name, optimizer in {"plain": INNER[inner](), "wrapped": wrapped(wrapper, inner)}.items():
        calls = []

        def loss(y, prediction, calls=calls):
            calls.append(1)
            return keras.losses.mean_squared_error(y, prediction)

        model = small.model()
        model.compile(optimizer, loss)
        small.fit(model)
        small.fit(model)
        traces[name] = len(calls)

    assert traces["wrapped"] == traces["plain"]


@pytest.mark.parametrize("pair", pairs())
def test_a_config_constructs_an_equal_optimizer(pair):
    optimizer = wrapped(*pair)
    config = optimizer.get_config()
    before = str(config)

    again = type(optimizer).from_config(config)

    assert str(config) == before, "from_config changed its argument"
    assert again.get_config() == config
    serialized = keras.saving.serialize_keras_object(optimizer)
    assert keras.saving.deserialize_keras_object(serialized).get_config() == config


@pytest.mark.sample(6, jax=3, tensorflow=3)
@each_wrapper
def test_a_snapshot_takes_place_after_every_real_update_that_is_due(wrapper):
    model = small.model(wrapped(wrapper, "accumulation"))
    wrappers, _ = chain(model.optimizer)

    small.fit(model)  # These are twelve micro-steps.

    assert [w.num_snapshots for w in wrappers] == WRAPPERS[wrapper].snapshots
    assert all(w.has_average for w in wrappers)


@pytest.mark.slow_on("tensorflow")
@pytest.mark.sample(5)
@each_wrapper
def test_paths_of_all_variables_are_unique(wrapper):
    model = small.fit(small.model(wrapped(wrapper, "adam")), epochs=1)

    paths = [v.path for v in model.optimizer.variables]

    assert len(set(paths)) == len(paths)
    model.get_state_tree()


@pytest.mark.sample(8, jax=4, tensorflow=4)
@pytest.mark.parametrize("policy", ["float32", "bfloat16"])
@each_wrapper
def test_averages_are_swapped_in_and_every_raw_bit_is_restored(
    wrapper, policy, dtype_policy, tmp_path
):
    dtype_policy(policy)
    model = small.fit(small.model(wrapped(wrapper, "nesterov")))
    wrappers, _ = chain(model.optimizer)
    raw, state = model.get_weights(), model.optimizer.get_weights()
    for optimizer in wrappers:
        averages = shown(optimizer)
        optimizer.swap_weights()
        for variable, average in zip(model.trainable_variables, averages, strict=True):
            value = small.numpy(variable)
            np.testing.assert_array_equal(value, average.astype(value.dtype))
        model.save_weights(tmp_path / "swapped.weights.h5")
        optimizer.swap_weights()
        small.assert_same_bits(model.get_weights(), raw)
        small.assert_same_bits(model.optimizer.get_weights(), state)
    model.load_weights(tmp_path / "swapped.weights.h5")
    keras_avg.swap_weights(model)
    small.assert_same_bits(model.get_weights(), raw)
    small.assert_same_bits(model.optimizer.get_weights(), state)


@pytest.mark.sample(5, jax=2, tensorflow=2)
@each_wrapper
def test_stores_of_low_precision_variables_are_float32(wrapper, dtype_policy):
    dtype_policy("bfloat16")
    model = small.model(wrapped(wrapper, "nesterov"))
    trajectories = small.trajectories(model, steps=6)
    wrappers, _ = chain(model.optimizer)
    for optimizer, oracle in zip(wrappers, WRAPPERS[wrapper].shown, strict=True):
        kept = optimizer.kept_variables()
        assert {keras.backend.standardize_dtype(variable.dtype) for variable in kept} == {"float32"}
        if not WRAPPERS[wrapper].is_transparent:
            continue  # Variables rounded to bfloat16 do not say what their unrounded values are.
        for average, values in zip(shown(optimizer), trajectories, strict=True):
            expected = oracle([value.astype("float64") for value in values])
            deviation = np.abs(average.astype("float64") - expected) / (1 + np.abs(expected))
            assert np.max(deviation) <= AVERAGE_TOLERANCE


@pytest.mark.slow_on("jax", "tensorflow")
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@each_wrapper
def test_a_nonfinite_variable_is_not_averaged_with_skip_nonfinite(wrapper, bad):
    inner = keras.optimizers.SGD(0.5)
    optimizer = WRAPPERS[wrapper].make(inner, skip_nonfinite=True)
    variable = keras.Variable([1.0, 2.0])
    small.apply(optimizer, [variable], [[0.1, 0.2]], times=4)
    before, snapshots = shown(optimizer), optimizer.num_snapshots
    small.apply(optimizer, [variable], [[bad, 0.0]], times=4)
    assert not np.all(np.isfinite(small.numpy(variable)))
    small.assert_same_bits(shown(optimizer), before)
    assert optimizer.num_snapshots == snapshots


@pytest.mark.slow_on("jax", "tensorflow")
@pytest.mark.sample(4)
@each_wrapper
def test_steps_by_hand_and_compiled_steps_can_alternate(wrapper):
    """No buffer is shared. A compiled JAX step could not donate a shared buffer twice."""
    model = small.model(wrapped(wrapper, "adam"))
    ones = [np.ones(v.shape) for v in model.trainable_variables]
    for _ in range(2):
        small.apply(model.optimizer, model.trainable_variables, ones, times=3)
        small.fit(model, epochs=1)
    assert int(model.optimizer.iterations) == 2 * (3 + small.BATCHES)
