"""The one place where names that Keras keeps to itself are used.

Everything else in this package stands on Keras' public interface, so this page is what to check
when a new Keras release comes out. Each function says why the public interface is not enough.
"""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import keras
from keras.src.utils import tracking

TORCH_OPTIMIZERS_MODULE = "keras.src.backend.torch.optimizers"


@tracking.no_automatic_dependency_tracking
def share_step_counter(wrapper: Any, inner_optimizer: Any) -> None:
    """Give `wrapper` its inner optimizer's step counter in place of one of its own.

    Every Keras optimizer makes a counter when it is constructed. A wrapper's would be a second
    truth about the same thing, and its path (`SWA/iteration`) would stand twice in a state tree
    that holds two wrappers of one name.
    """
    wrapper._untrack_variable(wrapper._iterations)
    wrapper._iterations = inner_optimizer._iterations


def step_counter(optimizer: Any) -> Any:
    """The variable behind `iterations`, which counts accumulation micro-steps too.

    Public `iterations` is a freshly computed tensor under gradient accumulation; telling whether
    it moved, without waiting for a device, takes the variable.
    """
    return optimizer._iterations


def counts_every_step(optimizer: Any) -> bool:
    """Whether each `apply` of this optimizer is known to be a real update.

    True for an optimizer that leaves `apply` to Keras and does not accumulate gradients. Then no
    condition is compiled in.
    """
    return type(optimizer).apply is keras.optimizers.Optimizer.apply and not (
        optimizer.gradient_accumulation_steps
    )


def built_variables(optimizer: Any) -> list[Any]:
    """The model variables a built optimizer was built with, in order."""
    return list(optimizer._trainable_variables)


def variable_index(optimizer: Any, variable: Any) -> int | None:
    """Place of a model variable among `built_variables`, or None.

    The key is Keras' own: on TensorFlow a variable may arrive as a Keras variable, as the
    `tf.Variable` inside it, or as one replica's copy.
    """
    try:
        key = optimizer._var_key(variable)
    except AttributeError:  # not a variable at all
        return None
    return optimizer._trainable_variables_indices.get(key)


def is_averageable(variable: Any) -> bool:
    """False for float8 scales and the like, which gradients overwrite instead of updating.

    The attribute is public, but a plain `tf.Variable` does not have it.
    """
    return not getattr(variable, "overwrite_with_gradient", False)


def add_variable_like(optimizer: Any, variable: Any, name: str, dtype: str) -> Any:
    """An optimizer variable with the shape, layout and device of `variable`, but its own dtype.

    Keras' `add_variable_from_reference` does this with the dtype of `variable` only.
    """
    path = getattr(variable, "path", variable.name)
    with _colocated(optimizer, variable):
        return optimizer.add_variable(
            shape=variable.shape,
            dtype=dtype,
            layout=getattr(variable, "_layout", None),
            name=f"{re.sub('[/:]', '_', path)}_{name}",
        )


@contextlib.contextmanager
def _colocated(optimizer: Any, variable: Any) -> Iterator[None]:
    strategy = getattr(optimizer, "_distribution_strategy", None)  # TensorFlow only
    if strategy is None:
        yield
        return
    value = variable.value if isinstance(variable, keras.Variable) else variable
    with strategy.extended.colocate_vars_with(value):
        yield


def is_purged(variable: Any) -> bool:
    """Whether the JAX trainer has taken the value away for the time of an epoch."""
    return variable._value is None and variable._initializer is None


def clip_gradients(optimizer: Any, grads: list[Any]) -> list[Any]:
    """Clip as `optimizer`'s `clipnorm`, `clipvalue` or `global_clipnorm` say (sparse ones too)."""
    return list(optimizer._clip_gradients(grads))


def serialize(optimizer: Any) -> dict[str, Any]:
    """Serialized `optimizer` under the public names of Keras' own classes.

    On torch `keras.optimizers.Adam(...)` is an instance of a torch-only subclass, whose module
    Keras writes down; a file saved there could not be loaded on any other backend.
    """
    return _with_public_names(keras.saving.serialize_keras_object(optimizer))


def _with_public_names(config: Any) -> Any:
    if isinstance(config, list):
        return [_with_public_names(item) for item in config]
    if not isinstance(config, dict):
        return config
    config = {key: _with_public_names(value) for key, value in config.items()}
    if str(config.get("module")).startswith(TORCH_OPTIMIZERS_MODULE):
        config |= {"module": "keras.optimizers", "registered_name": None}
    return config
