"""Writes functions into configs, and reads them from configs."""

import copy
import types
from typing import Any

import keras


def serialize(argument: str, function: Any) -> dict[str, Any]:
    """A config of `function`, which must be registered so that it can be loaded.

    Raises:
        ValueError: If the function is not registered. For another callable: if its class is not.
    """
    target = function if isinstance(function, types.FunctionType) else type(function)
    registered_name = keras.saving.get_registered_name(target)
    if keras.saving.get_registered_object(registered_name) is not target:
        raise ValueError(
            "A function in a config must be registered, so that whoever loads the config finds it. "
            f"Received: {argument}={function!r}. Decorate it with "
            '`@keras.saving.register_keras_serializable(package="...")`.'
        )
    return keras.saving.serialize_keras_object(function)


def deserialize(argument: str, function: Any) -> Any:
    """The function from a config.

    The config may have the function itself, a config from `serialize`, or a registered name. Keras
    2 wrote only the name.

    Raises:
        ValueError: If no function of that name is registered.
    """
    if isinstance(function, dict):
        return keras.saving.deserialize_keras_object(copy.deepcopy(function))
    if not isinstance(function, str):
        return function
    found = keras.saving.get_registered_object(function)
    if found is None:
        raise ValueError(
            f"The config names a function that is not known here. Received: {argument}="
            f"{function!r}. Pass it: `custom_objects={{{function!r}: ...}}`."
        )
    return found
