"""Averages the stores of the wrappers inside a ModelAverage over the workers.

The numbers of snapshots n are averaged too, so that all workers hold the same. A worker adds
nothing if its wrapper has no snapshot yet:

    kept <- sum(kept_r) / N,  n <- sum(n_r) / N      over the N workers r with n_r > 0

For some rules (those with a ring) the stores of two workers are comparable only if both have taken
equally many snapshots. For such a rule, the mean is taken only if that is so on all these workers.
Otherwise each worker keeps its own stores.
"""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
from keras import ops

from keras_avg import _backend
from keras_avg._workers import alike


def brought(wrapper: Any) -> list[Any]:
    """The arrays of a worker for a round: whether it has snapshots, their number, the stores."""
    count, kept = wrapper.num_snapshots, wrapper.kept_variables()
    has_any = np.array(count > 0, "float32")
    numbers = alike.with_squares([count])
    return [
        has_any,
        numbers,
        *(kept if count else [ops.zeros(v.shape, v.dtype) for v in kept]),
    ]


def take(wrapper: Any, sums: Iterator[Any]) -> None:
    """Set the stores and the number of snapshots from the sums of all workers' arrays."""
    workers = float(ops.convert_to_numpy(next(sums)))
    numbers = ops.convert_to_numpy(next(sums))
    kept = wrapper.kept_variables()
    kept_by_all = list(islice(sums, len(kept)))
    if workers and (wrapper.means_over_workers or alike.are_equal(numbers, workers)):
        _backend.assign_quotients(kept_by_all, workers, kept)
        count = round(float(alike.numbers_in(numbers[0])[0]) / workers)
        wrapper.count_snapshots(count - wrapper.num_snapshots)
