"""Weights that imitate an annealing of the learning rate."""

import math

import numpy as np
import pytest

from keras_avg.checkpoints import merge_weights

CURVES = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "1-sqrt": lambda x: 1 - math.sqrt(x),
}
ROUNDING = 1e-14  # of a few operations in float64


def test_four_files_by_a_curve_one_can_do_in_ones_head():
    # At 0, 1/4, 1/2, 3/4 the square of 1 - x is 16, 9, 4, 1 sixteenths.
    weights = merge_weights(4, lambda x: (1 - x) ** 2)
    assert weights == [7 / 16, 5 / 16, 3 / 16, 1 / 16]


@pytest.mark.parametrize("number", [1, 2, 3, 7, 10, 49, 1000])
def test_linear_is_the_plain_mean_exactly(number):
    assert merge_weights(number) == [1 / number] * number
    assert merge_weights(number, decay="linear") == [1 / number] * number


@pytest.mark.parametrize("decay", CURVES)
@pytest.mark.parametrize("number", [1, 2, 5, 12])
def test_the_merge_is_the_run_with_the_annealed_rate(decay, number):
    """The first file, and the changes from file to file, each times the rate of its moment."""
    files = np.random.default_rng(0).normal(size=number)
    rates = [CURVES[decay](j / number) for j in range(number)]
    annealed = files[0] + sum(
        rate * change for rate, change in zip(rates[1:], np.diff(files), strict=True)
    )
    for weights in (merge_weights(number, decay), merge_weights(number, CURVES[decay])):
        assert len(weights) == number
        assert all(isinstance(weight, float) for weight in weights)
        assert np.dot(weights, files) == pytest.approx(annealed, abs=ROUNDING)
        assert math.fsum(weights) == pytest.approx(1, abs=ROUNDING)


def test_a_curve_may_be_flat_at_first():
    assert merge_weights(4, lambda x: min(1.0, 2 - 2 * x)) == [0, 0, 0.5, 0.5]


@pytest.mark.parametrize(
    ("decay", "match"),
    [
        (lambda x: 1 - 4 * x * (1 - x), r"decreasing.*0\.0 at 0\.5 and 0\.25 at 0\.75"),
        (lambda x: 1.0, "decreasing"),
        (lambda x: x, "begin at 1"),
        (lambda x: 1 + x, "range"),
        (lambda x: 0.1 * (1 - x), "begin at 1.*0.1 at 0.*Divide a learning rate"),
        (lambda x: 1 - 2 * x, r"range \[0, 1\].*-0.5 at 0.75"),
        (lambda x: math.nan if x else 1.0, "range.*nan at 0.25"),
        (lambda x: "1", "range.*'1' at 0"),
        ("sqrt", "'linear', 'cosine', '1-sqrt', or a function.*'sqrt'"),
        (None, "function"),
        (0.5, "function"),
    ],
)
def test_what_is_no_decay_is_refused(decay, match):
    with pytest.raises(ValueError, match=match):
        merge_weights(4, decay)


@pytest.mark.parametrize("number", [0, -1, 2.5, "3", None, True])
def test_what_is_no_number_of_files_is_refused(number):
    with pytest.raises(ValueError, match="number"):
        merge_weights(number)
