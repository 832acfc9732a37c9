"""Runs a model on batches, compiled or eagerly, and gives the moments of its layers."""

import contextlib
from collections.abc import Iterator
from typing import Any

import keras

from keras_avg import _backend
from keras_avg._moments.compiled import CompiledBatch, compiled_batch
from keras_avg._moments.observer import Observer
from keras_avg._moments.pool import Moments

FEWEST = 10  # batches: for fewer, compiling costs more than it saves


@contextlib.contextmanager
def running(model: Any, observer: Observer, batches: int | None) -> Iterator["Batches"]:
    """Context of a pass over so many batches (None: not known). No variable changes in it."""
    compiled = None
    if (batches is None or batches >= FEWEST) and not getattr(model, "run_eagerly", False):
        compiled = compiled_batch(model)
    with contextlib.ExitStack() as stack:
        stack.enter_context(observer.observing())
        if compiled is not None:
            stack.enter_context(compiled.used_by(model, observer))
        yield Batches(model, observer, compiled, FEWEST - 1 if batches is None else 0)


class Batches:
    """Gives the moments in each batch of a pass.

    Batches with the shapes of the first one are compiled. All others, such as a short last one, run
    eagerly. If the model cannot be compiled, all run eagerly, and an error is raised there.

    Args:
        model: The model.
        observer: Notes the moments.
        compiled: The compiled function of the model. None: everything runs eagerly.
        eager: How many batches run eagerly before the first compiled one.
    """

    def __init__(
        self, model: Any, observer: Observer, compiled: CompiledBatch | None, eager: int = 0
    ) -> None:
        self._infer = _backend.eager_inference(lambda inputs: model(inputs, training=False))
        self._observer = observer
        self._compiled = compiled
        self._eager = eager
        self._kind: Any = None
        self._scope = keras.StatelessScope()  # It keeps all assignments away from the model.

    def moments(self, inputs: Any) -> list[Moments]:
        """The moments of all calls of the layers for one batch."""
        self._kind = self._kind or _kind_of(inputs)
        self._eager -= 1
        if self._compiled is not None and self._eager < 0 and _kind_of(inputs) == self._kind:
            # Code that cannot be compiled may raise anything. It is then run eagerly.
            try:
                return self._compiled.moments(inputs, self._scope)
            except Exception:
                failed, self._compiled = self._compiled, None
            found = self._eagerly(inputs)
            failed.give_up()  # Only now: if the batch is wrong, it has raised here too.
            return found
        return self._eagerly(inputs)

    def _eagerly(self, inputs: Any) -> list[Moments]:
        with self._scope:
            return self._observer.moments(self._infer, inputs)


def _kind_of(inputs: Any) -> str:
    """The structure, shapes and dtypes of a batch."""
    return str(
        keras.tree.map_structure(
            lambda x: f"{getattr(x, 'shape', type(x))} {getattr(x, 'dtype', '')}", inputs
        )
    )
