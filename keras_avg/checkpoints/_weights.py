"""Changes the weights of a model: all of them, or none."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import keras

from keras_avg import _backend, _keras_internals
from keras_avg._wrapping import fitting, swap


def refuse_unless_ready(model: Any, what: str) -> None:
    """Refuse a model that cannot take weights now.

    Raises:
        ValueError: If it is not a model, or if it is not built.
        RuntimeError: If it holds the averages of its optimizer, because they would be overwritten.
            If the JAX trainer holds its weights.
    """
    if not isinstance(model, keras.Model):
        raise ValueError(f"`model` must be a keras.Model. Received: model={model!r}.")
    if not model.built:
        raise ValueError(
            f"The model {model.name!r} is not built: it has no weights that files could be read "
            "into. Call it on some data, or `model.build(input_shape)`, first."
        )
    _keras_internals.check_attached(model.variables)
    swap.refuse_while_held(model.variables, what)


@contextlib.contextmanager
def all_or_none(model: Any) -> Iterator[None]:
    """Context in which a model's weights may change. An error puts the old weights back."""
    before = [_backend.copy(variable) for variable in model.variables]
    try:
        yield
    except BaseException:
        put_in(model, before)
        raise


def put_in(model: Any, values: Iterable[Any]) -> None:
    """Give a model's variables copies of values.

    Args:
        model: A model.
        values: Iterable of tensors or arrays, one for each of `model.variables`. For None, the
            variable keeps its value.
    """
    for variable, value in zip(model.variables, values, strict=True):
        if value is not None:
            variable.assign(_backend.copy(fitting.tensor(value, variable)))
    renew_what_is_derived(model)


def renew_what_is_derived(model: Any) -> None:
    """Let layers compute again the tensors that they derive from their variables."""
    for layer in _keras_internals.layers_at_any_depth(model):
        if isinstance(layer, keras.layers.Normalization) and layer.input_mean is None:
            layer.finalize_state()
