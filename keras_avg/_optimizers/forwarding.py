"""The part of a wrapper that is its inner optimizer's, under the same names."""

from collections.abc import Callable
from typing import Any

from keras_avg import _backend, _keras_internals
from keras_avg._optimizers import nesting, rates
from keras_avg._optimizers.storage import check_attached


class ForwardsToInnerOptimizer:
    """Hands on what belongs to `inner_optimizer`; callbacks that set the rate just work."""

    inner_optimizer: Any
    variables: list[Any]
    averages_in_model: bool
    built: bool
    _refuse_training_meanwhile: Callable[..., None]
    _refuse_training_under_another: Callable[[], None]
    raw_weights: Any

    @property
    def iterations(self) -> Any:
        """Real updates taken by the inner optimizer; accumulation micro-steps do not count."""
        check_attached([_keras_internals.step_counter(self.inner_optimizer)])
        return self.inner_optimizer.iterations

    @property
    def learning_rate(self) -> Any:
        """The inner optimizer's learning rate; settable where Keras has it settable."""
        check_attached([_keras_internals.step_counter(self.inner_optimizer)])
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: Any) -> None:
        check_attached([_keras_internals.step_counter(self.inner_optimizer)])
        self.inner_optimizer.learning_rate = rates.without_owner(learning_rate)

    @property
    def lr(self) -> Any:
        """The name `learning_rate` had in Keras 2."""
        return self.learning_rate

    @lr.setter
    def lr(self, learning_rate: Any) -> None:
        self.learning_rate = learning_rate

    @property
    def optimizers(self) -> list[Any]:
        """The members of a `MultiOptimizer` inside, whose rates Keras' callbacks set one by one.

        Raises:
            AttributeError: If the inner optimizer has no members.
        """
        return self.inner_optimizer.optimizers

    @property
    def loss_scale_factor(self) -> float | None:
        """The inner optimizer's static loss scale."""
        return self.inner_optimizer.loss_scale_factor

    @loss_scale_factor.setter
    def loss_scale_factor(self, factor: float | None) -> None:
        # Keras' constructor sets its default before there is an inner optimizer to hand it to.
        if "inner_optimizer" in self.__dict__:
            self.inner_optimizer.loss_scale_factor = factor

    def scale_loss(self, loss: Any) -> Any:
        """Scale `loss` as the inner optimizer does."""
        return self.inner_optimizer.scale_loss(loss)

    def exclude_from_weight_decay(
        self, var_list: list[Any] | None = None, var_names: list[str] | None = None
    ) -> None:
        """Exclude variables from the inner optimizer's weight decay, before it is built."""
        self.inner_optimizer.exclude_from_weight_decay(var_list, var_names)

    def finalize_variable_values(self, var_list: list[Any]) -> None:
        """Called by `fit` when training ends.

        Raises:
            RuntimeError: If the averages were in the model while it was trained, in code compiled
                before they were put in.
        """
        if not _keras_internals.reattach_state(self):
            return  # an error is on its way already
        if self.averages_in_model:
            self._refuse_training_meanwhile()
        if self.built:
            self._refuse_training_under_another()
        with self.raw_weights():  # Keras' own average (`use_ema`) goes there
            self.inner_optimizer.finalize_variable_values(var_list)
            if getattr(nesting.innermost(self), "use_ema", False):
                # On JAX it and the variables would share buffers, which the next `fit` refuses.
                _backend.assign_quotients(var_list, 1.0, var_list)
