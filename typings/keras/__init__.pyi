# The attributes of keras.optimizers.Optimizer that keras_avg uses. With them mypy knows where an
# attribute comes from. Keras has no types of its own, so everything else in it is Any.
from typing import Any

from . import optimizers as optimizers

def __getattr__(name: str) -> Any: ...
