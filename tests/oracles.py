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
