"""Kills processes while they train and save, and checks the files that they wrote.

python campaign/kills.py [--kills 200] [--seed 0] [--only KIND]

A completely written file is never lost. Training that continues from a backup ends with the same
values as training without a kill. Keras' own callbacks are tried too, for comparison. Their
failures are counted, but are no error of this program.
"""

import argparse
import collections
import json
import multiprocessing
import os
import pathlib
import random
import signal
import sys
import tempfile
import time
import warnings

import keras
import numpy as np

import keras_avg
from keras_avg.callbacks import AverageModelCheckpoint, BackupAndRestore, SwapAverageWeights

EPOCHS, BATCHES, BATCH, UNITS = 3, 4, 4, 400  # a save takes about as long as the steps before
_random = np.random.default_rng(3)
X = _random.normal(size=(BATCH * BATCHES, 16)).astype("float32")
Y = X[:, :1]
# Torch starts its threads at its first computation. Before that, a process can be forked safely.
START = "fork" if keras.backend.backend() == "torch" else "spawn"

BACKUPS = {
    "ours, by epoch": lambda folder: BackupAndRestore(folder),
    "ours, by batch": lambda folder: BackupAndRestore(folder, save_freq=1),
    "ours, two of them": lambda folder: BackupAndRestore(folder, 3, double_checkpoint=True),
    "Keras', by epoch": lambda folder: keras.callbacks.BackupAndRestore(str(folder)),
    "Keras', by batch": lambda folder: keras.callbacks.BackupAndRestore(str(folder), 1),
}
FILES = {
    "AverageModelCheckpoint, model": lambda path: AverageModelCheckpoint(
        False, path.with_suffix(".keras"), save_freq=1
    ),
    "AverageModelCheckpoint, weights": lambda path: AverageModelCheckpoint(
        False, path.with_suffix(".weights.h5"), save_freq=1, save_weights_only=True
    ),
    "Keras' ModelCheckpoint": lambda path: keras.callbacks.ModelCheckpoint(
        path.with_suffix(".keras"), save_freq=1
    ),
}


class Tells(keras.callbacks.Callback):
    """Writes a marker file after the first save. The callbacks before this one have saved then."""

    def __init__(self, folder):
        super().__init__()
        self.mark = pathlib.Path(folder, "saved")

    def on_train_batch_end(self, batch, logs=None):
        self.mark.touch()


def build():
    keras.utils.set_random_seed(5)
    layers = [
        keras.Input((16,)),
        keras.layers.Dense(UNITS, activation="relu"),
        keras.layers.BatchNormalization(),
        keras.layers.Dropout(0.2, seed=2),
        keras.layers.Dense(UNITS),
        keras.layers.Dense(1),
    ]
    model = keras.Sequential(layers)
    optimizer = keras_avg.SWA(keras_avg.MovingAverage(keras.optimizers.Adam(0.001)), 1, 2)
    model.compile(optimizer, "mse")
    return model


def train(kind, folder, result=None):
    """The program of a process: it trains to the end, unless it is killed."""
    warnings.simplefilter("ignore")
    folder = pathlib.Path(folder)
    model = build()
    callbacks = [SwapAverageWeights()]
    if kind in BACKUPS:
        callbacks.append(BACKUPS[kind](folder / "backup"))
    elif kind in FILES:
        callbacks.append(FILES[kind](folder / "file"))
    callbacks.append(Tells(folder))
    how = {"batch_size": BATCH, "epochs": EPOCHS, "shuffle": False, "verbose": 0}
    model.fit(X, Y, callbacks=callbacks, **how)
    if result is not None:
        keras_avg.swap_weights(model)
        arrays = [*model.get_weights(), *model.optimizer.get_weights()]
        np.savez(result, *arrays)


def started(kind, folder, result):
    process = multiprocessing.get_context(START).Process(target=train, args=(kind, folder, result))
    process.start()
    return process


def seconds_to_the_end(kind, folder):
    began = time.perf_counter()
    started(kind, folder, None).join()
    return time.perf_counter() - began


def killed_after(process, seconds):
    """Kill the process after some time. Returns whether it was still running."""
    process.join(seconds)
    if process.exitcode is not None:
        return False
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    return True


def one_backup(kind, chance, seconds, undisturbed):
    """Kill training once or twice, then start it again and let it end."""
    with tempfile.TemporaryDirectory() as folder:
        result = pathlib.Path(folder, "result.npz")
        for _ in range(chance.choice([1, 1, 2])):
            if not killed_after(started(kind, folder, result), chance.uniform(0.1, 1.0) * seconds):
                break
        process = started(kind, folder, result)
        process.join(60 + 20 * seconds)
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            return "hangs"
        if process.exitcode or not result.exists():
            return "cannot be opened"
        with np.load(result) as found:
            same = [np.array_equal(found[name], undisturbed[name]) for name in undisturbed]
        return "ends where it would have" if all(same) else "ends elsewhere"


def one_file(kind, chance, seconds):
    """Kill training once. A file that was written before must still be complete."""
    with tempfile.TemporaryDirectory() as folder:
        killed_after(started(kind, folder, None), chance.uniform(0.1, 1.0) * seconds)
        if not pathlib.Path(folder, "saved").exists():
            return "killed before the first"
        (path,) = [p for p in pathlib.Path(folder).glob("file.*") if p.is_file()]
        model = build()
        model.optimizer.build(model.trainable_variables)
        try:
            model.load_weights(path)
            if path.suffix == ".keras":
                model = keras.saving.load_model(path)
        except Exception:
            return "cannot be opened"
        return "is whole"


def main():
    options = argparse.ArgumentParser()
    options.add_argument("--kills", type=int, default=200)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--only", default=None)
    options.add_argument("--seconds", type=float, default=float("inf"))
    chosen = options.parse_args()
    warnings.simplefilter("ignore")
    kinds = [k for k in [*BACKUPS, *FILES] if chosen.only is None or chosen.only in k]
    counts = {kind: collections.Counter() for kind in kinds}
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "undisturbed.npz")
        started("none", folder, path).join()
        with np.load(path) as arrays:
            undisturbed = {name: arrays[name] for name in arrays.files}
    began, seconds = time.perf_counter(), {}
    for number in range(chosen.kills):
        if time.perf_counter() - began > chosen.seconds:
            break
        kind, chance = kinds[number % len(kinds)], random.Random(chosen.seed + number)
        if kind not in seconds:
            with tempfile.TemporaryDirectory() as folder:
                seconds[kind] = seconds_to_the_end(kind, folder)
        if kind in BACKUPS:
            outcome = one_backup(kind, chance, seconds[kind], undisturbed)
        else:
            outcome = one_file(kind, chance, seconds[kind])
        counts[kind][outcome] += 1
    print(json.dumps({"backend": keras.backend.backend(), "seed": chosen.seed,
        "seconds": round(time.perf_counter() - began), "outcomes": counts}, indent=1))  # fmt: skip
    wrong = {"cannot be opened", "ends elsewhere", "hangs"}
    return any(wrong & set(found) for kind, found in counts.items() if not kind.startswith("Keras"))


if __name__ == "__main__":
    sys.exit(main())
