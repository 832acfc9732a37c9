"""Trains with a backup at each epoch, and writes the result. It kills itself at EPOCH and BATCH.

python train_and_be_killed.py WRAPPER FOLDER RESULT [EPOCH BATCH]
"""

import os
import pathlib
import signal
import sys

import keras
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import small_training as small

import keras_avg

WRAPPERS = {
    "SWA": lambda inner: keras_avg.SWA(inner, start_averaging=3, average_period=2),
    "LAWA": lambda inner: keras_avg.LAWA(inner, 4, start_averaging=3, average_period=2),
    "SWAG": lambda inner: keras_avg.SWAG(inner, start_averaging=3, average_period=2, rank=4),
}


class Kills(keras.callbacks.Callback):
    def __init__(self, epoch, batch):
        super().__init__()
        self.at, self.epoch = (epoch, batch), None

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if (self.epoch, batch) == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def main(wrapper, folder, result, *when):
    inner = keras_avg.MovingAverage(keras.optimizers.Adam(0.02))
    model = small.model(WRAPPERS[wrapper](inner))
    callbacks = [
        keras_avg.callbacks.SwapAverageWeights(batch_norm_data=small.X),
        keras_avg.callbacks.BackupAndRestore(os.path.join(folder, "backup")),
    ]
    if when:
        callbacks.append(Kills(*map(int, when)))
    validation = (small.X[:20], small.Y[:20])
    small.fit(model, epochs=4, validation_data=validation, callbacks=callbacks)
    model.optimizer.swap_weights()
    arrays = [*model.get_weights(), *model.optimizer.get_weights()]
    np.savez(result, *arrays)


main(*sys.argv[1:])
