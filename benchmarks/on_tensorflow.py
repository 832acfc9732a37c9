"""Optimizer steps on TensorFlow: those of Keras, and `tf.train.ExponentialMovingAverage`."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from benchmarks import averages

MODES = ("graph", "XLA")


def triad(count: int) -> Callable[[], None]:
    a, b, c = (tf.Variable(tf.ones(count)) for _ in range(3))
    # Compiled by XLA. In a plain graph `assign` makes a new tensor, which costs more than the sum.
    return tf.function(lambda: c.assign(a + b, read_value=False) and None, jit_compile=True)


def copy(count: int) -> Callable[[], None]:
    a, b = (tf.Variable(tf.ones(count)) for _ in range(2))
    return tf.function(lambda: a.assign(b * 2, read_value=False) and None, jit_compile=True)


class Steps:
    """Steps of several optimizers on the same variables. Each optimizer keeps its own averages."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], dtype: str, mode: str) -> None:
        self.variables = [keras.Variable(tf.ones(s, dtype), dtype=dtype) for s in shapes]
        self.gradients = [tf.Variable(tf.fill(s, tf.cast(1e-3, dtype))) for s in shapes]
        self._by_xla = mode == "XLA"

    def of(self, optimizer: Any, update: Callable[[], Any] = lambda: None) -> Callable[[], None]:
        optimizer.build(self.variables)

        @tf.function(jit_compile=self._by_xla, autograph=False)
        def step() -> None:
            gradients = [tf.convert_to_tensor(gradient) for gradient in self.gradients]
            optimizer.apply(gradients, self.variables)
            update()

        return step

    def rivals(self) -> dict[str, Callable[[], Callable[[], None]]]:
        return {"tf.train.EMA": self._tf_train}

    def _tf_train(self) -> Callable[[], None]:
        average = tf.train.ExponentialMovingAverage(averages.DECAY)
        native = [variable.value for variable in self.variables]
        average.apply(native)  # this makes its variables
        optimizer = averages.optimizers(keras.optimizers.SGD)[averages.BARE]()
        return self.of(optimizer, lambda: average.apply(native))
