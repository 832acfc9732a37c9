"""Which models a wrapper works for, as far as that is known.

Keras tells an optimizer nothing about its model. It is known where a train step is traced, where a
model is saved or loaded, and where users pass it.
"""

import weakref
from collections.abc import Iterable
from typing import Any

import keras

from keras_avg import _keras_internals
from keras_avg._wrapping import nesting
from keras_avg._wrapping.weak import WeakList

# Every wrapper that has been built, and its models. Neither is kept alive.
_built = WeakList()
_models: weakref.WeakKeyDictionary[Any, WeakList] = weakref.WeakKeyDictionary()


def note_built(wrapper: Any) -> None:
    """Remember a wrapper that has variables now, and the model in whose training it got them."""
    _built.add(wrapper)
    note_training_model(wrapper)


def note_model(wrapper: Any, model: Any) -> None:
    """Remember that a wrapper works for a model.

    Raises:
        ValueError: If it was built for variables that are not this model's.
    """
    refuse_foreign(wrapper, model)
    _built.add(wrapper)
    _models_of(wrapper).add(model)


def note_training_model(wrapper: Any) -> None:
    """Remember the model in whose training this is called, if any.

    Raises:
        ValueError: If the wrapper was built for variables that are not this model's.
    """
    models = list(_keras_internals.models_among_callers("self"))
    for model in models:
        if _is_at_work(wrapper, model):
            note_model(wrapper, model)
            return
    for model in models[:1]:  # its own `train_step` may use an optimizer from elsewhere
        if not _foreign_variables(wrapper, model):
            note_model(wrapper, model)


def models_of(wrappers: Iterable[Any]) -> list[Any]:
    """The models that some wrappers are known to work for."""
    return [model for wrapper in wrappers for model in _models_of(wrapper)]


def _models_of(wrapper: Any) -> WeakList:
    return _models.setdefault(wrapper, WeakList())


def names_of_models(wrapper: Any) -> list[str]:
    """The names of the models for which a wrapper is being built at the moment, if any."""
    models = _keras_internals.models_among_callers("self")
    return list(dict.fromkeys(m.name for m in models if _is_at_work(wrapper, m)))


def model_on_file(wrapper: Any) -> Any:
    """The model that Keras saves or loads at the moment and that has the wrapper's variables."""
    for model in _keras_internals.models_among_callers("saveable"):
        has_variables = any(
            _keras_internals.variable_index(wrapper, v) is not None for v in model.variables
        )
        if has_variables or _is_at_work(wrapper, model):
            return model
    return None


def wrappers_over(variables: Iterable[Any]) -> list[Any]:
    """All living wrappers that were built for some of these variables."""
    variables = list(variables)
    return [
        wrapper
        for wrapper in _built
        if any(_keras_internals.variable_index(wrapper, v) is not None for v in variables)
    ]


def work_for_the_same(wrapper: Any, other: Any) -> bool:
    """Whether two wrappers train the same model, or as much of it as is known."""
    ours, theirs = models_of([wrapper]), models_of([other])
    if ours and theirs:
        return any(model is another for model in ours for another in theirs)
    return _has_all(wrapper, other) or _has_all(other, wrapper)


def _has_all(wrapper: Any, other: Any) -> bool:
    variables = _keras_internals.built_variables(other)
    return all(_keras_internals.variable_index(wrapper, v) is not None for v in variables)


def works_for(wrapper: Any, model: Any) -> bool:
    """Whether a wrapper is, or may come to be, at work in a model."""
    if _is_at_work(wrapper, model):
        return True
    built = getattr(wrapper, "built", False) and _keras_internals.built_variables(wrapper)
    return bool(built) and not _foreign_variables(wrapper, model)


def _is_at_work(wrapper: Any, model: Any) -> bool:
    return any(nesting.is_inside(wrapper, each) for each in nesting.optimizers_of(model))


def refuse_foreign(wrapper: Any, model: Any) -> None:
    """Refuse a model whose variables are not those that the wrapper was built for."""
    if foreign := _foreign_variables(wrapper, model):
        raise ValueError(
            f"'{wrapper.name}' was built for other variables than those of the model "
            f"{model.name!r}. Received: an optimizer with averages of {foreign}, which the model "
            "does not have. An optimizer belongs to one model: compile each with its own, and a "
            "model whose variables were replaced (as by `quantize`) with a new one."
        )


def _foreign_variables(wrapper: Any, model: Any) -> list[str]:
    """The wrapper's variables that the model does not have, by path."""
    built = _keras_internals.built_variables(wrapper) if wrapper.built else []
    if not built or not isinstance(model, keras.Model):
        return []
    known = {_keras_internals.variable_index(wrapper, variable) for variable in model.variables}
    return [getattr(v, "path", v.name) for i, v in enumerate(built) if i not in known]
