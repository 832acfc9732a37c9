"""The table of wrappers that the contract is about, and the inner optimizers that it tries.

A new wrapper is admitted with one row here. Every test that goes through `WRAPPERS` then covers it:
training, averages, files, configs, traces, swaps, low precision, non-finite values and devices.
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
    """What the contract has to know of a wrapper, or of a nest of them.

    Attributes:
        make: Function of the inner optimizer, and of keywords for the outermost wrapper.
        shown: For each wrapper, outermost first: a function of a variable's trajectory (its value
            before training, then after each update) that gives what is shown of it, by another
            formula than the package's.
        snapshots: For each wrapper: how many averagings six updates bring.
        is_transparent: Whether training is that of the inner optimizer.
    """

    make: Callable
    shown: list[Callable]
    snapshots: list[int]
    is_transparent: bool = True


def warm_up(updates):
    return [min(0.9, (1 + s) / (10 + s)) for s in range(updates)]


def last_synchronized(trajectory):
    """With a step size of 1, and with one worker, what flows back is what was there."""
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
# Every wrapper around the first, and the nest around all three, in the quick tests. The thorough
# tests take the rest of the product.
ALWAYS = ("adam", "accumulation", "nesterov")
NEST = "SWA of MovingAverage"  # both kinds of average at once


def product(rows=tuple(WRAPPERS), inner=tuple(INNER)):
    """Pairs of a wrapper and an inner optimizer; most are for the thorough tests."""
    return pytest.mark.parametrize(
        ("wrapper", "inner"),
        [
            pytest.param(
                row,
                kind,
                id=f"{row}-{kind}",
                marks=() if kind in ALWAYS[: 3 if row == NEST else 1] else pytest.mark.thorough,
            )
            for row in rows
            for kind in inner
        ],
    )


each_wrapper = pytest.mark.parametrize("wrapper", WRAPPERS)
TRANSPARENT = tuple(name for name, row in WRAPPERS.items() if row.is_transparent)


def wrapped(wrapper, inner):
    return WRAPPERS[wrapper].make(INNER[inner]())


def chain(optimizer):
    """The wrappers of a nest, outermost first, and the optimizer inside."""
    links = [optimizer]
    while hasattr(links[-1], "inner_optimizer"):
        links.append(links[-1].inner_optimizer)
    return links[:-1], links[-1]


def shown(optimizer):
    """What a wrapper shows, as arrays, one for each variable that it averages."""
    return [np.array(keras.ops.convert_to_numpy(a), copy=True) for a in optimizer.averages()]
