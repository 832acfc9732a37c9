"""An average over a fixed share of the run so far."""

import math
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_avg import _backend, _checks
from keras_avg._types import Config, Tensor
from keras_avg.decays.decay import Decay

WIDEST = 12**-0.5  # sigma_rel of the plain mean


@keras.saving.register_keras_serializable(package="keras_avg")
class PowerFunction(Decay):
    """A power-function average: its length is a fixed share of the run so far.

    At update `t`, the value of update `tau` has a weight proportional to `tau ** gamma`. This
    curve of weights is called the profile. The length of the run need not be known beforehand. A
    new value enters the average with

        weight = 1 - (1 - period / t) ** (gamma + 1)

    and the first value has the weight 1. The factors `1 - weight` telescope. So an average
    with any period has the same profile, at the steps at which it takes a value. `gamma=0` gives
    the plain mean of all values.

    Give exactly one of the arguments. It determines the others.

    Args:
        sigma_rel: Number in (0, 12 ** -0.5], where 12 ** -0.5 is 0.2887. The standard deviation of
            the profile, as a share of the run so far. 0.05 and 0.10 are usual for diffusion models.
        gamma: Number >= 0. The exponent. It is 16.97 for `sigma_rel=0.05`, and 6.94 for 0.10.
        half_life_fraction: Number in (0, ln 2], where ln 2 is 0.6931. At update `t` the half-life
            is `half_life_fraction * t`. 0.05 is usual for pre-training at a constant learning rate.

    Attributes:
        gamma: Float.
        sigma_rel: Float.

    Raises:
        ValueError: If no argument or several are given, or if the argument is out of range.

    Example:

    ```python
    short, long = keras_avg.decays.PowerFunction(0.05), keras_avg.decays.PowerFunction(0.10)
    inner = keras_avg.MovingAverage("adam", average_decay=short)
    optimizer = keras_avg.MovingAverage(inner, average_decay=long)
    ```

    Reference:
        Karras et al., Analyzing and Improving the Training Dynamics of Diffusion Models,
        https://arxiv.org/abs/2312.02696, equations 121 to 127.
    """

    def __init__(
        self,
        sigma_rel: float | None = None,
        *,
        gamma: float | None = None,
        half_life_fraction: float | None = None,
    ) -> None:
        arguments = {
            "sigma_rel": sigma_rel,
            "gamma": gamma,
            "half_life_fraction": half_life_fraction,
        }
        given = {name: value for name, value in arguments.items() if value is not None}
        if len(given) != 1:
            raise ValueError(
                "PowerFunction takes exactly one of `sigma_rel`, `gamma` and "
                f"`half_life_fraction`. Received: {given or 'none of them'}."
            )
        ((name, value),) = given.items()
        self.gamma = {
            "sigma_rel": _from_sigma_rel,
            "gamma": _from_gamma,
            "half_life_fraction": _from_half_life_fraction,
        }[name](value)
        self.sigma_rel = _sigma_rel(self.gamma)
        self._given = {name: float(value)}

    # Equation 123 averages  theta(tau)  with the profile  tau ** gamma  over the time t so far:
    #     avg(t) = beta(t) * avg(t - 1) + (1 - beta(t)) * theta(t),
    #     beta(t) = (1 - 1 / t) ** (gamma + 1).
    # With a period of k updates, the average takes only the value of the last update of each
    # period. The k factors beta of a period telescope to
    #     ((t - k) / t) ** (gamma + 1).
    # For large t, 1 minus this is a small difference. So it is computed as
    #     -expm1((gamma + 1) * log1p(-k / t)).
    # Up to t = k there is no earlier value, so the weight must be 1. The formula gives that,
    # because  log1p(-1) = -inf.

    def value_weight(self, t: Tensor, period: int) -> float | Tensor:
        """The weight of the new value, in [0, 1]."""
        dtype = _backend.widest_float()
        updates = ops.cast(ops.maximum(t, period), dtype)
        return -ops.expm1((self.gamma + 1.0) * ops.log1p(-period / updates))

    def get_config(self) -> Config:
        """The arguments that construct an equal decay."""
        return dict(self._given)


def _from_sigma_rel(value: Any) -> float:
    sigma = _checks.number(value)
    if not 0.0 < sigma <= WIDEST * (1 + 1e-12):
        raise ValueError(
            f"`sigma_rel` must be a number in the range (0, 12 ** -0.5 = {WIDEST:.6f}]. Received: "
            f"sigma_rel={value!r}. Wider profiles than that of the plain mean have no power."
        )
    # gamma is a root of  (gamma + 2)^2 (gamma + 3) = (gamma + 1) / sigma^2.
    s = sigma**-2
    roots = np.roots([1.0, 7.0, 16.0 - s, 12.0 - s])
    return max(float(roots[np.abs(roots.imag) < 1e-6 * np.abs(roots)].real.max()), 0.0)


def _from_gamma(value: Any) -> float:
    gamma = _checks.number(value)
    if not 0.0 <= gamma < math.inf:
        raise ValueError(f"`gamma` must be a finite number >= 0. Received: gamma={value!r}.")
    return gamma


def _from_half_life_fraction(value: Any) -> float:
    fraction = _checks.number(value)
    if not 0.0 < fraction <= math.log(2.0):
        raise ValueError(
            f"`half_life_fraction` must be a number in the range (0, ln 2 = {math.log(2.0):.6f}]. "
            f"Received: half_life_fraction={value!r}."
        )
    # After a share f of the run, the average keeps  (1 - f) ** (gamma + 1).  For small f this is
    # about  exp(-f (gamma + 1)).  It must be 1 / 2.
    return math.log(2.0) / fraction - 1.0


def _sigma_rel(gamma: float) -> float:
    """The standard deviation of the profile tau ** gamma on [0, 1]."""
    return math.sqrt((gamma + 1.0) / (gamma + 3.0)) / (gamma + 2.0)
