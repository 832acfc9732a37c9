"""The base class of decays. A decay gives the weight of the new value."""

import abc
from typing import TypeVar

from keras_avg._types import Config, Tensor

Kind = TypeVar("Kind", bound="Decay")


class Decay(abc.ABC):
    """Gives the weight with which a new value enters an exponential average.

        average <- average + value_weight(t, period) * (value - average)

    A `LearningRateSchedule` gives the decay, `1 - weight`, and not the weight. In float32 this is
    too coarse for long averages: a half-life of 5 % of the run has an error of 1 % after ten
    million steps. A `Decay` computes the weight directly.

    To write a decay, subclass this class, define `value_weight` and `get_config`, and register the
    subclass with `keras.saving.register_keras_serializable`.

    Raises:
        TypeError: If this class itself, or a subclass without `value_weight`, is constructed.

    Example:

    ```python
    decay = keras_avg.decays.HalfLife(1000)
    model.compile(optimizer=keras_avg.MovingAverage("adam", average_decay=decay), loss="mse")
    ```

    Reference:
        `tf.train.ExponentialMovingAverage` of TensorFlow, for averages with a warm-up.
    """

    @abc.abstractmethod
    def value_weight(self, t: Tensor, period: int) -> float | Tensor:
        """The weight of the new value, in [0, 1]. It runs inside compiled code.

        Args:
            t: Integer scalar >= 1. The number of updates since averaging began.
            period: Integer >= 1. The number of updates since the last averaging.

        Returns:
            A Python float if the weight is constant, otherwise a scalar tensor.
        """

    def get_config(self) -> Config:
        """The arguments that construct an equal decay."""
        return {}

    @classmethod
    def from_config(cls: type[Kind], config: Config) -> Kind:
        """Construct a decay from what `get_config` returned."""
        return cls(**config)
