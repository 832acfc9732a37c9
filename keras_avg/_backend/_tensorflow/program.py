"""A compiled function of thousands of tensors, called without a look at each of them."""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

# It has no public name. `tf.type_spec_from_value` takes a variable that was made in a trace for a
# tensor.
from tensorflow.python.ops.resource_variable_ops import VariableSpec


class Program:
    """Compiles a function of lists of tensors and lists of variables.

    A `tf.function` looks at the type of each argument in Python, at each call. For small tensors
    this takes longer than their memory. So this object does that once for the same dtypes and
    shapes, and then gives all arguments to the compiled code in one call.

    Where one call is not possible, it is an ordinary `tf.function`: in a trace, and for the
    variables of a strategy.

    Args:
        function: Function of the arguments of a call. It returns a list of tensors.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._in_traces = tf.function(function)
        self._compiled: dict[Any, Any] = {}

    def __call__(
        self, tensors: Sequence[tf.Tensor], *variables: Sequence[tf.Variable], shapes: Any = None
    ) -> list[tf.Tensor]:
        """Call the function.

        Args:
            tensors: List of tensors.
            *variables: Lists of variables.
            shapes: The shapes of the variables, if they do not follow from those of the tensors.
        """
        if not tensors and not any(variables):
            return []
        flat = [variable for each in variables for variable in each]
        if not tf.executing_eagerly() or any(hasattr(variable, "values") for variable in flat):
            return self._in_traces(tensors, *variables)
        # `shape` would make an object for each tensor.
        forms = [(tensor.dtype, tensor._shape_tuple()) for tensor in tensors]
        key = (shapes, *forms, *[len(each) for each in variables], *[v.dtype for v in flat])
        if key not in self._compiled:
            # Only the kinds are given. Otherwise the trace would keep the memory of the variables.
            # One `tf.function` cannot compare the kinds of variables with those of an earlier call.
            self._compiled[key] = tf.function(self._function).get_concrete_function(
                [tf.TensorSpec.from_tensor(tensor) for tensor in tensors],
                *[[VariableSpec(v.shape, v.dtype) for v in each] for each in variables],
            )
        program = self._compiled[key]
        outputs = tf.raw_ops.StatefulPartitionedCall(
            args=[*tensors, *[v.handle for v in flat], *program.captured_inputs],
            Tout=[output.dtype for output in program.outputs],
            f=program,
        )
        return outputs if program.outputs else []
