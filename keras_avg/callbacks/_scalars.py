"""Computes two numbers for the logs that describe an average."""

import math
from typing import Any

from keras import ops

from keras_avg import _backend


def of(wrappers: list[Any]) -> dict[str, float]:
    """`average/decay` of the first wrapper, and `average/distance` over the variables of all.

    The model must hold the raw weights. Without wrappers the dict is empty.
    """
    if not wrappers:
        return {}
    distance = math.hypot(*map(_distance, wrappers))
    return _decay(wrappers[0]) | {"average/distance": distance}


def _decay(wrapper: Any) -> dict[str, float]:
    try:
        weight = wrapper.value_weight(ops.convert_to_tensor(wrapper.updates_so_far() - 1))
    except NotImplementedError:  # The rule has no such number.
        return {}
    return {"average/decay": 1.0 - float(ops.convert_to_numpy(weight))}


def _distance(wrapper: Any) -> float:
    squares = [
        ops.cast(ops.sum(ops.square(_backend.value(variable, average.dtype) - average)), "float32")
        for variable, average in zip(wrapper.averaged_variables, wrapper.averages(), strict=True)
    ]
    return math.sqrt(float(ops.convert_to_numpy(ops.sum(ops.stack(squares)))))
