"""The averages by other formulas than the package's, in NumPy float64, from a whole trajectory.

A trajectory is the list of a variable's values: first the one before training, then one after each
real update. The package updates an average step by step; here it is written down at once.
"""

import numpy as np


def swa(trajectory, start, period):
    """Arithmetic mean of the snapshots; None where there is none."""
    snapshots = trajectory[1 + start :: period]
    return np.mean(np.asarray(snapshots, "float64"), axis=0) if len(snapshots) else None


def moving_average(trajectory, decays):
    """Sum of all values, each times its weight: (1 - d_i) and all later decays."""
    remaining = np.append(np.cumprod(np.asarray(decays, "float64")[::-1])[::-1], 1.0)
    weights = np.append(1.0, 1.0 - np.asarray(decays, "float64")) * remaining
    return np.tensordot(weights, np.asarray(trajectory, "float64"), axes=1)


def latest(trajectory, window, start, period):
    """Arithmetic mean of the last snapshots."""
    snapshots = np.asarray(trajectory[1 + start :: period], "float64")
    return np.mean(snapshots[-window:], axis=0)


def bema(trajectory, power=0.5, bias_power=0.2, lag=10.0, multiplier=1.0):
    """The weighted sum of all values, and a share of the way from the first to the last."""
    ages = lag + multiplier * np.arange(1.0, len(trajectory))
    values = np.asarray(trajectory, "float64")
    average = moving_average(trajectory, 1.0 - ages**-power)
    return average + ages[-1] ** -bias_power * (values[-1] - values[0])


def between(trajectory, interpolation, shares):
    """The average x behind values y that lie between x and z, without knowing z.

    y = b x + (1 - b) z  and  x = (1 - c) x' + c z,  with x' the x before, give
    x (1 + c b / (1 - b)) = (1 - c) x' + c y / (1 - b).
    """
    b, x = interpolation, np.asarray(trajectory[0], "float64")
    for y, c in zip(trajectory[1:], shares, strict=True):
        right = (1.0 - c) * x + c * np.asarray(y, "float64") / (1.0 - b)
        x = right / (1.0 + c * b / (1.0 - b))
    return x
