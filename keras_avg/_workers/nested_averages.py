"""What wrappers inside a ModelAverage keep, which takes the mean over the workers.

A worker whose wrapper has no snapshot yet adds nothing. Numbers of snapshots n take the mean as
well, so that all workers hold the same:

    kept <- sum(kept_r) / N,  n <- sum(n_r) / N      over the N workers r with n_r > 0

A rule whose stores are of one kind only after as many snapshots (a ring) takes the mean only where
all these workers have taken as many. Else each worker keeps its own.
"""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
from keras import ops

from keras_avg import _backend
from keras_avg._workers import alike


def brought(wrapper: Any) -> list[Any]:
    """What a worker brings to a round: whether it has snapshots, how many, and what is kept."""
    count, kept = wrapper.num_snapshots, _kept(wrapper)
    has_any = np.array(count > 0, "float32")
    numbers = alike.with_squares([count])
    return [
        has_any,
        numbers,
        *(kept if count else [ops.zeros(v.shape, v.dtype) for v in kept]),
    ]


def take(wrapper: Any, sums: Iterator[Any]) -> None:
    """What it goes on with, from the sums of what all have brought."""
    workers = float(ops.convert_to_numpy(next(sums)))
    numbers = ops.convert_to_numpy(next(sums))
    kept = _kept(wrapper)
    kept_by_all = list(islice(sums, len(kept)))
    if workers and (wrapper.means_over_workers or alike.are_equal(numbers, workers)):
        _backend.assign_quotients(kept_by_all, workers, kept)
        count = round(float(alike.numbers_in(numbers[0])[0]) / workers)
        wrapper.count_snapshots(count - wrapper.num_snapshots)


def _kept(wrapper: Any) -> list[Any]:
    return [variable for store in wrapper.kept.values() for variable in store.kept]
