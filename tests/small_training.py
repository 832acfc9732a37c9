"""A model and data small enough to train hundreds of times."""

import keras
import numpy as np
from keras import ops

BATCH_SIZE = 8
BATCHES = 6

#: Whether optimizers are built before training. tests/conftest.py sets this for each test.
builds_first = False

_random = np.random.default_rng(7)
X = _random.normal(size=(BATCH_SIZE * BATCHES, 5)).astype("float32")
Y = (X[:, :1] * X[:, 1:2] + X[:, 2:].sum(axis=1, keepdims=True)).astype("float32")


def model(optimizer=None, with_input_shape=True, **compile_arguments):
    """A model of dense and batch-normalization layers. Its weights are the same each time."""
    keras.utils.set_random_seed(42)
    layers = [
        keras.layers.Dense(6, activation="tanh", name="hidden"),
        keras.layers.BatchNormalization(name="norm"),
        keras.layers.Dense(1, name="out"),
    ]
    if with_input_shape:
        layers.insert(0, keras.Input((5,)))
    new = keras.Sequential(layers, name="small")
    if optimizer is not None:
        new.compile(optimizer, "mse", **compile_arguments)
    return new


def fit(trained, epochs=2, **arguments):
    """Train on the batches in order. The same call has the same effect each time."""
    arguments = {"batch_size": BATCH_SIZE, "shuffle": False, "verbose": 0} | arguments
    if builds_first and trained.trainable_variables and not trained.optimizer.built:
        trained.optimizer.build(trained.trainable_variables)
    trained.fit(X, Y, epochs=epochs, **arguments)
    return trained


def trajectories(trained, steps):
    """Train batch by batch. Return the list of values of each trainable variable.

    The first value is the one before training.
    """
    values = [[numpy(v)] for v in trained.trainable_variables]
    for step in range(steps):
        batch = slice(BATCH_SIZE * (step % BATCHES), BATCH_SIZE * (step % BATCHES + 1))
        trained.train_on_batch(X[batch], Y[batch])
        for value, variable in zip(values, trained.trainable_variables, strict=True):
            value.append(numpy(variable))
    return values


def numpy(variable):
    return np.array(ops.convert_to_numpy(variable), copy=True)


def apply(optimizer, variables, grads, times=1):
    """Apply the same gradients several times, eagerly."""
    for _ in range(times):
        pairs = zip(grads, variables, strict=True)
        tensors = [None if g is None else ops.convert_to_tensor(g, v.dtype) for g, v in pairs]
        optimizer.apply(tensors, variables)


def assert_same_bits(arrays, others):
    assert len(arrays) == len(others)
    for i, (array, other) in enumerate(zip(arrays, others, strict=True)):
        np.testing.assert_array_equal(array, other, err_msg=f"array {i}")


def slots(optimizer, variables):
    """The averages as arrays."""
    return [numpy(optimizer.get_slot(v, "average")) for v in variables]
