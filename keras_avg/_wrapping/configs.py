"""Turns a wrapper into a config, and a config into constructor arguments."""

import copy
from typing import Any

import keras

from keras_avg import _keras_internals, _registered_functions
from keras_avg._keras2 import addons_configs
from keras_avg._wrapping import keywords

PLAIN = (bool, int, float, str)


def of_wrapper(wrapper: Any) -> dict[str, Any]:
    """The config of the arguments that every wrapper has. A subclass adds its own arguments."""
    aggregator, transformers = wrapper.gradient_aggregator, wrapper.gradient_transformers
    serialize = _registered_functions.serialize
    return {
        "optimizer": _keras_internals.serialize(wrapper.inner_optimizer),
        "name": wrapper.name,
        "gradient_transformers": [serialize("gradient_transformers", f) for f in transformers]
        or None,
        "gradient_aggregator": aggregator and serialize("gradient_aggregator", aggregator),
        "clipnorm": wrapper.clipnorm,
        "clipvalue": wrapper.clipvalue,
        "global_clipnorm": wrapper.global_clipnorm,
    }


def arguments_in(config: dict[str, Any], custom_objects: dict | None) -> dict[str, Any]:
    """The constructor arguments in a config. TensorFlow Addons may have written the config."""
    config = addons_configs.translated(config, custom_objects)
    return {key: _restored(value, custom_objects) for key, value in config.items()}


def refuse_change(wrapper: Any, name: str, value: Any) -> None:
    """Refuse to change a hyper-parameter of a wrapper that is built."""
    kind: Any = type(wrapper)
    if name not in keywords.hyper_parameters(kind):
        return
    before = getattr(wrapper, name, value)
    if value is before or (isinstance(value, PLAIN) and value == before):
        return
    raise AttributeError(
        f"`{name}` of '{wrapper.name}' is read-only once the optimizer is built, because compiled "
        f"training has taken it in. Received: {name}={value!r}, and it is {before!r}. Make a new "
        f"optimizer and compile the model with it: {kind.__name__}.from_config("
        "optimizer.get_config() | {...})."
    )


def _restored(value: Any, custom_objects: dict | None) -> Any:
    if isinstance(value, list):
        return [_restored(item, custom_objects) for item in value]
    if isinstance(value, dict) and "class_name" in value:
        return keras.saving.deserialize_keras_object(copy.deepcopy(value), custom_objects)
    return value
