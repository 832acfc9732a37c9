"""Processes gradients before the inner optimizer sees them."""

from typing import Any

from keras import ops

from keras_avg import _keras_internals


def process(wrapper: Any, grads: list[Any], variables: list[Any], aggregate: bool) -> list[Any]:
    """Aggregate, transform and clip gradients. All of these see unscaled gradients.

    With a static `loss_scale_factor` the gradients come in scaled, and the inner optimizer divides
    them later. So this function divides them first, and multiplies them again at the end. It does
    not change `None` gradients, and gradients that overwrite their variable.

    Returns:
        The gradients for the inner optimizer, one for each variable, in the order of `variables`.
    """
    functions = list(wrapper.gradient_transformers)
    if aggregate and wrapper.gradient_aggregator is not None:
        functions.insert(0, wrapper.gradient_aggregator)
    clips = any((wrapper.clipnorm, wrapper.clipvalue, wrapper.global_clipnorm))
    if not functions and not clips:
        return grads
    chosen = [
        i
        for i, (grad, variable) in enumerate(zip(grads, variables, strict=True))
        if grad is not None and _keras_internals.is_averageable(variable)
    ]
    if not chosen:
        return grads

    scale = wrapper.loss_scale_factor
    pairs = [(_scaled(ops.divide, grads[i], scale), variables[i]) for i in chosen]
    for function in functions:
        pairs = _checked(function, function(list(pairs)), pairs)
    present = [i for i, (grad, _) in enumerate(pairs) if grad is not None]
    processed: list[Any] = [None] * len(pairs)
    results = [pairs[i][0] for i in present]
    if clips:
        results = _keras_internals.clip_gradients(wrapper, results)
    for i, grad in zip(present, results, strict=True):
        processed[i] = _scaled(ops.multiply, grad, scale)

    grads = list(grads)
    for i, grad in zip(chosen, processed, strict=True):
        grads[i] = grad
    return grads


def _scaled(operation: Any, grad: Any, scale: float | None) -> Any:
    return grad if scale is None else operation(grad, scale)


def _checked(function: Any, returned: Any, pairs: list[Any]) -> list[Any]:
    """The pairs that a gradient function has returned, in the order in which it got them."""
    try:
        by_variable = {id(variable): grad for grad, variable in returned}
    except (TypeError, ValueError):
        by_variable = {}
    if by_variable.keys() != {id(variable) for _, variable in pairs}:
        raise ValueError(
            "A gradient function must return one (gradient, variable) pair for each pair it was "
            f"given. Received: {returned!r} from {function!r} for {len(pairs)} pairs."
        )
    return [(by_variable[id(variable)], variable) for _, variable in pairs]
