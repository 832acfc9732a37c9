"""The optimizers that every backend compares: those of keras_avg, and Keras' own average."""

from collections.abc import Callable
from typing import Any

import keras

import keras_avg

BARE = "bare step"
EMA = "EMA every step"
PERIOD = "EMA, average_period=10"
IDLE = "SWA, nothing due"
USE_EMA = "Keras use_ema"
STEPS_OF_A_PERIOD = 10
DECAY = 0.999
NEVER = 10**9  # steps

Factory = Callable[..., Any]


def optimizers(kind: Factory) -> dict[str, Callable[[], Any]]:
    """Functions that make an optimizer with each kind of average, by name.

    Args:
        kind: Class of Keras optimizers. It is called with a learning rate and keywords.
    """
    return {
        BARE: lambda: kind(1e-3),
        EMA: lambda: keras_avg.MovingAverage(kind(1e-3), average_decay=DECAY),
        PERIOD: lambda: keras_avg.MovingAverage(
            kind(1e-3), average_decay=DECAY, average_period=STEPS_OF_A_PERIOD
        ),
        IDLE: lambda: keras_avg.SWA(kind(1e-3), start_averaging=NEVER),
        "EMA, warming up": lambda: keras_avg.MovingAverage(
            kind(1e-3), average_decay=DECAY, dynamic_decay=True
        ),
        "SWA every step": lambda: keras_avg.SWA(kind(1e-3), average_period=1),
        USE_EMA: lambda: kind(1e-3, use_ema=True, ema_momentum=DECAY),
    }


def let_fit_again(optimizer: Any) -> None:
    """Skip what Keras' average does at the end of `fit`.

    It makes the variables share the buffers of the averages. On JAX the next `fit` then fails.
    """
    optimizer.finalize_variable_values = lambda variables: None


def of_keras_avg(name: str) -> bool:
    """Whether a name belongs to an average of keras_avg."""
    return name.startswith(("EMA", "SWA")) and not name.startswith("SwapEMA")


def shapes(parameters: int, tensors: int) -> list[tuple[int, ...]]:
    """Shapes of matrices of about equal sizes, with `parameters` elements in all or a few less."""
    rows = max(1, int((parameters / tensors) ** 0.5))
    columns = max(1, parameters // tensors // rows)
    return [(rows, columns)] * tensors


def backend() -> str:
    """The name of the backend of this process."""
    return keras.backend.backend()
