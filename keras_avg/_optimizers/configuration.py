"""How a wrapper becomes a config and is made from one."""

import copy
import types
from collections.abc import Callable
from typing import Any

import keras

from keras_avg import _keras_internals


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
        aggregator = self.gradient_aggregator
        return {
            "optimizer": _keras_internals.serialize(self.inner_optimizer),
            "sequential_update": self.sequential_update,
            "name": self.name,
            "average_dtype": self.average_dtype,
            "skip_nonfinite": self.skip_nonfinite,
            "gradient_transformers": [_function(f) for f in self.gradient_transformers] or None,
            "gradient_aggregator": None if aggregator is None else _function(aggregator),
            "clipnorm": self.clipnorm,
            "clipvalue": self.clipvalue,
            "global_clipnorm": self.global_clipnorm,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict | None = None) -> Any:
        """Construct a wrapper from what `get_config` returned.

        Args:
            config: Dict. Left as it is.
            custom_objects: Dict of names to classes and functions that are not registered.

        Returns:
            A new wrapper, not built.
        """
        return cls(**{key: _restored(value, custom_objects) for key, value in config.items()})


def _function(function: Any) -> dict[str, Any]:
    target = function if isinstance(function, types.FunctionType) else type(function)
    registered_name = keras.saving.get_registered_name(target)
    if keras.saving.get_registered_object(registered_name) is not target:
        raise ValueError(
            "A gradient function in a config must be registered, so that whoever loads the config "
            f"finds it. Received: {function!r}. Decorate it with "
            '`@keras.saving.register_keras_serializable(package="...")`.'
        )
    return keras.saving.serialize_keras_object(function)


def _restored(value: Any, custom_objects: dict | None) -> Any:
    if isinstance(value, list):
        return [_restored(item, custom_objects) for item in value]
    if isinstance(value, dict) and "class_name" in value:
        return keras.saving.deserialize_keras_object(copy.deepcopy(value), custom_objects)
    return value
