"""Refuses to run train steps that were compiled before averages were put into their model.

Compiled code cannot see that the model holds averages. So the compiled function gives way, for the
time of the swap, to one that asks first. It is the same compiled function: nothing is traced again.
"""

import weakref
from collections.abc import Callable, Iterable
from typing import Any


class GuardedFunction:
    """A model's `train_function` for the time in which averages are in the model.

    Args:
        function: The train function that was there.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.refusals: dict[Any, Callable[[], None]] = {}  # by the key of who asked for it

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for refuse in list(self.refusals.values()):
            refuse()
        return self.function(*args, **kwargs)


def close(models: Iterable[Any], key: Any, refuse: Callable[[], None]) -> None:
    """Let `refuse` be called before each train step of these models.

    Args:
        models: Iterable of Keras models.
        key: Hashable. Says whose refusal this is.
        refuse: Function without arguments that raises if training is not allowed. Kept weakly if
            it is a method.
    """
    reference = weakref.WeakMethod(refuse)

    def refuse_if_alive() -> None:
        if (method := reference()) is not None:
            method()

    for model in models:
        function = getattr(model, "train_function", None)
        if function is None:  # not compiled: the trace itself refuses
            continue
        if not isinstance(function, GuardedFunction):
            function = GuardedFunction(function)
            model.train_function = function
        function.refusals[key] = refuse_if_alive


def open_again(models: Iterable[Any], key: Any) -> None:
    """Take a refusal back; the last one gives the model its own function again."""
    for model in models:
        function = getattr(model, "train_function", None)
        if isinstance(function, GuardedFunction):
            function.refusals.pop(key, None)
            if not function.refusals:
                model.train_function = function.function
