"""The step methods of Keras 2. They take a loss, or pairs of gradients and variables."""

from collections.abc import Callable, Iterable
from typing import Any

import keras
from keras import ops

from keras_avg import _backend, _keras_internals
from keras_avg._types import Loss, Tape, Tensor, Variable, Variables


class ClassicSteps(keras.optimizers.Optimizer):
    """Computes gradients and takes steps. In Keras 3, only the trainer computes gradients.

    The methods use only what every Keras optimizer has.
    """

    def minimize(
        self,
        loss: Loss | Tensor,
        var_list: Variables | Callable[[], Variables],
        grad_loss: Tensor | None = None,
        name: str | None = None,
        tape: Tape | None = None,
    ) -> keras.Variable:
        """Compute the gradients of a loss and take one step.

        If the loss changes state, the changes are kept, on JAX too. Examples are
        batch-normalization statistics and dropout seeds.

        Args:
            loss: Function without arguments that returns the value to minimize. If the value is not
                a scalar, its sum is minimized. On TensorFlow it may be a tensor, with its `tape`.
            var_list: List of variables, or a function that returns such a list. The function is
                called after the loss, because the loss may make the variables. (On JAX the loss is
                then computed one more time, before the first step. It changes no state that time.)
            grad_loss: Tensor of the loss's shape, or a scalar. It multiplies the gradient of each
                element of the loss. Default None: 1.
            name: Not used. It is here for compatibility.
            tape: `tf.GradientTape` that recorded the computation of `loss`. TensorFlow only.

        Returns:
            `iterations`.

        Raises:
            ValueError: If `loss` is a tensor without its tape, if an element of `var_list` is not a
                variable, or if the loss depends on none of the variables.
            RuntimeError: If the averages are in the model.

        Example:

        ```python
        optimizer = keras_avg.SWA(keras.optimizers.SGD(0.1))
        optimizer.minimize(lambda: 3 * v * v + 2 * w * w, var_list=[v, w])
        ```
        """

        def output_gradient(value: Any) -> Any:
            if grad_loss is None:
                return self.scale_loss(ops.ones_like(value))
            weights = ops.convert_to_tensor(grad_loss, value.dtype)
            return self.scale_loss(ops.broadcast_to(weights, ops.shape(value)))

        self._before_first_gradients(var_list)
        variables, grads = self._gradients_of(loss, var_list, output_gradient, tape)
        return self.apply_gradients(zip(grads, variables, strict=True), name=name)

    def get_gradients(self, loss: Loss, params: Variables) -> list[Tensor]:
        """The gradients of a loss, before clipping and scaling.

        Args:
            loss: Function without arguments that returns the value. If it changes state, the
                changes are kept.
            params: List of variables.

        Returns:
            List of tensors, one for each variable.

        Raises:
            ValueError: If the loss does not depend on one of the variables.
        """
        return self._all_gradients_of(loss, params, ops.ones_like)[1]

    def get_updates(self, loss: Loss, params: Variables) -> list[keras.Variable]:
        """Take one step like `minimize`, but only if each variable has a gradient.

        Args:
            loss: Function without arguments that returns the value to minimize.
            params: List of variables.

        Returns:
            A list with one element, `iterations`.

        Raises:
            ValueError: If the loss does not depend on one of the variables.
        """
        self._before_first_gradients(params)
        variables, grads = self._all_gradients_of(
            loss, params, lambda value: self.scale_loss(ops.ones_like(value))
        )
        return [self.apply_gradients(zip(grads, variables, strict=True))]

    def apply_gradients(
        self,
        grads_and_vars: Iterable[tuple[Tensor, Variable]],
        name: str | None = None,
        experimental_aggregate_gradients: bool = True,
    ) -> keras.Variable:
        """Take one step from gradients.

        Args:
            grads_and_vars: Iterable of `(gradient, variable)` pairs.
            name: Not used. It is here for compatibility.
            experimental_aggregate_gradients: Bool. False says that the gradients are already summed
                over all replicas. Then `gradient_aggregator` is not called. In Keras 3 a
                `tf.distribute` strategy always sums gradients. So they are divided by the number of
                replicas, after transformers and clipping. Default True.

        Returns:
            `iterations`.

        Raises:
            TypeError: If `grads_and_vars` does not consist of pairs with the variable second.
            ValueError: If there is no gradient in it.
            RuntimeError: If the averages are in the model.
        """
        grads, variables = _unzipped(grads_and_vars)
        if experimental_aggregate_gradients:
            self.apply(grads, variables)
        else:
            self._apply_sums(grads, variables)
        return self.iterations

    def _before_first_gradients(self, var_list: Any) -> None:
        """Hook for subclasses. It runs before the first gradients are computed."""

    def _refuse_training(self) -> None:
        """Hook for subclasses. It raises if the variables must not be trained now."""

    def _apply_sums(self, grads: list[Any], variables: list[Any]) -> None:
        """Hook for subclasses. It takes a step from gradients already summed over all replicas."""
        self.apply(parts_of_sums(grads, variables), variables)

    def _gradients_of(
        self, loss: Any, var_list: Any, output_gradient: Callable[[Any], Any], tape: Any = None
    ) -> tuple[list[Any], list[Any]]:
        _check_loss(loss, tape)
        if self.built:
            _keras_internals.check_attached(self.variables)
            self._refuse_training()
        known = self.built or not callable(var_list)
        variables, grads = _backend.loss_gradients(
            loss,
            variables_in(var_list) if known else lambda: variables_in(var_list),
            output_gradient,
            tape,
        )
        # JAX also gives gradients for frozen variables. TensorFlow gives them for variables that
        # were frozen after they were made. Frozen variables must have none.
        pairs = zip(grads, variables, strict=True)
        return variables, [g if getattr(v, "trainable", True) else None for g, v in pairs]

    def _all_gradients_of(
        self, loss: Any, params: Any, output_gradient: Callable[[Any], Any]
    ) -> tuple[list[Any], list[Any]]:
        variables, grads = self._gradients_of(loss, params, output_gradient)
        without = [
            _keras_internals.path_of(v) for g, v in zip(grads, variables, strict=True) if g is None
        ]
        if without:
            raise ValueError(
                f"The loss has no gradient for the variables {without}: it does not depend on "
                "them, through differentiable operations, or they are frozen. Leave them out."
            )
        return variables, grads


def _check_loss(loss: Any, tape: Any) -> None:
    on_tensorflow = keras.backend.backend() == "tensorflow"
    if tape is not None and not on_tensorflow:
        raise ValueError(
            f"Received: tape={tape!r}, but tapes are TensorFlow's, and the backend is "
            f"{keras.backend.backend()}. Pass the loss as a function without arguments."
        )
    if tape is not None and not hasattr(tape, "watched_variables"):
        raise TypeError(f"`tape` must be a `tf.GradientTape`. Received: tape={tape!r}.")
    if not callable(loss) and tape is None:
        wanted = " or pass the `tf.GradientTape` that recorded it as `tape`" * on_tensorflow
        raise ValueError(
            "A value does not tell how it was computed, so there are no gradients of it. Received: "
            f"loss={loss!r}. Pass a function without arguments that returns it{wanted}."
        )


def variables_in(var_list: Any) -> list[Any]:
    found = var_list() if callable(var_list) else var_list
    found = [found] if hasattr(found, "assign") else list(found)
    others = [thing for thing in found if not hasattr(thing, "assign")]
    if others:
        raise ValueError(f"`var_list` must be a list of variables. Received in it: {others}.")
    _keras_internals.check_attached(found)
    return found


def _unzipped(grads_and_vars: Iterable[tuple[Any, Any]]) -> tuple[list[Any], list[Any]]:
    pairs = list(grads_and_vars)
    try:
        grads, variables = [grad for grad, _ in pairs], [variable for _, variable in pairs]
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"`grads_and_vars` must consist of (gradient, variable) pairs. Received: {pairs!r}."
        ) from error
    if others := [type(v).__name__ for v in variables if not hasattr(v, "assign")]:
        raise TypeError(
            "`grads_and_vars` must consist of (gradient, variable) pairs, in this order. Received "
            f"as variables: {', '.join(others)}."
        )
    if all(grad is None for grad in grads):
        raise ValueError(
            f"No gradients provided for any variable. Received: {len(pairs)} pairs without a "
            f"gradient, for {[_keras_internals.path_of(v) for v in variables]}. Does the loss "
            "depend on them?"
        )
    return grads, variables


def parts_of_sums(grads: list[Any], variables: list[Any]) -> list[Any]:
    """One replica's part of gradients that are already summed over all replicas."""
    return [
        _backend.part_of_sum(grad)
        if grad is not None and _keras_internals.is_averageable(variable)
        else grad
        for grad, variable in zip(grads, variables, strict=True)
    ]
