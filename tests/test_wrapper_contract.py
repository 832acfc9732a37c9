"""Every wrapper around every kind of inner optimizer keeps the same promises.

A new wrapper is admitted with one row in `WRAPPERS`: how to make it, and what its averages are,
by an oracle, from the trajectory of a variable.
"""

import keras
import numpy as np
import oracles
import pytest
import small_training as small
from keras import optimizers

from keras_avg import SWA, Lookahead, ModelAverage, MovingAverage

STEPS = 11
# Rounding of a float32 average, relative to 1 + |average|, over a dozen averagings.
AVERAGE_TOLERANCE = 1e-6


def warm_up(updates):
    return [min(0.9, (1 + s) / (10 + s)) for s in range(updates)]


def last_synchronized(trajectory):
    """With a step size of 1, and with one worker, what flows back is what was there."""
    return trajectory[(len(trajectory) - 1) // 3 * 3]


def swa_of_variables(trajectory):
    return oracles.swa(trajectory, start=1, period=2)


def warm_moving_average(trajectory):
    return oracles.moving_average(trajectory, warm_up(len(trajectory) - 1))


WRAPPERS = {
    "SWA": (
        lambda inner: SWA(inner, start_averaging=1, average_period=2),
        [swa_of_variables],
    ),
    "MovingAverage": (
        lambda inner: MovingAverage(inner, average_decay=0.9, dynamic_decay=True),
        [warm_moving_average],
    ),
    "SWA of MovingAverage": (
        lambda inner: SWA(MovingAverage(inner, average_decay=0.9, dynamic_decay=True), 1, 2),
        [swa_of_variables, warm_moving_average],
    ),
    "Lookahead": (
        lambda inner: Lookahead(inner, sync_period=3, slow_step_size=1.0),
        [last_synchronized],
    ),
    "ModelAverage": (
        lambda inner: ModelAverage(inner, interval_steps=3),
        [last_synchronized],
    ),
}

INNER = {
    "nesterov": lambda: optimizers.SGD(0.05, momentum=0.9, nesterov=True),
    "adam": lambda: optimizers.Adam(0.01),
    "adamw": lambda: optimizers.AdamW(0.01, weight_decay=0.1),
    "adafactor": lambda: optimizers.Adafactor(0.01),
    "muon": lambda: optimizers.Muon(0.01),
    "lion": lambda: optimizers.Lion(0.01),
    "ftrl": lambda: optimizers.Ftrl(0.05),
    "clipping": lambda: optimizers.Adam(0.01, global_clipnorm=0.5),
    "weight decay": lambda: optimizers.SGD(0.05, weight_decay=0.1),
    "accumulation": lambda: optimizers.Adam(0.01, gradient_accumulation_steps=2),
    "loss scale": lambda: optimizers.Adam(0.01, loss_scale_factor=1024.0),
    "schedule": lambda: optimizers.SGD(optimizers.schedules.CosineDecay(0.1, 8)),
}

each_wrapper = pytest.mark.parametrize("wrapper", WRAPPERS)
each_inner = pytest.mark.parametrize("inner", INNER)


def wrapped(wrapper, inner):
    return WRAPPERS[wrapper][0](INNER[inner]())


def chain(optimizer):
    """The wrappers of a nest, outermost first, and the optimizer inside."""
    links = [optimizer]
    while hasattr(links[-1], "inner_optimizer"):
        links.append(links[-1].inner_optimizer)
    return links[:-1], links[-1]


@each_inner
@each_wrapper
def test_training_is_that_of_the_inner_optimizer_bit_for_bit(wrapper, inner):
    plain = small.fit(small.model(INNER[inner]()))
    averaged = small.fit(small.model(wrapped(wrapper, inner)))

    small.assert_same_bits(averaged.get_weights(), plain.get_weights())
    _, innermost = chain(averaged.optimizer)
    small.assert_same_bits(
        [small.numpy(v) for v in innermost.variables],
        [small.numpy(v) for v in plain.optimizer.variables],
    )


@each_inner
@each_wrapper
def test_averages_are_those_of_the_oracle(wrapper, inner, record_property):
    model = small.model(wrapped(wrapper, inner))
    wrappers, innermost = chain(model.optimizer)
    accumulated = innermost.gradient_accumulation_steps or 1

    trajectories = small.trajectories(model, steps=STEPS * accumulated)

    assert int(model.optimizer.iterations) == STEPS
    largest = 0.0
    for optimizer, oracle in zip(wrappers, WRAPPERS[wrapper][1], strict=True):
        for variable, values in zip(model.trainable_variables, trajectories, strict=True):
            expected = oracle(values[::accumulated])
            average = small.numpy(optimizer.get_slot(variable, "average"))
            deviation = np.max(np.abs(average - expected) / (1 + np.abs(expected)))
            largest = max(largest, float(deviation))
    record_property("largest_deviation", largest)
    assert largest <= AVERAGE_TOLERANCE


@each_inner
@each_wrapper
def test_a_loaded_model_trains_on_as_if_it_had_never_stopped(wrapper, inner, tmp_path):
    # Five batches an epoch: with two micro-steps an update the file is written in mid-accumulation.
    model = small.fit(small.model(wrapped(wrapper, inner)), epochs=1, steps_per_epoch=5)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    small.assert_same_bits(loaded.optimizer.get_weights(), model.optimizer.get_weights())

    for trained in (model, loaded):
        small.fit(trained)

    small.assert_same_bits(loaded.get_weights(), model.get_weights())
    small.assert_same_bits(loaded.optimizer.get_weights(), model.optimizer.get_weights())


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


@each_inner
@each_wrapper
def test_a_config_makes_the_same_optimizer_again(wrapper, inner):
    optimizer = wrapped(wrapper, inner)
    config = optimizer.get_config()
    before = str(config)

    again = type(optimizer).from_config(config)

    assert str(config) == before, "from_config changed its argument"
    assert again.get_config() == config
    serialized = keras.saving.serialize_keras_object(optimizer)
    assert keras.saving.deserialize_keras_object(serialized).get_config() == config


@each_wrapper
def test_a_snapshot_takes_place_after_every_real_update_that_is_due(wrapper):
    model = small.model(wrapped(wrapper, "accumulation"))
    wrappers, _ = chain(model.optimizer)
    expected = {SWA: 3, MovingAverage: 6, Lookahead: 2, ModelAverage: 2}  # of updates 0..5

    small.fit(model)  # twelve micro-steps

    assert [w.num_snapshots for w in wrappers] == [expected[type(w)] for w in wrappers]
    assert all(w.has_average for w in wrappers)


@each_wrapper
def test_paths_of_all_variables_are_unique(wrapper):
    model = small.fit(small.model(wrapped(wrapper, "adam")), epochs=1)

    paths = [v.path for v in model.optimizer.variables]

    assert len(set(paths)) == len(paths)
    model.get_state_tree()
