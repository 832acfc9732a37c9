"""Whole training steps in `fit`, as Keras compiles it by default.

For a tiny model, an average adds time on the host. For a larger model, it adds a share of the step.
The table also has the share that the limit implies: one sum over all parameters.
"""

import gc
import importlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import keras

from benchmarks import averages, measuring, models

LIMIT = "limit"
NAMES = (averages.BARE, averages.EMA, averages.PERIOD, averages.IDLE, averages.USE_EMA)


def measure(names: list[str], rounds: int) -> list[dict[str, Any]]:
    """One row for each model and average."""
    rows = []
    for name in names:
        for row in _rows(name, rounds):
            rows.append(row)
            print(row, flush=True)
        keras.utils.clear_session()
        gc.collect()
    return rows


def _rows(name: str, rounds: int) -> Iterator[dict[str, Any]]:
    _, data, batch_size, steps = models.MODELS[name]
    x, y = data(steps * batch_size)
    ways = averages.optimizers(keras.optimizers.Adam)
    fitted = {way: models.compiled(name, ways[way]()) for way in NAMES}
    averages.let_fit_again(fitted[averages.USE_EMA].optimizer)
    calls = {way: _fit(model, x, y, batch_size) for way, model in fitted.items()}
    count = sum(math.prod(v.shape) for v in fitted[averages.BARE].trainable_variables)
    framework = importlib.import_module(f"benchmarks.on_{averages.backend()}")
    seconds = measuring.interleaved(calls | {LIMIT: framework.triad(count)}, rounds)
    each = {way: [total / steps for total in seconds[way]] for way in NAMES}
    bare = measuring.summary(each[averages.BARE])["median"]
    limit = measuring.summary(seconds[LIMIT])["median"]
    for way in NAMES:
        if way != averages.BARE:
            added = measuring.added(each[way], each[averages.BARE])
            yield {
                "model": name,
                "parameters": count,
                "name": way,
                "added_us": {key: 1e6 * value for key, value in added.items()},
                "share": added["median"] / bare,
                "bare_us": 1e6 * bare,
                "implied_share": limit / bare,
            }


def _fit(model: keras.Model, x: Any, y: Any, batch_size: int) -> Callable[[], Any]:
    return lambda: model.fit(x, y, batch_size=batch_size, epochs=1, shuffle=False, verbose=0)
