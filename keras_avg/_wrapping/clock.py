"""Counts real updates. It reads the step counter of the inner optimizer."""

from typing import Any

from keras_avg import _backend, _keras_internals
from keras_avg._wrapping import nesting


class Clock:
    """Counts the real updates of an optimizer. Micro-steps of gradient accumulation do not count.

    Args:
        optimizer: The optimizer that takes the steps, or wraps it.
        counts_every_step: Bool. Whether each call of its `apply` is known to be an update.
    """

    def __init__(self, optimizer: Any, counts_every_step: bool) -> None:
        self._counter = _backend.Counter(_keras_internals.step_counter(optimizer))
        self._accumulated = nesting.innermost(optimizer).gradient_accumulation_steps or 1
        self._counts_every_step = counts_every_step

    def read(self) -> Any:
        """The value of the counter. Read it before each step, and pass it to `step_since`."""
        return self._counter.read()

    def step_since(self, before: Any) -> tuple[Any, Any]:
        """Call it after each step. It returns the number of the update, and whether there was one.

        The first update is 0.
        """
        step = self._updates(before)
        after = self._updates(self._counter.read_after_step())
        return step, self._counts_every_step or step != after

    def updates(self) -> Any:
        """The number of updates so far."""
        return self._updates(self.read())

    def is_being_compiled(self) -> bool:
        """Whether this runs in code that is being compiled."""
        return _backend.concrete(self.read()) is None

    def _updates(self, count: Any) -> Any:
        return count if self._accumulated == 1 else count // self._accumulated
