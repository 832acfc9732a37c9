"""The table of wrappers that the contract tests, and the inner optimizers that it tries.

A new wrapper needs one row here. Then every test that uses `WRAPPERS` covers it: training,
averages, files, configs, traces, swaps, low precision, non-finite values and devices.
"""

from collections.abc import Callable
from typing import NamedTuple

import keras
import numpy as np
import oracles
import pytest
from keras import optimizers

from keras_avg import (
    BEMA,
    LAWA,
    SWA,
    SWAG,
    Lookahead,
    ModelAverage,
    MovingAverage,
    PrimalAverage,
    ScheduleFree,
)


class Row(NamedTuple):
    """What the contract must know about a wrapper, or about nested wrappers.

    Attributes:
        make: Function of the inner optimizer, and of keywords for the outermost wrapper.
        shown: A function for each wrapper, the outermost first. It takes a variable's trajectory
            (its values before training and after each update). It returns the value that the
            swapped model must hold, by another formula than the package.
        snapshots: For each wrapper, the number of averagings in six updates.
        is_transparent: Whether the wrapper leaves training unchanged.
    """

    make: Callable
    shown: list[Callable]
    snapshots: list[int]
    is_transparent: bool = True


def warm_up(updates):
    return [min(0.9, (1 + s) / (10 + s)) for s in range(updates)]


def last_synchronized(trajectory):
    """The value after the last round. With a step size of 1 or one worker, the center equals it."""
    return trajectory[(len(trajectory) - 1) // 3 * 3]


def swa_of_variables(trajectory):
    return oracles.swa(trajectory, start=1, period=2)


def warm_moving_average(trajectory):
    return oracles.moving_average(trajectory, warm_up(len(trajectory) - 1))


def warm(inner, **keywords):
    return MovingAverage(inner, average_decay=0.9, dynamic_decay=True, **keywords)


WRAPPERS = {
    "SWA": Row(
        lambda inner, **kw: SWA(inner, start_averaging=1, average_period=2, **kw),
        [swa_of_variables],
        [3],
    ),
    "MovingAverage": Row(warm, [warm_moving_average], [6]),
    "SWA of MovingAverage": Row(
        lambda inner, **kw: SWA(warm(inner), 1, 2, **kw),
        [swa_of_variables, warm_moving_average],
        [3, 6],
    ),
    "Lookahead": Row(
        lambda inner, **kw: Lookahead(inner, sync_period=3, slow_step_size=1.0, **kw),
        [last_synchronized],
        [2],
    ),
    "ModelAverage": Row(
        lambda inner, **kw: ModelAverage(inner, interval_steps=3, **kw),
        [last_synchronized],
        [2],
    ),
    "LAWA": Row(
        lambda inner, **kw: LAWA(inner, 2, 1, 2, **kw),
        [lambda trajectory: oracles.latest(trajectory, window=2, start=1, period=2)],
        [3],
    ),
    "SWAG": Row(
        lambda inner, **kw: SWAG(inner, 1, 2, rank=2, **kw),
        [swa_of_variables],
        [3],
    ),
    "BEMA": Row(BEMA, [oracles.bema], [6]),
    "ScheduleFree": Row(
        ScheduleFree,
        [lambda y: oracles.between(y, 0.9, 1.0 / np.arange(1, len(y)))],
        [6],
        is_transparent=False,
    ),
    "PrimalAverage": Row(
        lambda inner, **kw: PrimalAverage(inner, average_decay=0.9, **kw),
        [lambda y: oracles.between(y, 0.7, [0.1] * (len(y) - 1))],
        [6],
        is_transparent=False,
    ),
}

INNER = {
    "adam": lambda: optimizers.Adam(0.01),
    "accumulation": lambda: optimizers.Adam(0.01, gradient_accumulation_steps=2),
    "nesterov": lambda: optimizers.SGD(0.05, momentum=0.9, nesterov=True),
    "adamw": lambda: optimizers.AdamW(0.01, weight_decay=0.1),
    "adafactor": lambda: optimizers.Adafactor(0.01),
    "muon": lambda: optimizers.Muon(0.01),
    "lion": lambda: optimizers.Lion(0.01),
    "ftrl": lambda: optimizers.Ftrl(0.05),
    "clipping": lambda: optimizers.Adam(0.01, global_clipnorm=0.5),
    "weight decay": lambda: optimizers.SGD(0.05, weight_decay=0.1),
    "loss scale": lambda: optimizers.Adam(0.01, loss_scale_factor=1024.0),
    "schedule": lambda: optimizers.SGD(optimizers.schedules.CosineDecay(0.1, 8)),
}
NEST = "SWA of MovingAverage"  # It has both kinds of average.


def tier(row, kind):
    """The quick tests try every wrapper around Adam, and the nested wrappers around all."""
    return () if kind == "adam" or row == NEST else pytest.mark.thorough


def pairs(rows=tuple(WRAPPERS)):
    """Pairs of a wrapper and an inner optimizer. Most of them are for the thorough tests."""
    return [
        pytest.param((row, kind), id=f"{row}-{kind}", marks=tier(row, kind))
        for row in rows
        for kind in INNER
    ]


each_wrapper = pytest.mark.parametrize("wrapper", WRAPPERS)
TRANSPARENT = tuple(name for name, row in WRAPPERS.items() if row.is_transparent)


def wrapped(wrapper, inner):
    return WRAPPERS[wrapper].make(INNER[inner]())


def chain(optimizer):
    """The nested wrappers, the outermost first, and the optimizer inside."""
    links = [optimizer]
    while hasattr(links[-1], "inner_optimizer"):
        links.append(links[-1].inner_optimizer)
    return links[:-1], links[-1]


def shown(optimizer):
    """The values that a wrapper shows, as arrays, one for each averaged variable."""
    return [np.array(keras.ops.convert_to_numpy(a), copy=True) for a in optimizer.averages()]
