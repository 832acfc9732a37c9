"""Runs each train step of a model inside a context, even if the step is compiled.

Compiled code cannot see whether a swap takes place. So a model's compiled `train_function` is
replaced for some time by a function that enters the context and calls the compiled one. Nothing is
traced again.
"""

import contextlib
import functools
import weakref
from collections.abc import Callable
from typing import Any

import keras

MAKER = "make_train_function"
Context = Callable[[], contextlib.AbstractContextManager[Any]]


class WatchedFunction:
    """Replaces a model's `train_function` for some time.

    Args:
        function: The train function of the model.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.contexts: dict[Any, Context] = {}  # by the key that was passed to `watch`
        self.instead: dict[Any, Callable[..., Any]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with contextlib.ExitStack() as stack:
            for context in list(self.contexts.values()):
                stack.enter_context(context())
            function = self.function
            for instead in self.instead.values():
                function = functools.partial(instead, function)
            return function(*args, **kwargs)


def watch(model: Any, key: Any, context: Context) -> bool:
    """Let each train step of a model run in a context.

    Args:
        model: A Keras model.
        key: Hashable. It identifies the context, so that `leave` can remove it.
        context: Function without arguments that returns a context. It may raise.

    Returns:
        Whether the model has a train function. If not, the train step is not compiled yet.
    """
    function = getattr(model, "train_function", None)
    if function is None:
        return False
    if not isinstance(function, WatchedFunction):
        function = WatchedFunction(function)
        model.train_function = function
    function.contexts[key] = context
    return True


def replace(model: Any, key: Any, instead: Callable[..., Any]) -> None:
    """Let something else take the place of each train step of a model in `fit`.

    Args:
        model: A Keras model that has a train function.
        key: Hashable. Says whose it is.
        instead: Function of the train function, and of what that is called with.
    """
    watch(model, key, contextlib.nullcontext)
    model.train_function.instead[key] = instead


def leave(model: Any, key: Any) -> None:
    """Remove a context. After the last one, the model has its own train function again."""
    maker = vars(model).get(MAKER)
    if isinstance(maker, WatchedMaker):
        maker.contexts.pop(key, None)
        if not maker.contexts:
            del vars(model)[MAKER]
    function = getattr(model, "train_function", None)
    if isinstance(function, WatchedFunction):
        function.contexts.pop(key, None)
        function.instead.pop(key, None)
        if not function.contexts:
            model.train_function = function.function


class WatchedMaker:
    """Replaces a model's `make_train_function` for some time. It watches what that makes.

    Args:
        model: A Keras model. It is not kept alive.
    """

    def __init__(self, model: Any) -> None:
        self._model = weakref.ref(model)
        self.contexts: dict[Any, tuple[Context, Callable[[Any], bool]]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = self._model()
        made = type(model).make_train_function(model, *args, **kwargs)
        for key, (context, is_needed) in self.contexts.items():
            if is_needed(model):
                watch(model, key, context)
        return made if made is None else model.train_function


def watch_eager_steps(
    model: Any, key: Any, context: Context, is_needed: Callable[[Any], bool]
) -> None:
    """Watch each train function that the model makes until `leave` is called, if it runs eagerly.

    A step that will be compiled is traced first, and a context that raises during the trace stops
    it before anything changes. An eager step has no trace. Its forward pass has already changed
    batch-normalization statistics when the optimizer is called.

    Args:
        model: A Keras model.
        key: Hashable, as for `watch`.
        context: Function without arguments that returns a context, as for `watch`.
        is_needed: Function of the model. It is called for each train function that is made.
    """
    if hasattr(type(model), MAKER):
        own = vars(model)  # Not `setattr`, because Keras tracks attributes that are set with it.
        maker = own.get(MAKER)
        if not isinstance(maker, WatchedMaker):
            maker = own[MAKER] = WatchedMaker(model)
        maker.contexts[key] = context, lambda model: _is_eager(model) and is_needed(model)


def _is_eager(model: Any) -> bool:
    return keras.backend.backend() == "torch" or getattr(model, "run_eagerly", False)


def forget(model: Any) -> None:
    """Let a model make a new train function for the next step."""
    if getattr(model, "train_function", None) is not None:
        model.train_function = None
