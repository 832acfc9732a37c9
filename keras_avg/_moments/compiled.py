"""Compiles the pass over one batch, as `predict` is compiled, and keeps the compiled function."""

import contextlib
import re
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import keras

from keras_avg import _backend, _keras_internals
from keras_avg._moments.observer import Observer
from keras_avg._moments.pool import Moments

PLAIN = (bool, int, float, str, type(None))
# Attributes that calls, `fit`, `evaluate` and `predict` set, and on which no code depends.
OF_USE = re.compile(
    r"_called|_jit_compile|history|stop_\w+|(train|test|predict)_function|_eval_epoch_iterator"
)


class CompiledBatch:
    """A function of the variables' values and a batch, which gives the moments.

    The function holds neither the model nor its variables. These are set for each pass.
    """

    def __init__(self, by_xla: bool) -> None:
        self._function = _backend.compile_stateless(self._run, by_xla)
        self._pass: Any = None

    @property
    def is_compiled(self) -> bool:
        """Whether the backend compiles at all, and the model can be compiled as far as known."""
        return self._function is not None

    def give_up(self) -> None:
        """Note that the model cannot be compiled. Later passes over it do not try again."""
        self._function = None

    @contextlib.contextmanager
    def used_by(self, model: Any, observer: Observer) -> Iterator[None]:
        """Context of one pass."""
        self._pass = model, observer, _variables_of(model)
        try:
            yield
        finally:
            self._pass = None

    def moments(self, inputs: Any, scope: Any) -> list[Moments]:
        """The moments in a batch. New values of variables are put into the scope."""
        assert self._function is not None
        variables = self._pass[-1]
        found, changed = self._function([_current(v, scope) for v in variables], inputs)
        for number, value in changed.items():
            scope.add_update((variables[int(number)], value))
        return [Moments(*each) for each in found]

    def _run(self, values: Any, inputs: Any) -> tuple[list[Any], dict[str, Any]]:
        model, observer, variables = self._pass
        pairs = list(zip(variables, values, strict=True))
        with keras.StatelessScope(pairs) as scope:
            before = dict(scope.state_mapping)
            infer = _backend.eager_inference(lambda batch: model(batch, training=False))
            found = observer.moments(infer, inputs)
        after = scope.state_mapping
        if after.keys() != before.keys():
            raise ValueError("The pass assigns to variables that the model does not list.")
        changed = {
            str(number): after[id(variable)]
            for number, variable in enumerate(variables)
            if after[id(variable)] is not before[id(variable)]
        }
        return [tuple(each) for each in found], changed


_compiled: "weakref.WeakKeyDictionary[Any, tuple[Any, CompiledBatch]]" = weakref.WeakKeyDictionary()


def compiled_batch(model: Any) -> CompiledBatch | None:
    """The compiled function of a model. It is made anew if the model's code may have changed.

    None if Keras does not compile the model.
    """
    by_xla = bool(getattr(model, "jit_compile", False))
    key = [by_xla, *_code_of(model)]
    known = _compiled.get(model)
    if known is None or known[0] != key:
        known = key, CompiledBatch(by_xla)
        _compiled[model] = known
    return known[1] if known[1].is_compiled else None


def _code_of(model: Any) -> list[Any]:
    """What the traced code depends on: the layers, their variables, and all their attributes."""
    layers = _keras_internals.layers_at_any_depth(model)
    attributes = [
        (name, _Same(value))
        for layer in layers
        for name, value in sorted(vars(layer).items())
        if not OF_USE.fullmatch(name)
    ]
    return [*map(_Same, layers), *map(_Same, _variables_of(model)), *attributes]


class _Same:
    """Equals another one for the same object. It does not keep the object alive.

    A plain value, such as a number, is the same as an equal one.
    """

    def __init__(self, value: Any) -> None:
        self._plain = repr(value) if type(value) in PLAIN else None
        try:
            self._reference: Any = weakref.ref(value)
        except TypeError:  # lists, for example
            self._reference = None
        self._id = id(value)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Same) or self._plain != other._plain:
            return False
        if self._plain is not None:
            return True
        is_alive = self._reference is None or self._reference() is not None
        return self._id == other._id and is_alive

    __hash__ = None  # type: ignore[assignment]


def _variables_of(model: Any) -> Sequence[Any]:
    return list({id(v): v for v in model.variables}.values())


def _current(variable: Any, scope: Any) -> Any:
    value = scope.get_current_value(variable)
    return variable.value if value is None else value
