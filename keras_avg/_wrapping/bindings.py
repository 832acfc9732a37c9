"""Remembers for which models a wrapper works, as far as that is known.

Keras does not tell an optimizer which model it trains. The model is known only while a train step
is traced, while a model is saved or loaded, and where users pass it.
"""

import weakref
from collections.abc import Iterable
from typing import Any

import keras

from keras_avg import _keras_internals
from keras_avg._wrapping import nesting
from keras_avg._wrapping.weak import WeakList

# Every wrapper that has been built, and its models. The references are weak.
_built = WeakList()
_models: weakref.WeakKeyDictionary[Any, WeakList] = weakref.WeakKeyDictionary()


def note_built(wrapper: Any) -> None:
    """Remember a wrapper that was just built, and the model whose training has built it."""
    _built.add(wrapper)
    note_training_model(wrapper)


def note_model(wrapper: Any, model: Any) -> None:
    """Remember that a wrapper works for a model.

    Raises:
        ValueError: If the wrapper was built for variables that this model does not have.
    """
    refuse_foreign(wrapper, model)
    _built.add(wrapper)
    _models_of(wrapper).add(model)


def note_training_model(wrapper: Any) -> None:
    """If this is called inside the training of a model, remember this model.

    Raises:
        ValueError: If the wrapper was built for variables that this model does not have.
    """
    models = list(_keras_internals.models_among_callers("self"))
    for model in models:
        if is_at_work(wrapper, model):
            note_model(wrapper, model)
            return
    for model in models[:1]:  # Its `train_step` may use an optimizer that it does not own.
        if not _foreign_variables(wrapper, model):
            note_model(wrapper, model)


def note_loaded_model(wrapper: Any, model: Any) -> None:
    """Remember a model whose file is being loaded, if the wrapper is its optimizer and fits it."""
    if is_at_work(wrapper, model) and not _foreign_variables(wrapper, model):
        note_model(wrapper, model)


def models_of(wrappers: Iterable[Any]) -> list[Any]:
    """The models that some wrappers are known to work for."""
    return [model for wrapper in wrappers for model in _models_of(wrapper)]


def _models_of(wrapper: Any) -> WeakList:
    return _models.setdefault(wrapper, WeakList())


def names_of_models(wrapper: Any) -> list[str]:
    """The names of the models for which the wrapper is being built right now, if any."""
    models = _keras_internals.models_among_callers("self")
    return list(dict.fromkeys(m.name for m in models if is_at_work(wrapper, m)))


def model_on_file(wrapper: Any) -> Any:
    """The model with the wrapper's variables that Keras is saving or loading right now, or None."""
    for model in _keras_internals.models_among_callers("saveable"):
        has_variables = any(
            _keras_internals.variable_index(wrapper, v) is not None for v in model.variables
        )
        if has_variables or is_at_work(wrapper, model):
            return model
    return None


def wrappers_over(variables: Iterable[Any]) -> list[Any]:
    """All existing wrappers that were built for some of these variables."""
    variables = list(variables)
    return [
        wrapper
        for wrapper in _built
        if any(_keras_internals.variable_index(wrapper, v) is not None for v in variables)
    ]


def work_for_the_same(wrapper: Any, other: Any) -> bool:
    """Whether two wrappers train the same model.

    If no model is known for one of them, the variables decide: one must have all of the other's.
    """
    ours, theirs = models_of([wrapper]), models_of([other])
    if ours and theirs:
        return any(model is another for model in ours for another in theirs)
    return _has_all(wrapper, other) or _has_all(other, wrapper)


def has_replaced(wrapper: Any, other: Any) -> bool:
    """Whether a model of `other` was compiled anew, so that now `wrapper` trains it instead."""
    return any(
        is_at_work(wrapper, model) and not is_at_work(other, model) for model in models_of([other])
    )


def _has_all(wrapper: Any, other: Any) -> bool:
    variables = _keras_internals.built_variables(other)
    return all(_keras_internals.variable_index(wrapper, v) is not None for v in variables)


def works_for(wrapper: Any, model: Any) -> bool:
    """Whether a wrapper trains a model now, or was built for its variables and may train it."""
    if is_at_work(wrapper, model):
        return True
    built = getattr(wrapper, "built", False) and _keras_internals.built_variables(wrapper)
    return bool(built) and not _foreign_variables(wrapper, model)


def is_at_work(wrapper: Any, model: Any) -> bool:
    """Whether the model is compiled with the wrapper."""
    return any(nesting.is_inside(wrapper, each) for each in nesting.optimizers_of(model))


def refuse_foreign(wrapper: Any, model: Any) -> None:
    """Refuse a model that lacks variables for which the wrapper was built."""
    if foreign := _foreign_variables(wrapper, model):
        raise ValueError(
            f"'{wrapper.name}' was built for other variables than those of the model "
            f"{model.name!r}. Received: an optimizer with averages of {foreign}, which the model "
            "does not have. An optimizer belongs to one model: compile each with its own, and a "
            "model whose variables were replaced (as by `quantize`) with a new one."
        )


def _foreign_variables(wrapper: Any, model: Any) -> list[str]:
    """The paths of the wrapper's variables that the model does not have."""
    built = _keras_internals.built_variables(wrapper) if wrapper.built else []
    if not built or not isinstance(model, keras.Model):
        return []
    known = {_keras_internals.variable_index(wrapper, variable) for variable in model.variables}
    return [getattr(v, "path", v.name) for i, v in enumerate(built) if i not in known]
