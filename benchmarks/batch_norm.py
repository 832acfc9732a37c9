"""`update_batch_norm` compared with `predict` on the same batches."""

import functools
from typing import Any

import keras

import keras_avg
from benchmarks import averages, measuring, models

BATCH_SIZES = (32, 128)
BATCHES = 10


def measure(rounds: int) -> list[dict[str, Any]]:
    """One row for each batch size."""
    rows = []
    for batch_size in BATCH_SIZES:
        model = models.compiled("convolution", keras.optimizers.SGD(1e-3))
        x, _ = models.pictures(BATCHES * batch_size)
        how = {"batch_size": batch_size, "verbose": 0}
        calls = {
            "predict": functools.partial(model.predict, x, **how),
            "update": functools.partial(keras_avg.update_batch_norm, model, x, **how),
        }
        seconds = measuring.interleaved(calls, rounds)
        rows.append(
            {
                "batch_size": batch_size,
                "ratio": measuring.ratio(seconds["update"], seconds["predict"]),
                "predict_ms": 1000 * measuring.summary(seconds["predict"])["median"],
            }
        )
        print(averages.backend(), rows[-1], flush=True)
    return rows
