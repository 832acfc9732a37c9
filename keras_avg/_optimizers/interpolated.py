"""The base of `ScheduleFree` and `PrimalAverage`, which train between an average and an iterate."""

from typing import TYPE_CHECKING, Any

from keras import ops

from keras_avg import _backend, _checks
from keras_avg._optimizers.averaged_optimizer_wrapper import AveragedOptimizerWrapper
from keras_avg._types import Config, OptimizerLike, Tensor, WrapperKeywords
from keras_avg._wrapping import nesting

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Interpolated(AveragedOptimizerWrapper):
    """Trains at a point between an average x and the iterate z of the inner optimizer.

    Args:
        optimizer: The optimizer that steps z.
        interpolation: Number in the range [0, 1]. How close the model's variables are to x.
        name: String, or None.
        **kwargs: As for `AveragedOptimizerWrapper`.
    """

    #: Each step computes the model's variables from x and z, so it would undo any other change.
    owns_variables = True

    def __init__(
        self,
        optimizer: OptimizerLike,
        interpolation: float,
        name: str | None,
        **kwargs: "Unpack[WrapperKeywords]",
    ) -> None:
        interpolation = _checks.fraction("interpolation", interpolation)
        super().__init__(optimizer, name=name, **kwargs)
        self._refuse_wrappers_inside()
        self.interpolation = interpolation

    # The papers keep x and z. At each step they compute  y = b x + (1 - b) z  and take the gradient
    # at y. Here the trainer takes the gradient at the model's variables, so these hold y. But the
    # inner optimizer was built for the same variables, and must step z. So they hold z while it
    # works:
    #     variables <- z;  the inner optimizer steps them;  z <- variables
    #     x <- x + c (z - x)
    #     variables <- x + (1 - b) (z - x)
    # The last line is y. In this form it equals x to the last bit if z equals x. It is computed
    # from x and z after every call, even if the call was not an update, so y is never stored. A
    # call that was not an update (a micro-step of gradient accumulation) must not change z.

    def stores(self) -> dict[str, str]:
        return {"average": "variable", "z": "variable"}

    def before_step(self) -> None:
        self.kept["z"].flow_back_if(True)

    def accumulate(self, due: bool | Tensor, step: Tensor) -> None:
        average = self.kept["average"]
        average.lerp_if(due, lambda: _backend.scalar(lambda: self.value_weight(step)))

    def get_config(self) -> Config:
        return super().get_config() | {"interpolation": self.interpolation}

    def _between(self, z: Any, x: Any) -> Any:
        """The point y, at which the gradient is taken."""
        return x + ops.cast(1.0 - self.interpolation, x.dtype) * (z - x)

    def _after_inner_step(self, step: Any, moved: Any) -> None:
        self.kept["z"].lerp_if(moved, lambda: 1.0)
        super()._after_inner_step(step, moved)
        self.kept["z"].show_if(True, self._between, self.kept["average"])

    def _after_averages_were_assigned(self) -> None:
        """Set z to the averages, because training goes on from there."""
        self.kept["z"].copy_from(self.kept["average"])

    def _refuse_wrappers_inside(self) -> None:
        kind = type(self).__name__
        inside = [each for each in nesting.walk(self.inner_optimizer) if nesting.wraps(each)]
        if inside:
            raise ValueError(
                f"{kind} must be the innermost averaging wrapper: the variables that its inner "
                f"optimizer steps are not those of the model. Received: {inside[0]!r} inside "
                f"{kind}. Nest the other way: {type(inside[0]).__name__}({kind}(...))."
            )
