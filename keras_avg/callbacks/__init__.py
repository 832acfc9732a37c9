"""Callbacks that evaluate and save the averages, and that let workers meet in `fit`."""

from keras_avg.callbacks.average_model_checkpoint import AverageModelCheckpoint
from keras_avg.callbacks.backup_and_restore import BackupAndRestore
from keras_avg.callbacks.save_averages import SaveAverages
from keras_avg.callbacks.swap_average_weights import SwapAverageWeights
from keras_avg.callbacks.synchronize_workers import SynchronizeWorkers

__all__ = [
    "AverageModelCheckpoint",
    "BackupAndRestore",
    "SaveAverages",
    "SwapAverageWeights",
    "SynchronizeWorkers",
]
