"""Translates the configs of TensorFlow Addons 0.7 to 0.23 for Keras 3.

Addons wrapped the optimizers of Keras 2. Their configs name classes and arguments that Keras 3 does
not have. Configs that Keras 3 wrote are not changed.
"""

import numbers
from typing import Any

import keras

ADDONS = "Addons"
HERE = "keras_avg"
# Keras 2.10 and later wrote these arguments, which have no meaning in Keras 3.
DEAD = ("jit_compile", "is_legacy_optimizer")
OPTIMIZERS = "keras.optimizers"
SCHEDULES = "keras.optimizers.schedules"


def translated(config: dict[str, Any], custom_objects: dict | None) -> dict[str, Any]:
    """A wrapper's config in which Keras 3 can read the inner optimizer.

    Args:
        config: Dict of constructor arguments. It is not changed.
        custom_objects: Dict from names to classes and functions that are not registered.

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
        return found  # The `from_config` of the class knows its arguments.
    arguments = _without_dead(found["config"])
    # In Keras 2, `decay` of Nadam was its momentum schedule. In Keras 3 this schedule is fixed.
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
        # In Keras 2 the default name was None. Keras 3 refuses None.
        return found | {"config": {k: v for k, v in found["config"].items() if k != "name"}}
    # Keras 3 needs a Python float. It refuses the integer 1, and also the NumPy scalar that Keras 2
    # read from the variable of a built optimizer.
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
    """A copy of `config` in which the class has the name by which Keras 3 finds it."""
    _refuse_malformed(config)
    full_name = config.get("registered_name") or config["class_name"]
    package, _, name = full_name.rpartition(">")
    names = [full_name]
    if package in (ADDONS, "Custom"):  # "Custom" is Keras' default package.
        names.append(name)
    if package == ADDONS:
        names.append(f"{HERE}>{name}")
    for known in names:
        if keras.saving.get_registered_object(known, custom_objects) is not None:
            return config | {"module": None, "class_name": known, "registered_name": known}
    if package in ("", ADDONS) and _is_of_keras(config, module):
        # An optimizer of Addons must not become the Keras optimizer of the same name, because they
        # may differ: AdamW of Addons does not multiply the weight decay by the rate.
        public_name = None if package else _public_name(name, module)
        if public_name is None:
            raise ValueError(
                f"{full_name!r} of Keras 2 has no counterpart in Keras 3. Received: a config with "
                f"class_name={config['class_name']!r}. Pass a class that takes its place, "
                f"`custom_objects={{{full_name!r}: ...}}`."
            )
        return config | _serialized(public_name, config["config"], module)
    return config


def _refuse_malformed(config: dict[str, Any]) -> None:
    names = [config.get(key) for key in ("class_name", "module", "registered_name")]
    if not names[0] or not all(isinstance(name, str | None) for name in names):
        raise ValueError(f"A serialized object has names that are text. Received: {config!r}.")


def _is_of_keras(config: dict[str, Any], module: str) -> bool:
    # Before 2.12, Keras 2 wrote no module. Later it wrote `keras.optimizers.legacy`.
    written = config.get("module")
    return not written or written.startswith((module, "tensorflow_addons"))


def _public_name(name: str, module: str) -> str | None:
    """The name of a class in Keras 3. Keras 2 ignored upper and lower case in names."""
    home = keras.optimizers if module == OPTIMIZERS else keras.optimizers.schedules
    return {public.lower(): public for public in vars(home) if public[0].isupper()}.get(
        name.lower()
    )


def _is_serialized(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and {"class_name", "config"} <= value.keys()
        and isinstance(value["config"], dict)
        and not str(value["class_name"]).startswith("__")  # Only Keras 3 writes "__lambda__".
    )


def _serialized(name: str, arguments: dict[str, Any], module: str) -> dict[str, Any]:
    return {"module": module, "class_name": name, "config": arguments, "registered_name": None}


def _without_dead(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name not in DEAD}
