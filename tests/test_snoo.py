"""`ModelAverage` in one process equals methods of other names: SNOO, MuLoCo, DiLoCo."""

import keras
import numpy as np
import pytest
import small_training as small
from keras import optimizers

from keras_avg import SWA, Lookahead, ModelAverage, MovingAverage

TOLERANCE = 1e-6  # rounding of a few float32 operations on numbers of order 1

# The history of one layer that torchft has published. It starts at 1, the gradient is 2, SGD(1) is
# inside and SGD(2) outside, and the rounds are at steps 6 and 12.
TORCHFT = [1, -1, -3, -5, -7, -9, -23, -25, -27, -29, -31, -33, -47]


def test_the_history_equals_that_of_torchft():
    optimizer = ModelAverage(
        optimizers.SGD(1.0), interval_steps=6, outer_optimizer=optimizers.SGD(2.0)
    )
    variable, history = keras.Variable([1.0]), [1.0]
    for _ in range(12):
        small.apply(optimizer, [variable], [[2.0]])
        history.append(float(small.numpy(variable)[0]))
    assert history == TORCHFT


def snoo(trajectory_of, start, k, rate, momentum, rounds):
    """SNOO as in its paper: s = w - w_K, b = mu b + s, w <- w - eta (mu b + s)."""
    w, b = np.asarray(start, "float64"), 0.0
    for _ in range(rounds):
        s = w - trajectory_of(w, k)
        b = momentum * b + s
        w = w - rate * (momentum * b + s)
        yield w


@pytest.mark.parametrize("inner", ["SGD", "Muon"])
def test_model_average_with_outer_momentum_is_snoo_or_muloco(inner):
    random = np.random.default_rng(4)
    start = random.normal(size=(3, 2)).astype("float32")
    target = random.normal(size=(3, 2)).astype("float32")

    def make():
        return optimizers.SGD(0.1) if inner == "SGD" else optimizers.Muon(0.05)

    bare, weights = make(), keras.Variable(start, name="bare")

    def inner_steps(w, k):
        weights.assign(w)
        for _ in range(k):
            small.apply(bare, [weights], [small.numpy(weights) - target])
        return small.numpy(weights).astype("float64")

    optimizer = ModelAverage(
        make(),
        interval_steps=4,
        outer_optimizer=optimizers.SGD(0.7, momentum=0.9, nesterov=True),
    )
    variable = keras.Variable(start, name="bare")
    for expected in snoo(inner_steps, start, 4, 0.7, 0.9, rounds=5):
        for _ in range(4):
            small.apply(optimizer, [variable], [small.numpy(variable) - target])
        np.testing.assert_allclose(variable, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow_on("jax", "tensorflow")
def test_model_average_without_outer_momentum_is_lookahead():
    average = ModelAverage(
        optimizers.SGD(0.1), interval_steps=3, outer_optimizer=optimizers.SGD(0.4)
    )
    models = [small.model(average), small.model(Lookahead(optimizers.SGD(0.1), 3, 0.4))]
    for model in models:
        small.fit(model, epochs=2)
    for ours, theirs in zip(*(m.get_weights() for m in models), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.slow_on("jax", "tensorflow")
def test_a_wrapper_around_model_average_averages_the_center_of_one_worker(tmp_path):
    def make():
        center = ModelAverage(
            optimizers.SGD(0.1),
            interval_steps=2,
            outer_optimizer=optimizers.SGD(0.7, momentum=0.9, nesterov=True),
        )
        return SWA(MovingAverage(center, average_decay=0.5), start_averaging=1, average_period=2)

    model = small.model(make())
    trajectories = small.trajectories(model, 8)
    for variable, values in zip(model.trainable_variables, trajectories, strict=True):
        expected = np.mean(np.asarray(values[2::2], "float64"), axis=0)
        average = model.optimizer.get_slot(variable, "average")
        np.testing.assert_allclose(average, expected, rtol=TOLERANCE, atol=TOLERANCE)
        center = model.optimizer.inner_optimizer.inner_optimizer.get_slot(variable, "average")
        np.testing.assert_array_equal(center, small.numpy(variable))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for each in (model, loaded):
        small.fit(each, epochs=1)
    small.assert_same_bits(loaded.get_weights(), model.get_weights())
    small.assert_same_bits(loaded.optimizer.get_weights(), model.optimizer.get_weights())


class Two:
    rank, size, is_chief = 0, 2, True

    def all_reduce_sum(self, arrays):
        return [2 * np.asarray(keras.ops.convert_to_numpy(a)) for a in arrays]

    def barrier(self):
        pass


def test_a_wrapper_around_model_average_of_several_workers_is_refused():
    optimizer = SWA(ModelAverage("sgd", communicator=Two()))
    with pytest.raises(ValueError, match=r"outermost.*each worker's own.*2 workers inside SWA"):
        small.apply(optimizer, [keras.Variable([1.0])], [[1.0]])
    assert not optimizer.built
