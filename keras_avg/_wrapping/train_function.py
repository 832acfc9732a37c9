"""Runs each train step of a model inside a context, even if the step is compiled.

Compiled code cannot see whether a swap takes place. So a model's compiled `train_function` is
replaced for some time by a function that enters the context and calls the compiled one. Nothing is
traced again.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import keras

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
    function = getattr(model, "train_function", None)
    if isinstance(function, WatchedFunction):
        function.contexts.pop(key, None)
        function.instead.pop(key, None)
        if not function.contexts:
            model.train_function = function.function


def make_if_eager(model: Any) -> None:
    """Let a model that runs eagerly make its train function now, if it has none.

    A step that will be compiled is traced first, and a context that raises during the trace stops
    it before anything changes. An eager step has no trace. Its forward pass has already changed
    batch-normalization statistics when the optimizer is called.
    """
    is_eager = keras.backend.backend() == "torch" or getattr(model, "run_eagerly", False)
    is_ready = getattr(model, "compiled", False) and getattr(model, "train_function", 0) is None
    if is_eager and is_ready and getattr(model, "steps_per_execution", 1) == 1:
        model.make_train_function()


def forget(model: Any) -> None:
    """Let a model make a new train function for the next step."""
    if getattr(model, "train_function", None) is not None:
        model.train_function = None
