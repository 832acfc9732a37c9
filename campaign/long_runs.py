"""Trains for many steps, with swaps, and checks that memory and open files do not grow.

python campaign/long_runs.py [--steps 100000]

Memory, live arrays and open files do not grow. float64 averages with a snapshot at every step equal
those of NumPy float64, and float32 ones stay within the bound of docs/precision.md. Counters work
across 2**24, where float32 cannot count, and near 2**31.
"""

import argparse
import gc
import json
import os
import sys
import time
import warnings

import keras
import numpy as np
from keras import ops

import keras_avg

LOOKS = 20  # measurements of the process in the whole run
MEGABYTES = 32  # the most that an allocator may add in the whole run
DECAY = 0.999
TOLERANCE = 1e-9  # of a float64 average, relative to 1 plus its value
HALF_A_UNIT = 2**-24  # the largest relative error of one rounding to float32


def build(optimizer):
    keras.utils.set_random_seed(3)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(1)])
    model.compile(optimizer, "mse")
    return model


def megabytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def open_files():
    return len(os.listdir("/proc/self/fd"))


def live_arrays():
    """The number of tensors of the framework that Python knows."""
    gc.collect()
    if keras.backend.backend() == "jax":
        import jax

        return len(jax.live_arrays())
    kind = type(ops.convert_to_tensor([0.0]))
    return sum(isinstance(each, kind) for each in gc.get_objects())


def numpy(variable):
    return np.array(ops.convert_to_numpy(variable), dtype="float64")


def largest_error(wrapper, rights):
    pairs = zip(wrapper.averages(), rights, strict=True)
    return max(float(np.max(np.abs(numpy(a) - right) / (1 + np.abs(right)))) for a, right in pairs)


def long_run(steps):
    sgd = keras.optimizers.SGD(1e-3, momentum=0.5)
    optimizer = keras_avg.SWA(keras_avg.MovingAverage(sgd, average_decay=DECAY), 0, 1)
    if keras.backend.backend() != "jax":  # JAX has no float64 here.
        optimizer = keras_avg.SWA(optimizer, 0, 1, average_dtype="float64")
    model = build(optimizer)
    random = np.random.default_rng(0)
    x = random.normal(size=(64, 4)).astype("float32")
    y = x.sum(axis=1, keepdims=True)
    total = [np.zeros(v.shape) for v in model.trainable_variables]
    moving, looks, began = None, [], time.perf_counter()
    for step in range(steps):
        rows = slice(8 * (step % 8), 8 * (step % 8) + 8)
        if moving is None:
            moving = [numpy(v) for v in model.trainable_variables]
        model.train_on_batch(x[rows], y[rows])
        values = [numpy(v) for v in model.trainable_variables]
        total = [t + v for t, v in zip(total, values, strict=True)]
        moving = [m + (1 - DECAY) * (v - m) for m, v in zip(moving, values, strict=True)]
        if step % 10 == 9:
            keras_avg.swap_weights(model)
            keras_avg.swap_weights(model)
        if (step + 1) % max(1, steps // LOOKS) == 0:
            looks.append((megabytes(), live_arrays(), open_files()))
    *means, average = keras_avg.averaging_optimizers(model)
    assert all(swa.num_snapshots == steps for swa in means)
    mean = [t / steps for t in total]
    off = {f"SWA, {swa.average_dtype or 'float32'}": largest_error(swa, mean) for swa in means}
    off["MovingAverage, float32"] = largest_error(average, moving)
    bounds = {
        "SWA, float64": TOLERANCE,
        "SWA, float32": HALF_A_UNIT * steps / 2,
        "MovingAverage, float32": HALF_A_UNIT / (1 - DECAY),
    }
    half = len(looks) // 2
    earlier, later = zip(*looks[1:half], strict=True), zip(*looks[half:], strict=True)
    grown = [max(last) - max(first) for first, last in zip(earlier, later, strict=True)]
    figures = {"steps": steps, "seconds": round(time.perf_counter() - began),
        "averages off by": off, "megabytes more": round(grown[0], 1),
        "arrays more": grown[1], "files more": grown[2]}  # fmt: skip
    assert all(off[name] <= bounds[name] for name in off), figures
    assert grown[0] <= MEGABYTES, figures
    assert max(grown[1:]) <= 0, figures
    return figures


def counters():
    """Counts snapshots and steps near the limits of float32 and of int32."""
    found = {}
    for start in (2**24 - 3, 2**31 - 6):
        model = build(keras_avg.SWA(keras.optimizers.SGD(1e-3), 0, 1))
        x = np.ones((2, 4), "float32")
        model.train_on_batch(x, x[:, :1])
        optimizer = model.optimizer
        weights = optimizer.get_weights()
        for place, variable in enumerate(optimizer.variables):
            if "int" in keras.backend.standardize_dtype(variable.dtype) and weights[place] == 1:
                weights[place] = np.array(start, weights[place].dtype)
        optimizer.set_weights(weights)
        for _ in range(4):
            model.train_on_batch(x, x[:, :1])
        found[str(start)] = [optimizer.num_snapshots - start, int(optimizer.iterations) - start]
        assert found[str(start)] == [4, 4], found
        assert all(np.all(np.isfinite(numpy(a))) for a in optimizer.averages())
    return found


def main():
    options = argparse.ArgumentParser()
    options.add_argument("--steps", type=int, default=100_000)
    chosen = options.parse_args()
    warnings.simplefilter("ignore")
    result = {"backend": keras.backend.backend(), "counters": counters()}
    print(json.dumps(result | long_run(chosen.steps)))


if __name__ == "__main__":
    sys.exit(main())
