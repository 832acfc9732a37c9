"""How a wrapper becomes a config and is made from one."""

import copy
from collections.abc import Callable
from typing import Any

import keras

from keras_avg import _keras_internals, _registered_functions
from keras_avg._optimizers import addons_configs
from keras_avg._optimizers.storage import check_attached


class HasConfig:
    """`get_config` returns every constructor argument; `from_config` leaves its argument alone."""

    inner_optimizer: Any
    sequential_update: bool
    name: str
    average_dtype: str | None
    skip_nonfinite: bool
    gradient_transformers: list[Callable]
    gradient_aggregator: Callable | None
    clipnorm: float | None
    clipvalue: float | None
    global_clipnorm: float | None

    def get_config(self) -> dict[str, Any]:
        """The arguments to construct the wrapper with again, serializable.

        Returns:
            A dict. The rate is not in it: it is part of the inner optimizer's config.

        Raises:
            ValueError: If a gradient function is not registered with Keras.
        """
        check_attached(self.inner_optimizer.variables)
        aggregator, transformers = self.gradient_aggregator, self.gradient_transformers
        serialize = _registered_functions.serialize
        return {
            "optimizer": _keras_internals.serialize(self.inner_optimizer),
            "sequential_update": self.sequential_update,
            "name": self.name,
            "average_dtype": self.average_dtype,
            "skip_nonfinite": self.skip_nonfinite,
            "gradient_transformers": [serialize("gradient_transformers", f) for f in transformers]
            or None,
            "gradient_aggregator": aggregator and serialize("gradient_aggregator", aggregator),
            "clipnorm": self.clipnorm,
            "clipvalue": self.clipvalue,
            "global_clipnorm": self.global_clipnorm,
        }

    def _rule(self) -> str:
        """The arguments that say when and how much is averaged, for messages."""
        base = HasConfig.get_config(self)
        own = {k: v for k, v in self.get_config().items() if k not in base}
        return ", ".join(f"{name}={value!r}" for name, value in own.items())

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict | None = None) -> Any:
        """Construct a wrapper from what `get_config` returned, or that of TensorFlow Addons.

        Args:
            config: Dict. Left as it is.
            custom_objects: Dict of names to classes and functions that are not registered.

        Returns:
            A new wrapper, not built.

        Raises:
            ValueError: If an argument is unknown or out of range, or if the config is of Keras 2
                and an optimizer or a schedule in it has no counterpart in Keras 3.

        Example:

        ```python
        inner = {"class_name": "SGD", "config": {"learning_rate": 0.1, "decay": 0.01}}
        optimizer = keras_avg.SWA.from_config({"optimizer": inner, "average_period": 5})
        ```
        """
        config = addons_configs.translated(config, custom_objects)
        return cls(**{key: _restored(value, custom_objects) for key, value in config.items()})


def _restored(value: Any, custom_objects: dict | None) -> Any:
    if isinstance(value, list):
        return [_restored(item, custom_objects) for item in value]
    if isinstance(value, dict) and "class_name" in value:
        return keras.saving.deserialize_keras_object(copy.deepcopy(value), custom_objects)
    return value
