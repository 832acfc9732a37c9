"""An optimizer that wraps another: construction, state, config and steps, but no averages."""

from collections.abc import Sequence
from typing import Any, TypeVar

import keras
import numpy as np
from keras import ops

from keras_avg import _backend, _checks, _keras_internals
from keras_avg._keras2.classic_steps import parts_of_sums
from keras_avg._types import Config, GradientFunction, OptimizerLike, Rate, Tensor, Variable
from keras_avg._wrapping import (
    arguments,
    bindings,
    configs,
    fitting,
    gradients,
    keywords,
    rates,
    train_function,
)
from keras_avg._wrapping.classic_slots import ClassicSlots
from keras_avg._wrapping.clock import Clock

Wrapper = TypeVar("Wrapper", bound="OptimizerWrapper")


class OptimizerWrapper(ClassicSlots):
    """Lets another optimizer take the steps. A subclass acts before and after each step.

    Args:
        optimizer: The optimizer that takes the steps: a Keras optimizer, its name, or its config.
        name: String, or None. Scope of the variables' names.
        gradient_transformers: List of functions of a list of `(gradient, variable)` pairs, or None.
        gradient_aggregator: A function like a gradient transformer, or None.
        **kwargs: `clipnorm`, `clipvalue`, `global_clipnorm`, `learning_rate`, `lr`, `decay`.
    """

    inner_optimizer: keras.optimizers.Optimizer

    def __init__(
        self,
        optimizer: OptimizerLike,
        name: str | None,
        gradient_transformers: Sequence[GradientFunction] | None = None,
        gradient_aggregator: GradientFunction | None = None,
        **kwargs: Any,
    ) -> None:
        kind = type(self).__name__
        clipping, rate = keywords.split(type(self), kwargs)
        inner = arguments.inner_optimizer(optimizer, kind)
        aggregator, transformers = arguments.gradient_functions(
            gradient_aggregator, gradient_transformers
        )
        # The rate belongs to the inner optimizer. If it is a callable here, Keras makes no variable
        # for it.
        super().__init__(
            learning_rate=lambda: self.inner_optimizer.learning_rate,
            name=_checks.scope_name(name),
            **clipping,
        )
        rates.set_rate(inner, kind, rate)
        _keras_internals.share_step_counter(self, inner)
        self.inner_optimizer = inner
        self.gradient_aggregator = aggregator
        self.gradient_transformers = transformers

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute. A hyper-parameter can be set only before the optimizer is built.

        Raises:
            AttributeError: If a hyper-parameter would change after that. Compiled training would
                not notice the change.
        """
        if vars(self).get("built"):
            configs.refuse_change(self, name, value)
        super().__setattr__(name, value)

    # These properties belong to the inner optimizer, and have the same names here.

    @property
    def iterations(self) -> keras.Variable:
        """The number of real updates so far. Micro-steps of gradient accumulation do not count."""
        _keras_internals.check_attached([_keras_internals.step_counter(self.inner_optimizer)])
        return self.inner_optimizer.iterations

    def updates_so_far(self) -> int:
        """`iterations` as a Python integer. For use outside compiled code."""
        return int(ops.convert_to_numpy(self.iterations))

    @property
    def learning_rate(self) -> Tensor:
        """The inner optimizer's learning rate. It can be set where Keras allows it."""
        _keras_internals.check_attached([_keras_internals.step_counter(self.inner_optimizer)])
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: Rate) -> None:
        _keras_internals.check_attached([_keras_internals.step_counter(self.inner_optimizer)])
        self.inner_optimizer.learning_rate = rates.without_owner(learning_rate)

    @property
    def lr(self) -> Tensor:
        """The learning rate, under its name in Keras 2."""
        return self.learning_rate

    @lr.setter
    def lr(self, learning_rate: Rate) -> None:
        self.learning_rate = learning_rate

    @property
    def optimizers(self) -> list[keras.optimizers.Optimizer]:
        """The members of an inner `MultiOptimizer`. Keras' callbacks set the rate of each member.

        Raises:
            AttributeError: If the inner optimizer has no members.
        """
        multi_optimizer: Any = self.inner_optimizer
        return multi_optimizer.optimizers

    @property
    def loss_scale_factor(self) -> float | None:
        """The inner optimizer's static loss scale."""
        return self.inner_optimizer.loss_scale_factor

    @loss_scale_factor.setter
    def loss_scale_factor(self, factor: float | None) -> None:
        # Keras' constructor sets a default before there is an inner optimizer.
        if "inner_optimizer" in self.__dict__:
            self.inner_optimizer.loss_scale_factor = factor

    def scale_loss(self, loss: Tensor) -> Tensor:
        """Scale `loss` as the inner optimizer does."""
        return self.inner_optimizer.scale_loss(loss)

    def exclude_from_weight_decay(
        self, var_list: list[Variable] | None = None, var_names: list[str] | None = None
    ) -> None:
        """Exclude variables from the inner optimizer's weight decay, before it is built."""
        self.inner_optimizer.exclude_from_weight_decay(var_list, var_names)

    # The state as lists. A subclass adds the state in files.

    @property
    def variables(self) -> list[Variable]:
        """The wrapper's own variables (counters, stores, added ones), then the inner ones."""
        self._before_state_is_read()
        own = self._own_variables.by_name.values()
        return _keras_internals.unless_loaded_around([*own, *self.inner_optimizer.variables])

    @property
    def weights(self) -> list[Variable]:
        """The variables, under their name in Keras 2."""
        return self.variables

    def get_weights(self) -> list[np.ndarray]:
        """The values of `variables` as NumPy arrays, in the same order."""
        _keras_internals.check_attached(self.variables)
        return [ops.convert_to_numpy(variable) for variable in self.variables]

    def set_weights(self, weights: Sequence[np.ndarray | Tensor]) -> None:
        """Set `variables` from a list of arrays, as `get_weights` returns it.

        If an array does not fit, no variable is changed.

        Raises:
            ValueError: If the optimizer has not been built, or if the number of arrays or a shape
                differs from that of the variables.
        """
        built_for_some = self.built and _keras_internals.built_variables(self)
        if not built_for_some and len(weights) != len(self.variables):
            # Keras' loader of legacy `.h5` files builds every optimizer with an empty list of
            # variables. This build must not count.
            self.built = False
            raise ValueError(
                f"You are calling `set_weights()` on '{self.name}', which has no variables to "
                "set before it is built. Call `optimizer.build(model.trainable_variables)`, or "
                "take a first step."
            )
        _keras_internals.check_attached(self.variables)
        variables = {str(i): variable for i, variable in enumerate(self.variables)}
        values = {str(i): weight for i, weight in enumerate(weights)}
        fitting.check_fit(self.name, variables, values)
        fitting.check_numbers(self.name, variables, values)
        fitting.assign(variables, values)
        self._after_state_was_set()

    def get_config(self) -> Config:
        """The arguments that construct an equal wrapper, in serializable form.

        Returns:
            A dict. The learning rate is not in it, because it is in the inner optimizer's config.

        Raises:
            ValueError: If a gradient function is not registered with Keras.
        """
        _keras_internals.check_attached(self.inner_optimizer.variables)
        return configs.of_wrapper(self)

    @classmethod
    def from_config(
        cls: type[Wrapper], config: Config, custom_objects: dict[str, Any] | None = None
    ) -> Wrapper:
        """Construct a wrapper from a config of `get_config`, here or in TensorFlow Addons.

        Args:
            config: Dict. It is not changed.
            custom_objects: Dict from names to classes and functions that are not registered.

        Returns:
            A new wrapper. It is not built.

        Raises:
            ValueError: If an argument is unknown or out of range. If the config is of Keras 2, and
                Keras 3 has no counterpart for an optimizer or a schedule in it.

        Example:

        ```python
        inner = {"class_name": "SGD", "config": {"learning_rate": 0.1, "decay": 0.01}}
        optimizer = keras_avg.SWA.from_config({"optimizer": inner, "average_period": 5})
        ```
        """
        return cls(**configs.arguments_in(config, custom_objects))

    # Steps.

    def build(self, variables: list[Variable]) -> None:
        """Make the optimizer's own variables, and build the inner optimizer."""
        variables = list(variables)
        if self.built and (not variables or _keras_internals.built_variables(self)):
            return
        kind = type(self).__name__
        if self.inner_optimizer.built:
            arguments.refuse_other_variables(self.inner_optimizer, variables, kind)
        elif variables:  # An optimizer is built once: it could not be built for later variables.
            with _backend.outside_trace(variables):
                self.inner_optimizer.build(variables)
        arguments.refuse_accumulating_members(self.inner_optimizer, kind)
        arguments.refuse_what_must_be_outermost(self.inner_optimizer, kind)
        self._clock = Clock(self.inner_optimizer, self._counts_every_step())
        with _backend.outside_trace():
            self._make_state(variables)
        super().build(variables)
        bindings.note_built(self)
        self._after_build()

    def apply(self, grads: list[Tensor], trainable_variables: list[Variable] | None = None) -> None:
        """Let the inner optimizer take a step, then average if an averaging is due.

        Args:
            grads: List of gradients, as the inner optimizer takes them.
            trainable_variables: List of the variables to which the gradients belong. Default None:
                the variables with which the optimizer was built.

        Raises:
            RuntimeError: If the averages are in the model.
        """
        self._take_step(list(grads), trainable_variables, aggregate=True)

    def _apply_sums(self, grads: list[Any], variables: list[Any]) -> None:
        self._take_step(grads, variables, aggregate=False)

    def _take_step(self, grads: list[Any], variables: list[Any] | None, aggregate: bool) -> None:
        if not grads:
            return
        _keras_internals.check_attached([_keras_internals.step_counter(self)])
        variables = self._variables_for(grads, variables)
        if self._clock.is_being_compiled():
            bindings.note_training_model(self)
            self._refuse_compiled_training()
        else:
            self._refuse_training()
        with _backend.after(grads):
            grads = gradients.process(self, grads, variables, aggregate)
            if not aggregate:
                grads = parts_of_sums(grads, variables)
            before = self._clock.read()
            self._before_inner_step()
            self.inner_optimizer.apply(grads, variables)
            self._after_inner_step(*self._clock.step_since(before))

    def _refuse_compiled_training(self) -> None:
        try:
            self._refuse_training()
        except RuntimeError:
            # TensorFlow cannot trace the same function again after a trace that failed.
            for model in bindings.models_of([self]):
                train_function.forget(model)
            _keras_internals.keep_state_of_refused_step()
            raise

    def _variables_for(self, grads: list[Any], variables: list[Any] | None) -> list[Any]:
        if variables is not None:
            variables = list(variables)
            if not self.built or not _keras_internals.built_variables(self):
                self.build(variables)
        elif self.built:
            variables = _keras_internals.built_variables(self)
        else:
            raise ValueError(
                "The first `apply` needs the variables too, to build the optimizer. Received: "
                f"{len(grads)} gradients and no variables. Pass `trainable_variables`, or call "
                "`optimizer.build(trainable_variables)` first."
            )
        if len(grads) != len(variables):
            raise ValueError(
                "Gradients and variables belong together one to one. Received: "
                f"{len(grads)} gradients for {len(variables)} variables."
            )
        return variables

    def _counts_every_step(self) -> bool:
        """Whether each `apply` of the inner optimizer is known to be a real update."""
        inner = self.inner_optimizer
        if isinstance(inner, OptimizerWrapper):
            leaves_apply = type(inner).apply is OptimizerWrapper.apply
            return leaves_apply and inner._counts_every_step()
        return _keras_internals.counts_every_step(inner)

    # Hooks for subclasses. The methods above call each one at the moment that its name says.

    def _make_state(self, variables: list[Any]) -> None: ...

    def _after_build(self) -> None: ...

    def _before_state_is_read(self) -> None: ...

    def _after_state_was_set(self) -> None: ...

    def _before_inner_step(self) -> None: ...

    def _after_inner_step(self, step: Any, moved: Any) -> None: ...
