"""The operations that keras_avg needs beyond `keras.ops`. Only this folder imports frameworks.

Each file defines the same names with the same signatures, in the same order:

* `widest_float()`: the name of the widest float dtype in use. Weights are computed in it, because
  float64 averages need float64 weights. JAX has float64 only if x64 is enabled.
* `copy(tensor)`: the same values in a new buffer. On JAX, train steps donate their state, and a
  buffer that two variables share cannot be donated twice. On torch, variables are views of storage
  that the next step overwrites.
* `set_aside(variables)`: a list of their values, which stay the same when the variables are given
  new ones. They are copied only on torch, where an assignment writes into the same memory.
* `to_assign(tensor)`: a tensor that can be assigned to a variable. It is copied only on JAX, where
  the variable keeps the tensor's buffer and a train step donates it.
* `detached(variables)`: a list of the values of variables, tensors or NumPy arrays, without
  gradients. They are not copied. An array may stay an array.
* `value(variable, dtype)`: the value of a variable or tensor, as a tensor. If `dtype` is given, it
  is cast. It is copied only if necessary.
* `assign_all(variables, tensors)`: assigns one tensor to each variable, which keeps its dtype. A
  variable may keep the tensor's buffer.
* `assign_quotients(sources, divisor, targets, ...)`: divides variables, tensors or NumPy arrays by
  a number, and assigns the results to the variables in `targets`. Each further list of variables
  gets the values of the list before. Each variable keeps its own dtype and buffer. One value goes
  through all lists before the next, because then it is still in the cache. On torch this works in
  place, because new memory costs as much as ten copies.
* `Counter(variable)`: an integer variable that compiled code can count with. It has `read()` and
  `advance(amount)`. It also has `read_after_step()`, which may assume that one in-place change
  since `read()` has added 1. On torch a mirror on the host is read, because reading a number from a
  GPU stops its queue of work.
* `scalar(compute)`: the result of `compute()`, which computes with counters. On torch it is a
  Python number, computed on the host for the same reason. Elsewhere it is a tensor.
* `concrete(number)`: the value of a counter or of its variable, as a Python number. It is None in
  code that is being compiled, where the value is not known.
* `all_finite(tensors)`: one truth value for all elements of all tensors.
* `lerp(averages, values, weight)`: a list of `average + weight * (value - average)`, each in its
  average's dtype. Weight 1 gives the value bit for bit.
* `assign_if(condition, targets, sources, new_values)`: if the condition is true, assigns
  `new_values(targets, sources)`. Otherwise it computes nothing. JAX needs a `cond` that returns
  values, TensorFlow a `cond` around the assignments, torch a Python `if`.
* `run_if(condition, function, variables)`: if the condition is true, runs a function that assigns
  to these variables.
* `put_if(condition, place, rings, sources, new_values)`: if the condition is true, assigns
  `new_values(sources)` to the rows number `place` of the variables in `rings`. The other rows do
  not change. Compiled code writes the row in place.
* `layout_of_ring(layout)`: the layout of a variable whose rows have the given layout.
* `lerp_if(condition, averages, variables, weight)`: if the condition is true, assigns the `lerp` of
  averages and variables with `weight()`. It uses a multi-tensor update in place if the framework
  has one.
* `start_averages(updates, averages, variables)`: assigns the variables' values to the averages if
  there was no update yet. It must be called before the step. On JAX, XLA must be told explicitly
  that this comes before the step.
* `loss_gradients(loss, variables, output_gradient, tape)`: calls `loss`, keeps its changes of
  state, and returns the variables and their gradients. The gradients are multiplied by
  `output_gradient(value of the loss)`. A variable that the loss does not use has the gradient None.
  `variables` is a list, or a function that must be called after the loss. TensorFlow records on a
  tape. Instead of a function it also takes a tensor and the user's tape. JAX differentiates only
  functions without effects, so assignments in the loss are collected and done afterwards.
* `after(grads)`: context whose effects take place only if the gradients are computed. Keras calls a
  train step without a batch at the end of data of unknown length. In this step TensorFlow would
  still run operations that do not depend on the batch, such as a counter.
* `part_of_sum(grad)`: one replica's part of a gradient that is already summed over all replicas. A
  TensorFlow strategy always sums the gradients of all replicas in the step.
* `outside_trace(reads)`: context in which variables can be made and read, even while a step is
  traced. Without it, a TensorFlow trace that fails later leaves variables without values. The
  variables in `reads` are read in the context. If one of them has no value yet, the context must
  stay inside the trace.
* `random_state_kept()`: context after which the global random generator is in the same state as
  before. On torch every pass over data draws from it, which would change the order of later
  batches.
* `eager_inference(function)`: runs `function` without gradients. It does not use compiled copies of
  the functions that it calls, and makes none. Torch itself checks that a compiled copy still fits.
  JAX has no such switch, except one that would also disable the compiled kernels of `jax.numpy`.
* `place_in_code()`: an object that says which compiled function or loop is being traced now. It
  equals another one of the same place.
* `compile_stateless(function, by_xla)`: `function`, which has no effects, compiled in the way in
  which Keras compiles `predict`. None if Keras runs it eagerly.
* `pass_over(arguments, batches, result)`: is called instead of a train function, with the same
  arguments. It reads this many batches, takes no step, and returns `result(first batch)` for the
  metrics. The train function of torch gets a batch. Those of JAX and TensorFlow read from an
  iterator.
"""

import keras

if keras.backend.backend() == "tensorflow":
    from keras_avg._backend.tensorflow import *
elif keras.backend.backend() == "jax":
    from keras_avg._backend.jax import *
elif keras.backend.backend() == "torch":
    from keras_avg._backend.torch import *
elif keras.backend.backend() in ("numpy", "openvino"):
    from keras_avg._backend.numpy import *
else:
    raise ImportError(
        "keras_avg runs on the TensorFlow, JAX and PyTorch backends of Keras, and loads models on "
        "NumPy and OpenVINO. Received: "
        f"KERAS_BACKEND={keras.backend.backend()!r}."
    )

__all__ = [
    "Counter",
    "after",
    "all_finite",
    "assign_all",
    "assign_if",
    "assign_quotients",
    "compile_stateless",
    "concrete",
    "copy",
    "detached",
    "eager_inference",
    "layout_of_ring",
    "lerp",
    "lerp_if",
    "loss_gradients",
    "outside_trace",
    "part_of_sum",
    "pass_over",
    "place_in_code",
    "put_if",
    "random_state_kept",
    "run_if",
    "scalar",
    "set_aside",
    "start_averages",
    "to_assign",
    "value",
    "widest_float",
]
