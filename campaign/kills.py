"""Kills processes while they train and save, and checks the files that they wrote.

python campaign/kills.py [--kills 200] [--seed 0] [--only KIND]

A completely written file is never lost. Training that continues from a backup ends with the same
values as training without a kill. Keras' own callbacks are tried too, for comparison. Their
failures are counted, but are no error of this program.
"""

import argparse
import collections
import functools
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
from typing import NamedTuple

import h5py
import keras
import killed_jobs
import numpy as np

import keras_avg
from keras_avg.callbacks import (
    AverageModelCheckpoint,
    BackupAndRestore,
    SaveAverages,
    SwapAverageWeights,
)

AFTER_FIRST_SAVE = 0.85  # the share of kills that wait for the first save
EPOCHS, BATCHES, BATCH, UNITS = 3, 4, 4, 400  # a save takes about as long as the steps before
_random = np.random.default_rng(3)
X = _random.normal(size=(BATCH * BATCHES, 16)).astype("float32")
Y = X[:, :1]
# A server that has imported everything starts the processes. It computes nothing, because a process
# whose framework has started its threads cannot be forked safely.
START = multiprocessing.get_context("forkserver")

BACKUPS = {
    "ours, by epoch": lambda folder: [BackupAndRestore(folder / "backup")],
    "ours, by batch": lambda folder: [BackupAndRestore(folder / "backup", save_freq=1)],
    "ours, two of them": lambda folder: [
        BackupAndRestore(folder / "backup", 3, double_checkpoint=True)
    ],
    "ours, with SaveAverages": lambda folder: [
        SaveAverages(folder / "averages", every_steps=2, dtype="float32"),
        BackupAndRestore(folder / "backup", save_freq=1),
    ],
    "Keras', by epoch": lambda folder: [keras.callbacks.BackupAndRestore(str(folder / "backup"))],
    "Keras', by batch": lambda folder: [
        keras.callbacks.BackupAndRestore(str(folder / "backup"), 1)
    ],
}
FILES = {
    "AverageModelCheckpoint, model": lambda folder: [
        AverageModelCheckpoint(False, folder / "file.keras", save_freq=1)
    ],
    "AverageModelCheckpoint, weights": lambda folder: [
        AverageModelCheckpoint(
            False, folder / "file.weights.h5", save_freq=1, save_weights_only=True
        )
    ],
    "SaveAverages": lambda folder: [SaveAverages(folder / "file", every_steps=1)],
    "Keras' ModelCheckpoint": lambda folder: [
        keras.callbacks.ModelCheckpoint(folder / "file.keras", save_freq=1)
    ],
}
JOBS = {"ours, of two workers": killed_jobs.one}


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
    inner = keras_avg.MovingAverage(
        keras.optimizers.Adam(0.001), average_decay=keras_avg.decays.PowerFunction(0.1)
    )
    optimizer = keras_avg.SWA(inner, 1, 2)
    model.compile(optimizer, "mse")
    return model


def train(kind, folder, result=None):
    """The program of a process: it trains to the end, unless it is killed."""
    warnings.simplefilter("ignore")
    folder = pathlib.Path(folder)
    model = build()
    own = (BACKUPS | FILES).get(kind, lambda folder: [])(folder)
    callbacks = [SwapAverageWeights(), *own, Tells(folder)]
    how = {"batch_size": BATCH, "epochs": EPOCHS, "shuffle": False, "verbose": 0}
    model.fit(X, Y, callbacks=callbacks, **how)
    if result is not None:
        keras_avg.swap_weights(model)
        arrays = [*model.get_weights(), *model.optimizer.get_weights()]
        for saved in sorted(folder.glob("averages/*.h5")):
            arrays += arrays_in(saved)
        np.savez(result, *arrays)


def arrays_in(path):
    """All arrays of a file of averages."""
    found = []
    with h5py.File(path) as file:
        file.visititems(
            lambda name, each: found.append(each[...]) if hasattr(each, "shape") else None
        )
    return found


def started(kind, folder, result):
    process = START.Process(target=train, args=(kind, folder, result))
    process.start()
    return process


class Times(NamedTuple):
    """Seconds of a training that is not killed: until its first save, and from there to its end."""

    first: float
    rest: float


def killed(kind, folder, result, chance, times):
    """Start a training and kill it, mostly after its first save. Returns whether it was killed."""
    mark = pathlib.Path(folder, "saved")
    mark.unlink(missing_ok=True)
    process = started(kind, folder, result)
    left = times.first
    if chance.random() < AFTER_FIRST_SAVE:
        while process.exitcode is None and not mark.exists():
            time.sleep(0.002)
        left = times.rest
    process.join(chance.uniform(0, left))
    if process.exitcode is not None:
        return False
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    return True


def one_backup(kind, chance, times, undisturbed):
    """Kill training once or twice, then start it again and let it end."""
    with tempfile.TemporaryDirectory() as folder:
        result = pathlib.Path(folder, "result.npz")
        for _ in range(chance.choice([1, 1, 2])):
            if not killed(kind, folder, result, chance, times):
                break
        process = started(kind, folder, result)
        process.join(60 + 20 * sum(times))
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            return "hangs"
        if process.exitcode or not result.exists():
            return "cannot be opened"
        found = read(result)
    same = found.keys() == undisturbed.keys() and all(
        np.array_equal(found[name], undisturbed[name]) for name in undisturbed
    )
    return "ends where it would have" if same else "ends elsewhere"


def read(path):
    with np.load(path) as arrays:
        return {name: arrays[name] for name in arrays.files}


def one_file(kind, chance, times):
    """Kill training once. A file that was written before must still be complete."""
    with tempfile.TemporaryDirectory() as folder:
        killed(kind, folder, None, chance, times)
        if not pathlib.Path(folder, "saved").exists():
            return "killed before the first"
        model = build()
        model.optimizer.build(model.trainable_variables)
        try:
            open_all(model, pathlib.Path(folder))
        except Exception:
            return "cannot be opened"
        return "is whole"


def open_all(model, folder):
    if kept := sorted(folder.glob("file/averages-*.h5")):
        for path in kept:
            arrays_in(path)
        keras_avg.checkpoints.synthesize(model, folder / "file", 0.12, verbose=0)
        return
    (path,) = [p for p in folder.glob("file.*") if p.is_file()]
    model.load_weights(path)
    if path.suffix == ".keras":
        keras.saving.load_model(path)


class Alone:
    """Kills single processes. Measures first how long each kind takes without a kill.

    Args:
        plain: Dict of the arrays of training without callbacks that write files.
    """

    def __init__(self, plain):
        self.plain, self.times, self.undisturbed = plain, {}, {}

    def one(self, kind, chance):
        if kind not in self.times:
            with tempfile.TemporaryDirectory() as folder:
                began, path = time.perf_counter(), pathlib.Path(folder, "undisturbed.npz")
                process = started(kind, folder, path)
                while not pathlib.Path(folder, "saved").exists():
                    time.sleep(0.002)
                first = time.perf_counter()
                process.join()
                self.times[kind] = Times(first - began, time.perf_counter() - first)
                self.undisturbed[kind] = found = read(path)
            same = [np.array_equal(found[name], self.plain[name]) for name in self.plain]
            assert all(same), f"the callbacks of {kind!r} change training"
        if kind in FILES:
            return one_file(kind, chance, self.times[kind])
        return one_backup(kind, chance, self.times[kind], self.undisturbed[kind])


def main():
    options = argparse.ArgumentParser()
    options.add_argument("--kills", type=int, default=200)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--only", default=None)
    options.add_argument("--seconds", type=float, default=float("inf"))
    chosen = options.parse_args()
    warnings.simplefilter("ignore")
    kinds = [k for k in [*BACKUPS, *FILES, *JOBS] if chosen.only is None or chosen.only in k]
    counts = {kind: collections.Counter() for kind in kinds}
    START.set_forkserver_preload(["keras_avg.callbacks", "h5py"])
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "plain.npz")
        started("none", folder, path).join()  # The first process waits for the server's imports.
        alone = Alone(read(path))
    began = time.perf_counter()
    for number in range(chosen.kills):
        if time.perf_counter() - began > chosen.seconds:
            break
        kind, chance = kinds[number % len(kinds)], random.Random(chosen.seed + number)
        one = JOBS.get(kind, functools.partial(alone.one, kind))
        counts[kind][one(chance)] += 1
    print(json.dumps({"backend": keras.backend.backend(), "seed": chosen.seed,
        "seconds": round(time.perf_counter() - began), "outcomes": counts}, indent=1))  # fmt: skip
    wrong = {"cannot be opened", "ends elsewhere", "hangs"}
    return any(wrong & set(found) for kind, found in counts.items() if not kind.startswith("Keras"))


if __name__ == "__main__":
    sys.exit(main())
