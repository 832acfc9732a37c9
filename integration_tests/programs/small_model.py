"""A small model and its data. Both are the same on each backend."""

import keras
import numpy as np

_random = np.random.default_rng(7)
X = _random.normal(size=(48, 5)).astype("float32")
Y = (X[:, :1] * X[:, 1:2] + X[:, 2:].sum(axis=1, keepdims=True)).astype("float32")


def compiled(optimizer):
    """A model with fixed weights, because random weights differ between backends."""
    model = keras.Sequential(
        [
            keras.Input((5,)),
            keras.layers.Dense(6, activation="tanh"),
            keras.layers.BatchNormalization(),
            keras.layers.Dense(1),
        ]
    )
    random = np.random.default_rng(3)
    for variable in model.trainable_variables:
        variable.assign(random.normal(size=variable.shape).astype("float32"))
    model.compile(optimizer, keras.losses.MeanSquaredError())
    return model


def fit(model, epochs):
    model.fit(X, Y, batch_size=8, epochs=epochs, shuffle=False, verbose=0)


def arrays(variables):
    """Convert bfloat16 to float32, because `.npz` files cannot hold it. No bit is lost."""
    values = [np.asarray(keras.ops.convert_to_numpy(v)) for v in variables]
    return [v if v.dtype.kind in "iu" else v.astype("float32") for v in values]
