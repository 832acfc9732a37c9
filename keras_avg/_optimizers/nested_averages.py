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
    count, averages = wrapper.num_snapshots, _averages(wrapper)
    numbers = np.array([count > 0, *divmod(count, DIGIT)], "float32")
    return [numbers, *(averages if count else [ops.zeros(a.shape, a.dtype) for a in averages])]


def take(wrapper: Any, sums: Iterator[Any]) -> None:
    """What it goes on with, from the sums of what all have brought."""
    number, high, low = map(float, ops.convert_to_numpy(next(sums)))
    averages = _averages(wrapper)
    averages_of_all = list(islice(sums, len(averages)))
    if number:
        _backend.assign_quotients(averages_of_all, number, averages)
        count = round((DIGIT * high + low) / number)
        wrapper._snapshots.advance(count - wrapper.num_snapshots)


def _averages(wrapper: Any) -> list[Any]:
    return [average for average in wrapper._averages if average is not None]
