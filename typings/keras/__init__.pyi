# What keras_avg uses of keras.optimizers.Optimizer, so that mypy knows where attributes come from.
# Keras has no types of its own; all else of it is Any.
from typing import Any

from . import optimizers as optimizers

def __getattr__(name: str) -> Any: ...
