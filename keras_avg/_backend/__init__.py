"""What keras_avg asks of a framework beyond `keras.ops`. The only importer of frameworks.

Each file defines the same names with the same signatures, in the same order:

* `widest_float()`: name of the widest float dtype in use. Weights are computed in it, so that
  float64 averages get float64 weights; JAX has float64 only when x64 is enabled.
* `copy(tensor)`: the same values in a buffer of their own. JAX train steps donate their state, and
  a buffer that two variables share cannot be donated twice; torch variables are views of storage
  that the next step overwrites.
* `detached(variable)`: what a variable, tensor or NumPy array holds, as a tensor that no gradient
  flows into; not copied.
* `value(variable, dtype)`: what a variable or tensor holds, as a tensor, in another dtype if one is
  named; not copied without need.
* `assign_quotients(sources, divisor, targets, ...)`: gives variables the values of others, of
  tensors or NumPy arrays, over a number; and the variables of each further list those of the one
  before. Each in its own dtype and buffer, and all together, so that a value is still in the cache.
  On torch in place: fresh memory costs ten copies.
* `Counter(variable)`: an integer variable that compiled code counts with. `read()`, and
  `read_after_step()`, which may trust that one in-place change since `read()` added one;
  `advance(amount)`. Torch reads a mirror on the host, because asking a GPU for a number stops the
  queue of work.
* `scalar(compute)`: what `compute()` gives, from counters: a Python number on torch, computed on
  the host for the same reason; a tensor elsewhere.
* `concrete(number)`: what a counter reads, or its variable holds, as a Python number; None where
  that cannot be known, in code that is being compiled.
* `all_finite(tensors)`: one truth value for all elements of all tensors.
* `lerp(averages, values, weight)`: a list of `average + weight * (value - average)`, each in its
  average's dtype; weight 1 gives the value bit for bit.
* `assign_if(condition, targets, sources, new_values)`: assigns `new_values(targets, sources)`
  where the condition holds, and computes nothing where it does not. JAX needs a `cond` that
  returns values, TensorFlow one around the assignments, torch a Python `if`.
* `run_if(condition, function, variables)`: runs a function that assigns to these variables, where
  the condition holds.
* `put_if(condition, place, rings, sources, new_values)`: assigns `new_values(sources)` to one of
  several lists of variables, where the condition holds: that of the integer `place`. The others are
  not touched.
* `lerp_if(condition, averages, variables, weight)`: the same for `lerp`, with `weight()`; a
  multi-tensor update in place where the framework has one.
* `start_averages(updates, averages, variables)`: gives the averages the variables' values if there
  has been no update yet. To be called before the step; on JAX that takes saying so.
* `loss_gradients(loss, variables, output_gradient, tape)`: calls `loss` with its effects on state,
  and gives the variables and their gradients, weighed by `output_gradient(value of the loss)`; None
  for a variable that the loss does not use. `variables` is a list, or a function that may be called
  only after the loss was. TensorFlow records on a tape, and takes a tensor from the user's in place
  of a loss to call; JAX differentiates functions without effects, so what the loss assigns is kept
  aside and assigned after it.
* `after(grads)`: context whose effects take place only where the gradients do. TensorFlow runs what
  does not depend on the batch, such as a counter, in a step that has no batch too: Keras calls one
  at the end of data of unknown length.
* `part_of_sum(grad)`: one replica's part of a gradient that is summed over all replicas already. A
  TensorFlow strategy adds them up when the step is taken, whatever they are.
* `outside_trace(reads)`: context in which variables are made and read, also while a step is traced.
  On TensorFlow a trace that fails later leaves variables that were made in it without values. If
  one of `reads`, which are read in it, has no value yet, it has to be the trace after all.
* `random_state_kept()`: context after which the global generator is as before. On torch every pass
  over data draws from it, and the order of later batches would change.
* `eager_inference(function)`: `function`, run without gradients and without the compiled copies
  of what it calls, nor leaving any. Torch checks by itself that a copy still fits; JAX has no
  such switch but one that takes the kernels of `jax.numpy` apart, too.
* `pass_over(arguments, batches, result)`: in the place of a train function that was called with
  these arguments, reads so many batches, takes no step, and returns `result(first batch)` for the
  metrics. The train function of torch is handed a batch; those of JAX and TensorFlow read from an
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
    "assign_if",
    "assign_quotients",
    "concrete",
    "copy",
    "detached",
    "eager_inference",
    "lerp",
    "lerp_if",
    "loss_gradients",
    "outside_trace",
    "part_of_sum",
    "pass_over",
    "put_if",
    "random_state_kept",
    "run_if",
    "scalar",
    "start_averages",
    "value",
    "widest_float",
]
