"""How a wrapper becomes a config and is made from one."""

import copy
from collections.abc import Callable
from typing import Any

import keras

from keras_avg import _keras_internals, _registered_functions
from keras_avg._optimizers import addons_configs, keywords
from keras_avg._optimizers.storage import check_attached

PLAIN = (bool, int, float, str)


class HasConfig:
    """`get_config` returns every constructor argument; `from_config` leaves its argument alone."""

    built: bool
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

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; the hyper-parameters only until the optimizer is built.

        Raises:
            AttributeError: If it is built. Training that is compiled would not notice the change.
        """
        kind: Any = type(self)
        if vars(self).get("built") and name in keywords.hyper_parameters(kind):
            before = getattr(self, name, value)
            if value is not before and not (isinstance(value, PLAIN) and value == before):
                raise AttributeError(
                    f"`{name}` of '{self.name}' is read-only once the optimizer is built, because "
                    f"compiled training has taken it in. Received: {name}={value!r}, and it is "
                    f"{before!r}. Make a new optimizer and compile the model with it: "
                    f"{type(self).__name__}.from_config(optimizer.get_config() | {{...}})."
                )
        super().__setattr__(name, value)

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
