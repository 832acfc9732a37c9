"""Configs that TensorFlow Addons 0.7 to 0.23 wrote, in the words of Keras 3.

Addons wrapped the optimizers of Keras 2, whose configs name classes and arguments that are no more.
What Keras 3 wrote itself goes through unchanged.
"""

import numbers
from typing import Any

import keras

ADDONS = "Addons"
HERE = "keras_avg"
# Keras 2 from 2.10 on wrote how to run and which of two bases a class has.
DEAD = ("jit_compile", "is_legacy_optimizer")
OPTIMIZERS = "keras.optimizers"
SCHEDULES = "keras.optimizers.schedules"


def translated(config: dict[str, Any], custom_objects: dict | None) -> dict[str, Any]:
    """A wrapper's config, with the inner optimizer's as Keras 3 reads it.

    Args:
        config: Dict of constructor arguments. Left as it is.
        custom_objects: Dict of names to classes and functions that are not registered.

    Returns:
        A new dict.

    Raises:
        ValueError: If an optimizer or a schedule has no counterpart in Keras 3.
    """
    config = _without_dead(config)
    if _is_serialized(config.get("optimizer")):
        config["optimizer"] = _optimizer(config["optimizer"], custom_objects)
    return config


def _optimizer(config: dict[str, Any], custom_objects: dict | None) -> dict[str, Any]:
    found = _found(config, OPTIMIZERS, custom_objects)
    if found.get("module") != OPTIMIZERS:
        return found  # its own `from_config` knows its arguments
    arguments = _without_dead(found["config"])
    # Keras 2 called the momentum schedule of Nadam `decay`; in Keras 3 it is fixed.
    decay = 0.0 if found["class_name"] == "Nadam" else arguments.get("decay", 0.0)
    arguments.pop("decay", None)
    if "learning_rate" in arguments:
        arguments["learning_rate"] = _rate(arguments["learning_rate"], custom_objects)
    if decay:
        arguments["learning_rate"] = _decaying(found["class_name"], arguments, decay)
    return found | {"config": arguments}


def _rate(rate: Any, custom_objects: dict | None) -> Any:
    if _is_serialized(rate):
        found = _found(rate, SCHEDULES, custom_objects)
        if found.get("module") != SCHEDULES or found["config"].get("name", "") is not None:
            return found
        # No name was the default in Keras 2, and is refused in Keras 3.
        return found | {"config": {k: v for k, v in found["config"].items() if k != "name"}}
    # Keras 3 takes neither `1` nor the NumPy scalar that a built optimizer read from its variable.
    return float(rate) if isinstance(rate, numbers.Real) else rate


def _decaying(kind: str, arguments: dict[str, Any], decay: float) -> dict[str, Any]:
    rate = arguments.get("learning_rate")
    if not isinstance(rate, numbers.Real):
        raise ValueError(
            f"In Keras 2 `decay` divided what a schedule gave, which Keras 3 cannot say. Received: "
            f"decay={decay!r} and learning_rate={rate!r} in the config of {kind!r}. Remove `decay` "
            "from the config, or put both into a LearningRateSchedule of your own."
        )
    schedule = {"initial_learning_rate": rate, "decay_steps": 1, "decay_rate": float(decay)}
    return _serialized("InverseTimeDecay", schedule, SCHEDULES)


def _found(config: dict[str, Any], module: str, custom_objects: dict | None) -> dict[str, Any]:
    """`config`, with its class under the name that Keras 3 finds it by."""
    full_name = config.get("registered_name") or config["class_name"]
    package, _, name = full_name.rpartition(">")
    names = [full_name]
    if package in (ADDONS, "Custom"):  # what Keras registers without saying a package
        names.append(name)
    if package == ADDONS:
        names.append(f"{HERE}>{name}")
    for known in names:
        if keras.saving.get_registered_object(known, custom_objects) is not None:
            return config | {"module": None, "class_name": known, "registered_name": known}
    if package in ("", ADDONS) and _is_of_keras(config, module):
        # An optimizer of Addons does not become the one of Keras that shares its name: the weight
        # decay of its AdamW is not multiplied by the rate.
        public_name = None if package else _public_name(name, module)
        if public_name is None:
            raise ValueError(
                f"{full_name!r} of Keras 2 has no counterpart in Keras 3. Received: a config with "
                f"class_name={config['class_name']!r}. Pass a class that takes its place, "
                f"`custom_objects={{{full_name!r}: ...}}`."
            )
        return config | _serialized(public_name, config["config"], module)
    return config


def _is_of_keras(config: dict[str, Any], module: str) -> bool:
    # Keras 2 wrote no modules before 2.12, and `keras.optimizers.legacy` after.
    written = config.get("module")
    return not written or written.startswith((module, "tensorflow_addons"))


def _public_name(name: str, module: str) -> str | None:
    """The name in Keras 3 of a class that Keras 2 found by its name in any case."""
    home = keras.optimizers if module == OPTIMIZERS else keras.optimizers.schedules
    return {public.lower(): public for public in vars(home) if public[0].isupper()}.get(
        name.lower()
    )


def _is_serialized(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and {"class_name", "config"} <= value.keys()
        and isinstance(value["config"], dict)
        and not str(value["class_name"]).startswith("__")  # what Keras 3 alone writes: "__lambda__"
    )


def _serialized(name: str, arguments: dict[str, Any], module: str) -> dict[str, Any]:
    return {"module": module, "class_name": name, "config": arguments, "registered_name": None}


def _without_dead(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name not in DEAD}
