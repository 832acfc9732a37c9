"""Steps as Keras 2 has them: from a loss, or from pairs of gradients and variables."""

from collections.abc import Callable, Iterable
from typing import Any

import keras
from keras import ops

from keras_avg import _backend, _keras_internals


class ClassicSteps(keras.optimizers.Optimizer):
    """Computes gradients, where Keras 3 leaves that to the trainer, and takes steps.

    Needs nothing but what every Keras optimizer has.
    """

    def minimize(
        self,
        loss: Any,
        var_list: Any,
        grad_loss: Any = None,
        name: str | None = None,
        tape: Any = None,
    ) -> Any:
        """Compute the gradients of a loss and take one step. What the loss does to state is kept.

        That is so on JAX too: batch-normalization statistics move on, and so do dropout's seeds.

        Args:
            loss: Function without arguments that returns the value to minimize (the sum of it, if
                it is not a scalar). On TensorFlow also a tensor, with its `tape`.
            var_list: List of variables, or a function that returns one; it is called after the
                loss, which may make the variables. (On JAX the loss is computed once more for
                that, before the first step; it changes nothing then.)
            grad_loss: Tensor of the loss's shape, or a scalar: weighs the gradient of each of its
                elements. Default None: 1.
            name: Not used; for compatibility.
            tape: `tf.GradientTape` on which `loss` was computed. TensorFlow only.

        Returns:
            `iterations`.

        Raises:
            ValueError: If `loss` is a tensor without its tape, an element of `var_list` is not a
                variable, or the loss depends on none of them.
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

    def get_gradients(self, loss: Callable[[], Any], params: list[Any]) -> list[Any]:
        """The gradients of a loss, as they are before any clipping or scaling.

        Args:
            loss: Function without arguments that returns the value. What it does to state is kept.
            params: List of variables.

        Returns:
            List of tensors, one for each variable.

        Raises:
            ValueError: If the loss does not depend on one of the variables.
        """
        return self._all_gradients_of(loss, params, ops.ones_like)[1]

    def get_updates(self, loss: Callable[[], Any], params: list[Any]) -> list[Any]:
        """Take one step, as `minimize`, but only if each variable has a gradient.

        Args:
            loss: Function without arguments that returns the value to minimize.
            params: List of variables.

        Returns:
            List of `iterations`.

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
        grads_and_vars: Iterable[tuple[Any, Any]],
        name: str | None = None,
        experimental_aggregate_gradients: bool = True,
    ) -> Any:
        """Take one step from gradients.

        Args:
            grads_and_vars: Iterable of `(gradient, variable)` pairs.
            name: Not used; for compatibility.
            experimental_aggregate_gradients: Bool. If False the gradients are summed over all
                replicas already: `gradient_aggregator` is not called, and a `tf.distribute`
                strategy, which in Keras 3 always sums, gets them divided by the number of replicas
                (after transformers and clipping). Default True.

        Returns:
            `iterations`.

        Raises:
            TypeError: If `grads_and_vars` does not consist of pairs, variables second.
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
        """For subclasses: what is done to the variables before gradients are computed of them."""

    def _refuse_training(self) -> None:
        """For subclasses: raise if the variables are not to be trained now."""

    def _apply_sums(self, grads: list[Any], variables: list[Any]) -> None:
        """For subclasses: take a step from gradients that are summed over all replicas already."""
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
        # JAX has gradients for frozen variables, TensorFlow for those that were frozen later.
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
    """What one replica gives to gradients that are summed over all replicas already."""
    return [
        _backend.part_of_sum(grad)
        if grad is not None and _keras_internals.is_averageable(variable)
        else grad
        for grad, variable in zip(grads, variables, strict=True)
    ]
