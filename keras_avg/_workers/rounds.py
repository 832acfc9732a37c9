"""When the workers of a ModelAverage meet: a matter of step numbers, the first of which is 1."""

from typing import NamedTuple


class Rounds(NamedTuple):
    """A round after each step up to `start_step`, then after every `interval_steps` of them.

    Attributes:
        interval_steps: Integer >= 1.
        start_step: Integer >= 0.
    """

    interval_steps: int
    start_step: int

    def last_due(self, step: int) -> int:
        """The last of the steps 1, 2, ... `step` after which a round takes place; 0 if none."""
        if step <= self.start_step:
            return step
        return step - (step - self.start_step) % self.interval_steps

    def next_due(self, step: int) -> int:
        """The first step after `step` (the first of all is 1) after which there is a round."""
        if step < self.start_step:
            return step + 1
        return self.last_due(step) + self.interval_steps
