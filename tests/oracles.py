"""Computes the averages by other formulas than the package, in NumPy float64.

A function takes a trajectory: the list of a variable's values before training and after each real
update. The package updates an average step by step. Here one formula gives the whole average.
"""

import numpy as np


def swa(trajectory, start, period):
    """Arithmetic mean of the snapshots, or None without a snapshot."""
    snapshots = trajectory[1 + start :: period]
    return np.mean(np.asarray(snapshots, "float64"), axis=0) if len(snapshots) else None


def moving_average(trajectory, decays):
    """Sum of all values times their weights. A weight is (1 - d_i) times all later decays."""
    remaining = np.append(np.cumprod(np.asarray(decays, "float64")[::-1])[::-1], 1.0)
    weights = np.append(1.0, 1.0 - np.asarray(decays, "float64")) * remaining
    return np.tensordot(weights, np.asarray(trajectory, "float64"), axes=1)


def latest(trajectory, window, start, period):
    """Arithmetic mean of the last snapshots."""
    snapshots = np.asarray(trajectory[1 + start :: period], "float64")
    return np.mean(snapshots[-window:], axis=0)


def bema(trajectory, power=0.5, bias_power=0.2, lag=10.0, multiplier=1.0):
    """The weighted sum of all values, plus a share of the difference of the last and the first."""
    ages = lag + multiplier * np.arange(1.0, len(trajectory))
    values = np.asarray(trajectory, "float64")
    average = moving_average(trajectory, 1.0 - ages**-power)
    return average + ages[-1] ** -bias_power * (values[-1] - values[0])


def between(trajectory, interpolation, shares):
    """The average x, computed from the values y alone. y lies between x and z.

    Let x' be the previous x. From  y = b x + (1 - b) z  and  x = (1 - c) x' + c z  follows
    x (1 + c b / (1 - b)) = (1 - c) x' + c y / (1 - b),  which does not contain z.
    """
    b, x = interpolation, np.asarray(trajectory[0], "float64")
    for y, c in zip(trajectory[1:], shares, strict=True):
        right = (1.0 - c) * x + c * np.asarray(y, "float64") / (1.0 - b)
        x = right / (1.0 + c * b / (1.0 - b))
    return x
