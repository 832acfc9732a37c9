"""A greedy soup takes the right files, and the model gets their mean."""

import keras
import numpy as np
import pytest
import small_training as small

from keras_avg import SWA, checkpoints, swap_weights


def constant(value, path):
    model = small.model()
    model.set_weights([np.full(w.shape, value, "float32") for w in model.weights])
    model.save_weights(path)
    return path


@pytest.fixture
def files(tmp_path):
    """Models whose weights are all 0, 4, 2, 8 and 3."""
    return [constant(v, tmp_path / f"{v}.weights.h5") for v in (0, 4, 2, 8, 3)]


def first(model):
    return float(small.numpy(model.variables[0]).flat[0])


def values_of(model):
    return [small.numpy(variable) for variable in model.variables]


def expect_all(model, value):
    small.assert_same_bits(
        values_of(model), [np.full(v.shape, value, "float32") for v in model.variables]
    )


def near(target):
    return lambda model: -abs(first(model) - target)


class TestTheSoup:
    @pytest.mark.slow_on("tensorflow")
    def test_a_soup_of_numbers_is_close_to_two_and_a_half(self, files):
        # Alone, 2 and 3 are both 0.5 away, so 2 is tried first. Then 3 joins: the mean is 2.5. With
        # 4 the mean would be 3, with 0 it would be 1.67, with 8 it would be 4.33. So none joins.
        model = small.model()
        chosen = checkpoints.greedy_soup(model, files, near(2.5), verbose=0)
        assert chosen == [files[2], files[4]]
        expect_all(model, 2.5)

    @pytest.mark.slow_on("tensorflow")
    def test_a_file_that_does_no_harm_joins(self, files):
        model = small.model()
        chosen = checkpoints.greedy_soup(model, files, lambda model: 1.0, verbose=0)
        assert chosen == files
        expect_all(model, np.float32(17 / 5))

    @pytest.mark.slow_on("tensorflow")
    def test_the_soup_is_the_best_file_if_no_other_file_helps(self, files):
        model = small.model()
        assert checkpoints.greedy_soup(model, files, first, verbose=0) == [files[3]]
        expect_all(model, 8)

    @pytest.mark.slow_on("tensorflow")
    def test_a_soup_can_minimize_a_loss(self, files):
        model = small.model()
        loss = lambda model: abs(first(model) - 2.5)  # noqa: E731
        chosen = checkpoints.greedy_soup(model, files, loss, mode="min", verbose=0)
        assert chosen == [files[2], files[4]]

    def test_the_soup_is_the_mean_of_the_returned_files(self, tmp_path):
        files = []
        for seed in range(4):
            model = small.fit(small.model(keras.optimizers.Adam(0.01 * (seed + 1))), epochs=3)
            files.append(tmp_path / f"{seed}.keras")
            model.save(files[-1])
        model = small.model("sgd")
        loss = lambda model: model.evaluate(small.X, small.Y, verbose=0)  # noqa: E731
        chosen = checkpoints.greedy_soup(model, map(str, files), loss, "min", verbose=0)
        soup = values_of(model)
        checkpoints.average(model, chosen, verbose=0)
        small.assert_same_bits(values_of(model), soup)
        reached = loss(model)
        for file in files:
            checkpoints.average(model, [file], verbose=0)
            assert reached <= loss(model)


@pytest.mark.slow_on("tensorflow")
def test_the_score_may_change_the_weights(files):
    model = small.model()

    def spoils(model):
        result = near(2.5)(model)
        model.set_weights([np.full(w.shape, 99, "float32") for w in model.weights])
        return result

    assert checkpoints.greedy_soup(model, files, spoils, verbose=0) == [files[2], files[4]]
    expect_all(model, 2.5)


@pytest.mark.slow_on("tensorflow")
def test_a_score_of_nan_keeps_a_file_out(files):
    model = small.model()
    score = lambda model: np.nan if first(model) > 3 else first(model)  # noqa: E731
    chosen = checkpoints.greedy_soup(model, files, score, verbose=0)
    assert chosen == [files[4]]
    expect_all(model, 3)
    with pytest.raises(ValueError, match="NaN for every file"):
        checkpoints.greedy_soup(model, files, lambda model: np.nan, verbose=0)
    expect_all(model, 3)


@pytest.mark.slow_on("tensorflow")
def test_an_error_in_the_score_leaves_the_weights_as_before(files):
    model = small.model()
    before, calls = values_of(model), []

    def fails(model):
        calls.append(model)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return near(2.5)(model)

    with pytest.raises(KeyboardInterrupt):
        checkpoints.greedy_soup(model, files, fails, verbose=0)
    small.assert_same_bits(values_of(model), before)


@pytest.mark.slow_on("tensorflow")
@pytest.mark.parametrize("score", [[1.0, 2.0], None, "best", {"loss": 1.0}, True])
def test_a_score_that_is_not_a_number_is_refused(files, score):
    model = small.model()
    before = values_of(model)
    with pytest.raises(ValueError, match=r"must return a number.*0\.weights\.h5"):
        checkpoints.greedy_soup(model, files, lambda model: score, verbose=0)
    small.assert_same_bits(values_of(model), before)


@pytest.mark.slow_on("tensorflow")
def test_wrong_arguments_of_a_soup_are_refused(files):
    model = small.model()
    before = values_of(model)
    with pytest.raises(ValueError, match="'max' or 'min'"):
        checkpoints.greedy_soup(model, files, first, mode="auto")
    with pytest.raises(ValueError, match="`score` must be a function"):
        checkpoints.greedy_soup(model, files, "accuracy")
    with pytest.raises(ValueError, match="verbose"):
        checkpoints.greedy_soup(model, files, first, verbose="yes")
    with pytest.raises(ValueError, match="no file"):
        checkpoints.greedy_soup(model, [], first)
    with pytest.raises(ValueError, match=r"no file .*none\.keras"):
        checkpoints.greedy_soup(model, [*files, "none.keras"], first)
    small.assert_same_bits(values_of(model), before)


@pytest.mark.slow_on("tensorflow")
def test_the_error_names_a_cut_file_and_nothing_changes(files):
    model = small.model()
    before = values_of(model)
    files[2].write_bytes(files[2].read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"2\.weights\.h5"):
        checkpoints.greedy_soup(model, files, first, verbose=0)
    small.assert_same_bits(values_of(model), before)


@pytest.mark.slow_on("tensorflow")
def test_a_model_that_holds_averages_is_refused(files):
    model = small.fit(small.model(SWA("adam", 0, 2)))
    swap_weights(model)
    with pytest.raises(RuntimeError, match="holds the averages of 'SWA'"):
        checkpoints.greedy_soup(model, files, first, verbose=0)
