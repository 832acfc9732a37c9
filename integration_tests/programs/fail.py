"""A job in which one worker fails between two sums. The others save their weights, and say so.

python fail.py RANK kill|stall|stop TIMEOUT FOLDER
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


def main(failing, fault, timeout, folder):
    timeout = float(timeout)
    communicator = keras_avg.distributed.initialize(timeout)
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    for _ in range(2):
        communicator.all_reduce_sum(model.trainable_variables)
    if communicator.rank == int(failing):
        fail(fault, timeout)
    began = time.perf_counter()
    try:
        communicator.all_reduce_sum(model.trainable_variables)
    except RuntimeError as error:
        waited = time.perf_counter() - began
        path = pathlib.Path(folder, f"{communicator.rank}.weights.h5")
        weights = model.get_weights()
        model.save_weights(path)
        model.load_weights(path)
        kept = all(map(np.array_equal, weights, model.get_weights()))
        print(json.dumps({"waited": waited, "error": str(error), "kept": kept, "again": again()}))


def again():
    try:
        keras_avg.distributed.initialize().barrier()
    except RuntimeError as error:
        return str(error)


def fail(fault, timeout):
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(timeout + 4)


main(*sys.argv[1:])
