"""Averages files of a model of 1 MiB; prints how many bytes were in use at most until then.

python average_many_files.py FOLDER NUMBER [NUMBER ...]
"""

import pathlib
import resource
import sys

import keras

import keras_avg


def main(folder, *numbers):
    model = keras.Sequential([keras.Input((512,)), keras.layers.Dense(512, use_bias=False)])
    files = [pathlib.Path(folder) / f"{i}.keras" for i in range(3)]
    for file in files:
        model.save(file)
    unit = 1 if sys.platform == "darwin" else 1024
    for number in map(int, numbers):
        keras_avg.checkpoints.average(model, (files * number)[:number], verbose=0)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


main(*sys.argv[1:])
