"""Something around each train step of a model, compiled or not.

Compiled code cannot see what happens around it. So a model's compiled `train_function` gives way,
for a time, to one that does something before and after it. It calls the same compiled function:
nothing is traced again.
"""

import contextlib
from collections.abc import Callable
from typing import Any

Context = Callable[[], contextlib.AbstractContextManager[Any]]


class WatchedFunction:
    """A model's `train_function` for a time.

    Args:
        function: The train function that was there.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.contexts: dict[Any, Context] = {}  # by the key of who asked for it

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with contextlib.ExitStack() as stack:
            for context in list(self.contexts.values()):
                stack.enter_context(context())
            return self.function(*args, **kwargs)


def watch(model: Any, key: Any, context: Context) -> bool:
    """Let each train step of a model run in a context.

    Args:
        model: A Keras model.
        key: Hashable. Says whose context this is.
        context: Function without arguments that gives a context. It may raise.

    Returns:
        Whether the model has a train function. If not, it is not compiled yet.
    """
    function = getattr(model, "train_function", None)
    if function is None:
        return False
    if not isinstance(function, WatchedFunction):
        function = WatchedFunction(function)
        model.train_function = function
    function.contexts[key] = context
    return True


def leave(model: Any, key: Any) -> None:
    """Take a context away; with the last one the model has its own function again."""
    function = getattr(model, "train_function", None)
    if isinstance(function, WatchedFunction):
        function.contexts.pop(key, None)
        if not function.contexts:
            model.train_function = function.function


def forget(model: Any) -> None:
    """Let a model make its train function anew the next time."""
    if getattr(model, "train_function", None) is not None:
        model.train_function = None
