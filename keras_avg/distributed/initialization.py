"""From the launcher's environment to a communicator."""

import math
import numbers
from typing import Any

from keras_avg._backend import communicators
from keras_avg.distributed._engine_communicator import EngineCommunicator
from keras_avg.distributed.communicator import Communicator
from keras_avg.distributed.local_communicator import LocalCommunicator

_of_this_process: Communicator | None = None


def initialize(timeout: float = 600) -> Communicator:
    """Join the job that a launcher has started this process for.

    Call it once, first of all: before any Keras variable, model or random number is made. Later
    calls give the same communicator.

    | backend | engine | the launcher sets |
    |---|---|---|
    | torch | `torch.distributed`: NCCL on GPUs, else gloo | what `torchrun` sets: `RANK`, ... |
    | JAX (0.8 or later) | `jax.distributed` | `KERAS_DISTRIBUTION_JOB_ADDRESSES`, ... |
    | TensorFlow | its collectives | `TF_CONFIG` |

    Without any of these, or with one worker only: a `LocalCommunicator`. An engine that the program
    has started itself, by `torch.distributed`, `jax.distributed` or `keras.distribution`, is used
    as it is, and is recommended on TPUs, which need no such variables.

    Every call of the communicator ends within the timeout, with an error if a worker is dead or
    stalled. The error names it where the engine does: on JAX on every worker, on TensorFlow too
    unless worker 0 is the one, on torch on worker 0. Two things have no remedy. On JAX the death of
    worker 0 ends the others, and a worker that is missing at the start ends those that wait for it:
    JAX aborts them. On TensorFlow worker 0 waits for such a worker as long as TensorFlow does.

    The engines listen on sockets. torch's store and JAX' coordinator do so at the address that the
    launcher names (`JAX_COORDINATOR_BIND_ADDRESS`: at another one), TensorFlow's servers on every
    interface. `GLOO_SOCKET_IFNAME` names the interface of gloo on torch.

    Args:
        timeout: Number > 0, in seconds: how long to wait for other workers, here and in each call.
            Longer than one worker may be ahead of another. Default 600.

    Returns:
        A `keras_avg.distributed.Communicator`.

    Raises:
        ValueError: If `timeout` is not a positive number, or the environment names a job in part.
        RuntimeError: If the workers do not all come within the timeout, or it is too late to join.

    Example:

    ```python
    communicator = keras_avg.distributed.initialize(timeout=300)
    model = make_model()
    if communicator.is_chief:
        model.summary()
    ```
    """
    global _of_this_process
    timeout = _seconds(timeout)
    if _of_this_process is None:
        _of_this_process = _join(timeout)
    return _of_this_process


def _join(timeout: float) -> Communicator:
    if not communicators.has_engine():
        return LocalCommunicator()
    backend = communicators.of_backend()
    place = backend.launched()
    if place is None or place[1] == 1:
        return LocalCommunicator()
    rank, size = place
    try:
        return EngineCommunicator(backend.Engine(timeout), timeout)
    except communicators.TooLateError as error:
        raise RuntimeError(
            "It is too late to join the other workers: call keras_avg.distributed.initialize() at "
            "the start of the program, before any Keras variable, model or random number is made. "
            f"The engine said: {error}"
        ) from error
    except communicators.UnreachableError as error:
        raise RuntimeError(
            f"The {size} workers did not all come within {timeout:g} s. Received: rank {rank} of "
            f"{size}. Start all of them, at addresses that reach each other. The engine said: "
            f"{error}"
        ) from error


def _seconds(timeout: Any) -> float:
    number = float(timeout) if isinstance(timeout, numbers.Real) else math.nan
    if isinstance(timeout, bool) or not 0 < number < math.inf:
        raise ValueError(
            f"`timeout` must be a positive number, in seconds. Received: timeout={timeout!r}."
        )
    return number
