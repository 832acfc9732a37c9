"""A worker that fits a linear model on its shard, and prints the result.

python train.py '{"batches": [20, 20], ...}'; the options are the keys of `DEFAULTS`.
"""

import json
import os
import pathlib
import signal
import sys
import time

import keras
import numpy as np

import keras_avg

DEFAULTS = {
    "batches": [20, 20],  # batches in an epoch, by rank
    "epochs": 1,
    "inner": {"learning_rate": 0.05, "momentum": 0.9},
    "outer": None,
    "interval": 3,
    "callback": True,
    "steps_per_execution": 1,
    "units": [1],  # units of the model, by rank. The list is repeated.
    "num_worker": None,
    "timeout": 60,
    "folder": None,  # the folder for backups and files
    "failing": None,  # [rank or ranks, "kill" or "stall", number of batches before]
    "slow": None,  # [rank, seconds that each batch takes longer]
    "save_freq": "epoch",
    "swap": False,
}
FEATURES, BATCH = 4, 8


def shard(rank, batches):
    random = np.random.default_rng(rank)
    x = random.normal(size=(batches * BATCH, FEATURES)).astype("float32")
    y = x.sum(axis=1, keepdims=True) + rank + 0.1 * random.normal(size=(len(x), 1))
    return x, y.astype("float32")


class Fails(keras.callbacks.Callback):
    """Fails once. When the job is started again, it finds the mark of the first failure."""

    def __init__(self, fault, after, mark):
        super().__init__()
        self.fault, self.left, self.mark = fault, after, mark

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if self.left == 0 and not self.mark.exists():
            self.mark.touch()
            if self.fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(600)


class IsSlow(keras.callbacks.Callback):
    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds

    def on_train_batch_end(self, batch, logs=None):
        time.sleep(self.seconds)


def callbacks(options, communicator):
    if options["callback"]:
        yield keras_avg.callbacks.SynchronizeWorkers()
    if options["swap"]:
        yield keras_avg.callbacks.SwapAverageWeights()
    folder = options["folder"] and pathlib.Path(options["folder"])
    if folder:
        yield keras_avg.callbacks.BackupAndRestore(
            folder / f"backup_{communicator.rank}", options["save_freq"]
        )
    if options["slow"] and options["slow"][0] == communicator.rank:
        yield IsSlow(options["slow"][1])
    if options["failing"] and communicator.rank in np.ravel(options["failing"][0]):
        yield Fails(*options["failing"][1:], folder / f"failed_{communicator.rank}")


def only_join(model):
    """What a worker without data does, because Keras refuses to fit nothing."""
    callback = keras_avg.callbacks.SynchronizeWorkers()
    callback.set_model(model)
    callback.on_train_begin()
    callback.on_train_end()


def main(options):
    communicator = keras_avg.distributed.initialize(options["timeout"])
    rank, traces = communicator.rank, []

    def loss(y, prediction):
        traces.append(1)
        return keras.ops.mean(keras.ops.square(y - prediction))

    keras.utils.set_random_seed(
        rank
    )  # The workers start differently, and take the chief's weights.
    units = options["units"][rank % len(options["units"])]
    model = keras.Sequential([keras.Input((FEATURES,)), keras.layers.Dense(units)])
    initial = [w.tolist() for w in model.get_weights()]
    optimizer = keras_avg.ModelAverage(
        keras.optimizers.SGD(**options["inner"]),
        num_worker=options["num_worker"],
        interval_steps=options["interval"],
        outer_optimizer=options["outer"] and keras.optimizers.SGD(**options["outer"]),
    )
    model.compile(optimizer, loss, steps_per_execution=options["steps_per_execution"])
    x, y = shard(rank, options["batches"][rank])
    result = {"rank": rank, "initial": initial, "error": None}
    began = time.perf_counter()
    try:
        if len(x):
            how = {"batch_size": BATCH, "epochs": options["epochs"], "shuffle": False, "verbose": 0}
            model.fit(x, y, callbacks=list(callbacks(options, communicator)), **how)
        else:
            only_join(model)
    except (RuntimeError, ValueError) as error:
        result |= {"error": f"{type(error).__name__}: {error}", "failed_at": time.time()}
        if options["folder"]:
            model.save_weights(pathlib.Path(options["folder"], f"{rank}.weights.h5"))
    result |= {
        "seconds": time.perf_counter() - began,
        "weights": [w.tolist() for w in model.get_weights()],
        "traces": len(traces),
    }
    if optimizer.built:
        centers = [optimizer.get_slot(v, "average") for v in model.trainable_variables]
        result |= {
            "center": [keras.ops.convert_to_numpy(c).tolist() for c in centers],
            "rounds": optimizer.num_snapshots,
            "steps": int(optimizer.iterations),
        }
    print(json.dumps(result), flush=True)
    if result["error"]:
        time.sleep(3 * (rank == 0))  # On JAX the others need process 0 until they end.
        os._exit(0)  # At an ordinary exit, engines wait for lost workers.


if __name__ == "__main__":
    main(DEFAULTS | json.loads(sys.argv[1]))
