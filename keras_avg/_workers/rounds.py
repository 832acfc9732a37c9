"""The steps after which the workers of a ModelAverage take a round. Steps count from 1."""

from typing import NamedTuple


class Rounds(NamedTuple):
    """There is a round after each step up to `start_step`, then every `interval_steps` steps.

    Attributes:
        interval_steps: Integer >= 1.
        start_step: Integer >= 0.
    """

    interval_steps: int
    start_step: int

    def last_due(self, step: int) -> int:
        """The last of the steps 1, 2, ... `step` after which a round takes place, or 0 if none."""
        if step <= self.start_step:
            return step
        return step - (step - self.start_step) % self.interval_steps

    def next_due(self, step: int) -> int:
        """The first step later than `step` after which a round takes place."""
        if step < self.start_step:
            return step + 1
        return self.last_due(step) + self.interval_steps
