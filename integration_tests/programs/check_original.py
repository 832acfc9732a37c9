"""One of two workers. They take the steps of the original's own test, eagerly."""

import json

import keras
import numpy as np

import keras_avg


def values(variables):
    return [keras.ops.convert_to_numpy(v).tolist() for v in variables]


def two_variables(communicator):
    optimizer = keras_avg.ModelAverage(keras.optimizers.SGD(1.0), interval_steps=2)
    variables = [keras.Variable(0.0), keras.Variable(1.0)]
    gradient = -1.0 if communicator.is_chief else -2.0
    seen = []
    for _ in range(3 if communicator.is_chief else 2):
        optimizer.apply([keras.ops.convert_to_tensor(gradient)] * 2, variables)
        centers = [optimizer.get_slot(v, "average") for v in variables]
        seen.append([values(variables), values(centers), optimizer.num_snapshots])
    return seen


def slope(communicator):
    """Fit y = 42 x from 0. Take one step on the sum of squares, alone and averaged."""
    start = 0.5 if communicator.is_chief else 1.0
    x = np.linspace(-start, start - 0.01, 100)
    gradient = keras.ops.convert_to_tensor(np.float32(-2 * 42 * np.sum(x**2)))
    found = []
    for optimizer in (
        keras.optimizers.SGD(0.02),
        keras_avg.ModelAverage(keras.optimizers.SGD(0.02), interval_steps=1),
    ):
        variable = keras.Variable(0.0)
        optimizer.apply([gradient], [variable])
        found += values([variable])
    return found


communicator = keras_avg.distributed.initialize(60)
# Only the chief takes a third step. It does not wait for the other worker, so it must come last.
found = slope(communicator)
print(json.dumps({"slope": found, "steps": two_variables(communicator)}), flush=True)
