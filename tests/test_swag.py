"""SWAG: the mean, squares and deviations of snapshots, and samples from their distribution."""

import keras
import numpy as np
import pytest
import small_training as small
from keras import optimizers

import keras_avg
from keras_avg import SWAG

TOLERANCE = 1e-6  # rounding of a few float32 operations on numbers of order 1


def trained(rank=3, epochs=2):
    return small.fit(small.model(SWAG(optimizers.SGD(0.1), 0, 1, rank=rank)), epochs=epochs)


def weights(model):
    return [small.numpy(v) for v in model.trainable_variables]


def flat(arrays):
    return np.concatenate([array.ravel() for array in arrays]).astype("float64")


def test_the_mean_and_the_square_of_two_snapshots_are_computed_in_the_head():
    # SGD(1) moves the variable to 3 and to 1. The mean is 2, and the mean of the squares is 5.
    optimizer, variable = SWAG(optimizers.SGD(1.0), 0, 1, rank=2), keras.Variable([5.0])
    small.apply(optimizer, [variable], [[2.0]], times=2)
    for name, expected in (("average", [2]), ("square", [5]), ("deviation", [[0], [-1]])):
        np.testing.assert_allclose(optimizer.get_slot(variable, name), expected)


@pytest.mark.slow_on("jax")
def test_moments_and_columns_equal_those_in_numpy():
    model = small.model(SWAG(optimizers.SGD(0.1), 1, 2, rank=3))
    trajectories = small.trajectories(model, 12)
    for variable, values in zip(model.trainable_variables, trajectories, strict=True):
        snapshots = np.asarray(values[2::2], "float64")
        means = [snapshots[: n + 1].mean(axis=0) for n in range(len(snapshots))]
        columns = [snapshot - mean for snapshot, mean in zip(snapshots, means, strict=True)]
        # Columns 3, 4 and 5 have replaced columns 0, 1 and 2.
        expected = {"average": means[-1], "square": (snapshots**2).mean(axis=0)}
        expected["deviation"] = np.stack(columns[3:6])
        for name, value in expected.items():
            found = model.optimizer.get_slot(variable, name)
            np.testing.assert_allclose(found, value, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.slow_on("jax", "tensorflow")
def test_samples_have_the_moments_of_the_distribution():
    """The mean and covariance of 400 samples are right within five standard errors."""
    random = np.random.default_rng(0)
    optimizer, variable = SWAG(optimizers.SGD(1.0), 0, 1, rank=4), keras.Variable(np.zeros(6))
    steps = random.normal(size=(8, 6))
    for step in steps:
        small.apply(optimizer, [variable], [step])
    number, samples = 400, []
    for seed in range(number):
        with optimizer.sample_weights(seed):
            samples.append(small.numpy(variable).astype("float64"))
    mean = small.numpy(optimizer.get_slot(variable, "average")).astype("float64")
    square = small.numpy(optimizer.get_slot(variable, "square")).astype("float64")
    columns = small.numpy(optimizer.get_slot(variable, "deviation")).T.astype("float64")
    covariance = np.diag((square - mean**2) / 2) + columns @ columns.T / (2 * 3)
    deviation = np.sqrt(np.diag(covariance))
    error = np.abs(np.mean(samples, axis=0) - mean) / (deviation / number**0.5)
    assert np.max(error) < 5
    found = np.cov(np.asarray(samples).T)
    spread = np.sqrt((covariance**2 + np.outer(deviation, deviation) ** 2) / number)
    assert np.max(np.abs(found - covariance) / spread) < 5


@pytest.mark.slow_on("jax", "tensorflow")
def test_one_vector_for_all_variables_weights_the_columns():
    """Without diagonal noise, all variables move along the columns by the same amounts."""
    model = trained(rank=3, epochs=1)
    optimizer = model.optimizer
    mean = [small.numpy(v) for v in optimizer.kept["average"].kept]
    for square, value in zip(optimizer.kept["square"].kept, mean, strict=True):
        square.assign(value * value)  # There is no variance.
    rings = [small.numpy(ring) for ring in optimizer.rings["deviation"].kept]
    columns = [[ring[i] for ring in rings] for i in range(3)]
    with optimizer.sample_weights(1):
        moved = flat(weights(model)) - flat(mean)
    directions = np.stack([flat(column) for column in columns], axis=1)
    shares, *_ = np.linalg.lstsq(directions, moved, rcond=None)
    # The tolerance is for squares in float32.
    np.testing.assert_allclose(directions @ shares, moved, atol=1e-3)
    assert np.all(np.abs(shares) > 1e-3)


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_diagonal_is_drawn_with_less_than_two_columns(rank):
    optimizer, variable = SWAG(optimizers.SGD(1.0), 0, 1, rank=rank), keras.Variable(np.ones(4000))
    random = np.random.default_rng(1)
    for _ in range(5):
        small.apply(optimizer, [variable], [random.normal(size=4000)])
    mean = small.numpy(optimizer.get_slot(variable, "average"))
    deviation = np.sqrt(small.numpy(optimizer.get_slot(variable, "square")) - mean**2)
    for scale in (0.5, 1.0):
        with optimizer.sample_weights(0, scale=scale):
            normal = (small.numpy(variable) - mean) / deviation / scale
        assert abs(np.mean(normal)) < 5 / 4000**0.5
        assert abs(np.var(normal) - 1) < 5 * (2 / 4000) ** 0.5


class TestTheContext:
    @pytest.mark.slow_on("jax", "tensorflow")
    def test_the_same_seed_gives_the_same_sample(self):
        model = trained()
        samples = []
        for seed in (1, 1, 2, None, None):
            with model.optimizer.sample_weights(seed):
                samples.append(weights(model))
        small.assert_same_bits(samples[0], samples[1])
        for one, other in ((0, 2), (2, 3), (3, 4)):
            assert np.any(samples[one][0] != samples[other][0])

    @pytest.mark.slow_on("tensorflow")
    def test_a_sample_of_scale_0_is_the_mean(self):
        model = trained()
        with model.optimizer.sample_weights(0, scale=0):
            sample = weights(model)
        with model.optimizer.average_weights():
            small.assert_same_bits(weights(model), sample)

    @pytest.mark.slow_on("tensorflow")
    @pytest.mark.parametrize("swapped", [False, True])
    def test_sample_weights_restores_every_bit_after_an_exception_too(self, swapped):
        model = trained()
        if swapped:
            model.optimizer.swap_weights()
            keras_avg.update_batch_norm(model, small.X, verbose=0)
        before, state = model.get_weights(), model.optimizer.get_weights()

        def fail():
            with model.optimizer.sample_weights(3):
                assert model.optimizer.averages_in_model
                keras_avg.update_batch_norm(model, small.X, verbose=0)
                raise KeyError

        with pytest.raises(KeyError):
            fail()
        small.assert_same_bits(model.get_weights(), before)
        small.assert_same_bits(model.optimizer.get_weights(), state)
        assert model.optimizer.averages_in_model == swapped
        if swapped:
            model.optimizer.swap_weights()
        small.fit(model, epochs=1)

    @pytest.mark.slow_on("tensorflow")
    def test_sample_weights_of_a_swapped_model_restores_the_raw_statistics(self):
        model = trained()
        raw = model.get_weights()
        model.optimizer.swap_weights()
        before = model.get_weights()
        with model.optimizer.sample_weights(3):
            keras_avg.update_batch_norm(model, small.X, verbose=0)
        small.assert_same_bits(model.get_weights(), before)
        model.optimizer.swap_weights()
        small.assert_same_bits(model.get_weights(), raw)

    def test_training_inside_sample_weights_is_refused(self):
        model = trained()
        with (
            model.optimizer.sample_weights(0),
            pytest.raises(RuntimeError, match="training is ref"),
        ):
            small.fit(model, epochs=1)

    @pytest.mark.slow_on("jax", "tensorflow")
    def test_sample_weights_without_a_snapshot_is_refused(self):
        model = small.fit(small.model(SWAG("sgd", start_averaging=100)), epochs=1)
        with pytest.raises(ValueError, match="no snapshot yet"), model.optimizer.sample_weights():
            pass

    def test_sample_weights_before_the_build_is_refused_by_its_name(self):
        sampling = SWAG("sgd").sample_weights()
        with pytest.raises(ValueError, match="`sample_weights` has nothing to work on"), sampling:
            pass

    @pytest.mark.slow_on("tensorflow")
    @pytest.mark.parametrize(
        ("arguments", "received"),
        [({"scale": -1}, "scale=-1"), ({"seed": 0.5}, "seed=0.5"), ({"scale": "x"}, "scale='x'")],
    )
    def test_bad_arguments_of_sample_weights_are_refused(self, arguments, received):
        model = trained()
        sampling = model.optimizer.sample_weights(**arguments)
        with pytest.raises(ValueError, match=f"Received: {received}"), sampling:
            pass


@pytest.mark.parametrize("rank", [-1, 1.5])
def test_a_bad_rank_is_refused(rank):
    with pytest.raises(ValueError, match=f"`rank` must be an integer.*Received: rank={rank}"):
        SWAG("sgd", rank=rank)


@pytest.mark.slow_on("tensorflow")
def test_swag_is_saved_and_sampled_after_loading(tmp_path):
    model = trained()
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for each in (model, loaded):
        each.optimizer.sample_weights(5).__enter__()
    small.assert_same_bits(weights(loaded), weights(model))
