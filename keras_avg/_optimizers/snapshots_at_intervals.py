"""The base of the rules that take a snapshot at regular steps of training."""

from typing import TYPE_CHECKING

from keras_avg import _checks
from keras_avg._optimizers.averaged_optimizer_wrapper import AveragedOptimizerWrapper
from keras_avg._types import Config, OptimizerLike, Tensor, WrapperKeywords

if TYPE_CHECKING:
    from typing_extensions import Unpack


class SnapshotsAtIntervals(AveragedOptimizerWrapper):
    """Takes a snapshot after update `start_averaging`, and then every `average_period` updates.

    Args:
        optimizer: The optimizer that takes the steps.
        start_averaging: Integer in [0, 2**31), in steps.
        average_period: Integer in [1, 2**31), in steps.
        name: String, or None.
        **kwargs: As for `AveragedOptimizerWrapper`.
    """

    def __init__(
        self,
        optimizer: OptimizerLike,
        start_averaging: int,
        average_period: int,
        name: str | None,
        **kwargs: "Unpack[WrapperKeywords]",
    ) -> None:
        start = _checks.whole_number("start_averaging", start_averaging, minimum=0)
        period = _checks.whole_number("average_period", average_period, minimum=1)
        super().__init__(optimizer, name=name, **kwargs)
        self.start_averaging = start
        self.average_period = period

    def is_due(self, step: Tensor) -> bool | Tensor:
        """Whether a snapshot follows update `step`."""
        since = step - self.start_averaging
        return (since >= 0) & (since % self.average_period == 0)

    def get_config(self) -> Config:
        """The arguments that construct an equal wrapper, in serializable form."""
        return super().get_config() | {
            "start_averaging": self.start_averaging,
            "average_period": self.average_period,
        }
