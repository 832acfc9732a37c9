"""Functions in configs."""

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
