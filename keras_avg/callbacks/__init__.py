"""Callbacks that evaluate, keep and save the averages while `fit` trains the raw weights."""

from keras_avg.callbacks.average_model_checkpoint import AverageModelCheckpoint
from keras_avg.callbacks.backup_and_restore import BackupAndRestore
from keras_avg.callbacks.swap_average_weights import SwapAverageWeights
from keras_avg.callbacks.synchronize_workers import SynchronizeWorkers

__all__ = ["AverageModelCheckpoint", "BackupAndRestore", "SwapAverageWeights", "SynchronizeWorkers"]
