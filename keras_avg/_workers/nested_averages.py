"""Averages that wrappers inside a ModelAverage keep, which take the mean over the workers.

A worker whose wrapper has no snapshot yet adds nothing to them. Numbers of snapshots n take the
mean as well, so that all workers hold the same:

    average <- sum(average_r) / N,  n <- sum(n_r) / N      over the N workers r with n_r > 0
"""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
from keras import ops

from keras_avg import _backend

DIGIT = 4096  # float32 stops counting at 2^24, so counts travel as two of these


def brought(wrapper: Any) -> list[Any]:
    """What a worker brings to a round: whether it has snapshots, how many, and the averages."""
    count, kept = wrapper.num_snapshots, _kept(wrapper)
    numbers = np.array([count > 0, *divmod(count, DIGIT)], "float32")
    return [numbers, *(kept if count else [ops.zeros(v.shape, v.dtype) for v in kept])]


def take(wrapper: Any, sums: Iterator[Any]) -> None:
    """What it goes on with, from the sums of what all have brought."""
    number, high, low = map(float, ops.convert_to_numpy(next(sums)))
    kept = _kept(wrapper)
    kept_by_all = list(islice(sums, len(kept)))
    if number:
        _backend.assign_quotients(kept_by_all, number, kept)
        count = round((DIGIT * high + low) / number)
        wrapper.count_snapshots(count - wrapper.num_snapshots)


def _kept(wrapper: Any) -> list[Any]:
    return [variable for store in wrapper.kept.values() for variable in store.kept]
