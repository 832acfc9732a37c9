"""Functions in configs."""

import copy
import types
from typing import Any

import keras


def serialize(argument: str, function: Any) -> dict[str, Any]:
    """A config of `function`, if whoever loads it can find the function.

    Raises:
        ValueError: If neither the function nor, for another callable, its class is registered.
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
    """The function of a config: itself, a config as `serialize` gives it, or a registered name.

    Raises:
        ValueError: If there is no function of that name. Configs of Keras 2 hold no more than it.
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
