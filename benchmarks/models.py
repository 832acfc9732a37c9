"""Small models for the measurement of whole training steps."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import layers

Data = tuple[np.ndarray, np.ndarray]
CLASSES = 10


def convolution() -> keras.Model:
    """A residual network for small pictures: 0.27 M parameters, 45 averaged tensors."""
    inputs = keras.Input((32, 32, 3))
    x = _convolved(inputs, 16)
    for filters, strides in ((16, 1), (16, 1), (32, 2), (32, 1), (64, 2), (64, 1), (64, 1)):
        straight = layers.Conv2D(filters, 1, strides)(x) if filters != x.shape[-1] else x
        x = layers.add([straight, _convolved(_convolved(x, filters, strides), filters)])
    return keras.Model(inputs, layers.Dense(CLASSES)(layers.GlobalAveragePooling2D()(x)))


def _convolved(x: Any, filters: int, strides: int = 1) -> Any:
    x = layers.Conv2D(filters, 3, strides, padding="same", use_bias=False)(x)
    return layers.ReLU()(layers.BatchNormalization()(x))


def transformer() -> keras.Model:
    """Four layers over 64 tokens: 3.3 M parameters, 68 tensors."""
    inputs = keras.Input((64,), dtype="int32")
    x = layers.Embedding(1000, 256)(inputs)
    for _ in range(4):
        normal = layers.LayerNormalization()(x)
        x = layers.add([x, layers.MultiHeadAttention(4, 64)(normal, normal)])
        wide = layers.Dense(1024, activation="gelu")(layers.LayerNormalization()(x))
        x = layers.add([x, layers.Dense(256)(wide)])
    return keras.Model(inputs, layers.Dense(CLASSES)(layers.GlobalAveragePooling1D()(x)))


def tiny() -> keras.Model:
    """Four tensors. Here the host's time dominates a step."""
    inputs = keras.Input((16,))
    return keras.Model(inputs, layers.Dense(CLASSES)(layers.Dense(16, activation="relu")(inputs)))


def tiny_but_deep() -> keras.Model:
    """Eighty small tensors."""
    x = inputs = keras.Input((16,))
    for _ in range(39):
        x = layers.Dense(16, activation="relu")(x)
    return keras.Model(inputs, layers.Dense(CLASSES)(x))


def pictures(count: int) -> Data:
    return _random(count).normal(size=(count, 32, 32, 3)).astype("float32"), _classes(count)


def tokens(count: int) -> Data:
    return _random(count).integers(0, 1000, (count, 64)).astype("int32"), _classes(count)


def rows(count: int) -> Data:
    return _random(count).normal(size=(count, 16)).astype("float32"), _classes(count)


def _classes(count: int) -> np.ndarray:
    return _random(count + 1).integers(0, CLASSES, count).astype("int32")


def _random(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


#: The model, its data, its batch size, and the steps of one `fit`.
MODELS: dict[str, tuple[Callable[[], keras.Model], Callable[[int], Data], int, int]] = {
    "convolution": (convolution, pictures, 32, 5),
    "transformer": (transformer, tokens, 16, 5),
    "tiny": (tiny, rows, 8, 100),
    "tiny but deep": (tiny_but_deep, rows, 8, 50),
}


def compiled(name: str, optimizer: Any) -> keras.Model:
    """One of the models. Its weights are always the same."""
    keras.utils.set_random_seed(0)
    model = MODELS[name][0]()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss)
    return model
