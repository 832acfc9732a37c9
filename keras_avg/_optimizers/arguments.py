"""What the wrappers' constructors accept. A check returns the value to keep or says what to do."""

import copy
import math
import numbers
import operator
from collections.abc import Callable
from typing import Any

import keras

from keras_avg import _backend, _keras_internals, distributed
from keras_avg._optimizers import nesting


def inner_optimizer(identifier: Any, wrapper: str) -> Any:
    """The optimizer to wrap, from all that `keras.optimizers.get` takes."""
    if identifier is None:
        raise TypeError(
            f"{wrapper} wraps another optimizer, which takes the steps. Received: optimizer=None. "
            f'Pass a Keras optimizer, its name or its config: {wrapper}("adam").'
        )
    if isinstance(identifier, dict):
        identifier = copy.deepcopy(identifier)  # Keras rewrites the config it is given
    optimizer = keras.optimizers.get(identifier)
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        raise ValueError(
            f"{wrapper} cannot wrap a LossScaleOptimizer: under mixed_float16 `compile` adds one "
            f"outside by itself, and the loss would be scaled twice. Received: "
            f"optimizer={optimizer!r}. Wrap the other way: LossScaleOptimizer({wrapper}(...))."
        )
    refuse_accumulating_members(optimizer, wrapper)
    refuse_what_must_be_outermost(optimizer, wrapper)
    return optimizer


def refuse_what_must_be_outermost(optimizer: Any, wrapper: str) -> None:
    """Workers meet once a round, with all the averages there are inside."""
    for each in nesting.walk(optimizer):
        if getattr(each, "must_be_outermost", False):
            kind = type(each).__name__
            raise ValueError(
                f"{kind} must be the outermost averaging wrapper. Received: a {kind} inside "
                f"{wrapper}. Nest the other way: {kind}({wrapper}(...)) averages {wrapper}'s "
                "averages over the workers too."
            )


def outer_optimizer(identifier: Any) -> Any:
    """The optimizer of the center, or None."""
    if identifier is None:
        return None
    if isinstance(identifier, dict):
        identifier = copy.deepcopy(identifier)  # Keras rewrites the config it is given
    optimizer = keras.optimizers.get(identifier)
    if nesting.wraps(optimizer) or optimizer.gradient_accumulation_steps:
        raise ValueError(
            "`outer_optimizer` takes one plain step along center - mean at each round. Received: "
            f"outer_optimizer={optimizer!r}. Pass an optimizer that wraps nothing and accumulates "
            "nothing, such as keras.optimizers.SGD(0.7, momentum=0.9, nesterov=True)."
        )
    return optimizer


def names_apart(outer: Any, others: list[Any]) -> None:
    """Variables are told apart by their optimizers' names, in Keras' state tree."""
    if outer is None:
        return
    # Older versions of Keras give all optimizers of a class one name, which is then nobody's wish.
    has_own_name = outer.name.lower() != type(outer).__name__.lower()
    if any(o is outer or (has_own_name and o.name == outer.name) for o in others):
        raise ValueError(
            "`outer_optimizer` must be another optimizer than those inside, of another name. "
            f"Received: outer_optimizer={outer!r} named '{outer.name}', as one of {others}. Give "
            "it a name of its own."
        )


def communicator(given: Any, num_worker: Any, is_chief: Any) -> Any:
    """The communicator to use, which must be what the caller believes."""
    chosen = distributed.initialize() if given is None else given
    members = ("rank", "size", "is_chief", "all_reduce_sum")
    if isinstance(chosen, type) or not all(hasattr(chosen, member) for member in members):
        raise TypeError(
            f"`communicator` must have {', '.join(members)} and `barrier`, as a "
            f"keras_avg.distributed.Communicator. Received: communicator={chosen!r}."
        )
    if num_worker is not None and num_worker != chosen.size:
        raise ValueError(
            f"There are {chosen.size} workers. Received: num_worker={num_worker!r}. Leave it out, "
            "or start as many workers by the backend's launcher."
        )
    if is_chief is not None and bool(is_chief) != chosen.is_chief:
        raise ValueError(
            f"The chief is the worker of rank 0, and this is rank {chosen.rank}. Received: "
            f"is_chief={is_chief!r}. Leave it out."
        )
    return chosen


def one_of(argument: str, value: Any, choices: tuple[str, ...]) -> str:
    if value in choices:
        return value
    raise ValueError(f"`{argument}` must be one of {choices}. Received: {argument}={value!r}.")


def refuse_accumulating_members(optimizer: Any, wrapper: str) -> None:
    """A MultiOptimizer counts micro-steps, so nobody outside can tell its real updates."""
    for member in nesting.members(optimizer):
        accumulated = nesting.innermost(member).gradient_accumulation_steps
        if accumulated:
            raise ValueError(
                f"{wrapper} cannot wrap a MultiOptimizer whose members accumulate gradients: its "
                "`iterations` count micro-steps, not updates. Received: the member "
                f"{member.name!r} with gradient_accumulation_steps={accumulated}. Wrap the members "
                "instead."
            )


def refuse_other_variables(optimizer: Any, variables: list[Any], wrapper: str) -> None:
    """An optimizer that is built already keeps its variables."""
    unknown = [v for v in variables if _keras_internals.variable_index(optimizer, v) is None]
    if unknown:
        raise ValueError(
            f"{wrapper} wraps an optimizer that was built for other variables. Received: "
            f"{[getattr(v, 'path', v.name) for v in unknown]}. Wrap a new optimizer."
        )


def refuse_built_outer_optimizer(optimizer: Any, wrapper: str) -> None:
    """It is built for the centers, which are nobody else's."""
    if optimizer is not None and optimizer.built:
        raise ValueError(
            f"{wrapper} needs an outer optimizer of its own, and this was built for other "
            f"variables. Received: outer_optimizer={optimizer!r}. Pass a new one."
        )


def whole_number(argument: str, value: Any, minimum: int, unit: str = "steps") -> int:
    """An integer that compiled code can compare with steps, which most backends count in int32."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or not minimum <= number < 2**31:
        raise ValueError(
            f"`{argument}` must be an integer >= {minimum} and < 2**31, in {unit}. "
            f"Received: {argument}={value!r}.{_in_steps(value) if unit == 'steps' else ''}"
        )
    return number


def _in_steps(value: Any) -> str:
    share = number(value)
    if not 0.0 < share < 1.0:
        return ""
    return f" For a share of the whole run pass int({value!r} * epochs * steps_per_epoch)."


def fraction(argument: str, value: Any) -> float:
    found = number(value)
    if not 0.0 <= found <= 1.0:
        raise ValueError(
            f"`{argument}` must be a number in the range [0, 1]. Received: {argument}={value!r}."
        )
    return found


def truth(argument: str, value: Any, meant: str = "") -> bool:
    if isinstance(value, bool):
        return value
    if meant and isinstance(value, numbers.Real):
        meant = f" Did you mean {meant}={value!r}? Pass it by name."
    else:
        meant = ""
    raise TypeError(f"`{argument}` must be True or False. Received: {argument}={value!r}.{meant}")


def variable_scope_name(value: Any) -> str | None:
    if value is None or (isinstance(value, str) and value and "/" not in value):
        return value
    raise ValueError(f"`name` must be a non-empty string without '/'. Received: name={value!r}.")


def average_dtype(value: Any) -> str | None:
    if value is None:
        return None
    dtype = keras.backend.standardize_dtype(value)
    if not keras.backend.is_float_dtype(dtype):
        raise ValueError(f"Averages need a float dtype. Received: average_dtype={value!r}.")
    if dtype == "float64" and _backend.widest_float() != dtype:
        raise ValueError(
            "Received: average_dtype='float64', but JAX keeps float64 only when it is told to: "
            'set `jax.config.update("jax_enable_x64", True)` at the start of the program.'
        )
    return dtype


def gradient_functions(aggregator: Any, transformers: Any) -> tuple[Callable | None, list]:
    if aggregator is not None and not callable(aggregator):
        raise TypeError(
            "`gradient_aggregator` must be a function of a list of (gradient, variable) pairs. "
            f"Received: gradient_aggregator={aggregator!r}."
        )
    if callable(transformers) or not all(callable(f) for f in transformers or ()):
        raise TypeError(
            "`gradient_transformers` must be a list of functions of a list of (gradient, variable) "
            f"pairs. Received: gradient_transformers={transformers!r}."
        )
    return aggregator, list(transformers or ())


def number(value: Any) -> float:
    """A number as a float, NaN for all else."""
    if isinstance(value, keras.Variable):  # torch warns of `float` of one that is trained
        value = keras.ops.convert_to_numpy(value)
    try:
        return math.nan if isinstance(value, bool | str) else float(value)
    except (TypeError, ValueError):
        return math.nan
