"""Power-function profiles, and the weighted sum of profiles that is nearest to another profile."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class Profile(NamedTuple):
    """The weights that an average at update `time` gives to the values of earlier updates.

    The density at update `tau` is `(gamma + 1) * tau ** gamma / time ** (gamma + 1)`.

    Attributes:
        gamma: Float >= 0.
        time: Number > 0, in updates since averaging began.
    """

    gamma: float
    time: float


class Combination(NamedTuple):
    """A weighted sum of profiles that replaces another profile, the target.

    Attributes:
        weights: Array of float64, one for each profile. Their sum is 1.
        relative_error: Float. The distance from the target, divided by the length of the target.
        sigma_rel: Float. The standard deviation of the weighted sum, as a share of the run.
    """

    weights: np.ndarray
    relative_error: float
    sigma_rel: float


# The paper minimizes  || target - sum of x_i p_i ||^2  over x. The solution solves  A x = b  with
# the inner products  A_ij = <p_i, p_j>  and  b_i = <p_i, target>. With s <= t, equation 151 is
#     <p_s, p_t> = (g_s + 1) (g_t + 1) / (g_s + g_t + 1) * (s / t) ** g_t / t.
# The lengths |p_i| grow without bound towards the beginning of a run, and this costs digits. So the
# profiles are divided by their lengths. Their inner products C and c are cosines, and x comes from
#     C y = c,   x_i = y_i * |target| / |p_i|.


def combine(profiles: Sequence[Profile], target: Profile) -> Combination:
    """The weighted sum of profiles that is nearest to a target. Its weights have the sum 1."""
    gammas, times = np.array(profiles, np.float64).T
    lengths = np.sqrt(_product(gammas, times, gammas, times))
    length = math.sqrt(_product(*target, *target))
    cosines = _product(gammas[:, None], times[:, None], gammas, times) / np.outer(lengths, lengths)
    to_target = _product(gammas, times, *target) / (lengths * length)
    solution, *_ = np.linalg.lstsq(cosines, to_target, rcond=None)
    weights = solution * length / lengths
    weights /= weights.sum()
    y = weights * lengths / length
    squared = 1.0 - 2.0 * y @ to_target + y @ cosines @ y
    error = math.sqrt(max(squared, 0.0))
    return Combination(weights, error, _sigma_rel(weights, gammas, times / target.time))


def _product(gamma_a: Any, time_a: Any, gamma_b: Any, time_b: Any) -> Any:
    """The integral of the product of two profiles. Arrays are broadcast."""
    first, last = np.minimum(time_a, time_b), np.maximum(time_a, time_b)
    gamma_of_last = np.where(time_a < time_b, gamma_b, gamma_a)
    scale = (gamma_a + 1.0) * (gamma_b + 1.0) / (gamma_a + gamma_b + 1.0)
    return scale * (first / last) ** gamma_of_last / last


def _sigma_rel(weights: np.ndarray, gammas: np.ndarray, times: np.ndarray) -> float:
    """The standard deviation of a weighted sum of profiles, from the moments of power functions."""
    mean = weights @ (times * (gammas + 1.0) / (gammas + 2.0))
    square = weights @ (times**2 * (gammas + 1.0) / (gammas + 3.0))
    return math.sqrt(max(square - mean**2, 0.0))
