"""Names for the types in public signatures. An editor shows these names where a user types a call.

Keras has no types for tensors: each backend has a class of its own. So `Tensor`, `Variable` and
`Data` accept anything when types are checked. Their names still say what is meant.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias, TypedDict

import keras

Tensor: TypeAlias = Any
"""A tensor of the backend, inside compiled code or outside of it, or an array."""

Variable: TypeAlias = keras.Variable | Any
"""A Keras variable. On TensorFlow it may also be a `tf.Variable`."""

Data: TypeAlias = Any
"""Whatever `model.fit` takes as `x`: arrays, a dataset, a data loader, or a generator."""

Config: TypeAlias = dict[str, Any]
"""The arguments of an object, in serializable form."""

Logs: TypeAlias = dict[str, Any] | None
"""The metrics that Keras passes to the methods of a callback."""

Path: TypeAlias = str | os.PathLike[str]
"""A path of a file or of a folder."""

DType: TypeAlias = str | type | Any
"""The name of a dtype, such as `"float32"`, or a dtype object of NumPy or of the backend."""

OptimizerLike: TypeAlias = keras.optimizers.Optimizer | str | dict[str, Any]
"""An optimizer, its name, or its config."""

Rate: TypeAlias = (
    float | keras.Variable | keras.optimizers.schedules.LearningRateSchedule | Callable[[], Any]
)
"""A learning rate, as the optimizers of Keras take it."""

GradientFunction: TypeAlias = Callable[
    [list[tuple[Tensor, Variable]]], Iterable[tuple[Tensor, Variable]]
]
"""A function from `(gradient, variable)` pairs to such pairs."""

Initializer: TypeAlias = str | Callable[..., Tensor]
"""The name of a Keras initializer, or a function of `shape` and `dtype`."""

Loss: TypeAlias = Callable[[], Tensor]
"""A function without arguments that computes the value to minimize."""

Variables: TypeAlias = Iterable[Variable] | Variable
"""Variables, or one variable."""

Tape: TypeAlias = Any
"""A `tf.GradientTape`."""

Aggregation: TypeAlias = str | Any
"""How a strategy combines the replicas' values: a string, or a `tf.VariableAggregation`."""


class DecayingInnerKeywords(TypedDict, total=False):
    """Keywords for the inner optimizer. The rule has a decay of its own."""

    clipnorm: float | None
    clipvalue: float | None
    global_clipnorm: float | None
    learning_rate: Rate
    lr: Rate


class DecayingAverageKeywords(DecayingInnerKeywords, total=False):
    """Keywords of a wrapper that names `sequential_update` itself."""

    average_dtype: DType | None
    skip_nonfinite: bool
    gradient_transformers: Sequence[GradientFunction] | None
    gradient_aggregator: GradientFunction | None
    exclude: Sequence[str] | None


class DecayingWrapperKeywords(DecayingAverageKeywords, total=False):
    """Keywords of any wrapper whose rule has a decay of its own."""

    sequential_update: bool


class InnerKeywords(DecayingInnerKeywords, total=False):
    """Keywords for the inner optimizer."""

    decay: float


class AverageKeywords(DecayingAverageKeywords, InnerKeywords, total=False):
    """Keywords of a wrapper that names `sequential_update` itself."""


class WrapperKeywords(DecayingWrapperKeywords, AverageKeywords, total=False):
    """Keywords of any wrapper."""
