"""Power-function profiles, and how well some of them make up another."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class Profile(NamedTuple):
    """How much an average at update `time` counts the values of the updates before it.

    The density at update `tau` is `(gamma + 1) * tau ** gamma / time ** (gamma + 1)`.

    Attributes:
        gamma: Float >= 0.
        time: Number > 0, in updates since averaging began.
    """

    gamma: float
    time: float


class Combination(NamedTuple):
    """A weighted sum of profiles in the place of another.

    Attributes:
        weights: Array of float64, one for each profile, with the sum 1.
        relative_error: Float. The distance from the profile that was wanted, over its own length.
        sigma_rel: Float. The standard deviation of the sum, as a share of the run.
    """

    weights: np.ndarray
    relative_error: float
    sigma_rel: float


# The paper minimizes  || target - sum of x_i p_i ||^2  over x, which is  A x = b  with the inner
# products  A_ij = <p_i, p_j>  and  b_i = <p_i, target>. With s <= t, equation 151 is
#     <p_s, p_t> = (g_s + 1) (g_t + 1) / (g_s + g_t + 1) * (s / t) ** g_t / t.
# The lengths |p_i| grow towards the beginning of a run without bound, which costs digits. Of
# profiles of length 1 the products are cosines; their least-squares solution is that of
#     C y = c,   x_i = y_i * |target| / |p_i|.


def combine(profiles: Sequence[Profile], target: Profile) -> Combination:
    """The weighted sum of profiles that is nearest to a target, weights divided by their sum."""
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
    """The integral of two profiles' product. Arrays are broadcast."""
    first, last = np.minimum(time_a, time_b), np.maximum(time_a, time_b)
    gamma_of_last = np.where(time_a < time_b, gamma_b, gamma_a)
    scale = (gamma_a + 1.0) * (gamma_b + 1.0) / (gamma_a + gamma_b + 1.0)
    return scale * (first / last) ** gamma_of_last / last


def _sigma_rel(weights: np.ndarray, gammas: np.ndarray, times: np.ndarray) -> float:
    """The standard deviation of a sum of profiles, whose moments are those of powers."""
    mean = weights @ (times * (gammas + 1.0) / (gammas + 2.0))
    square = weights @ (times**2 * (gammas + 1.0) / (gammas + 3.0))
    return math.sqrt(max(square - mean**2, 0.0))
