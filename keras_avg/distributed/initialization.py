"""Makes the communicator of the job that the launcher's environment describes."""

import math
import numbers
from typing import Any

from keras_avg._backend import communicators
from keras_avg.distributed._engine_communicator import EngineCommunicator
from keras_avg.distributed.communicator import Communicator
from keras_avg.distributed.local_communicator import LocalCommunicator

_of_this_process: Communicator | None = None


def initialize(timeout: float = 600) -> Communicator:
    """Join the job for which a launcher has started this process.

    Call it at the start of the program, before you make any Keras variable, model or random number.
    Later calls return the same communicator.

    | backend | engine | the launcher sets |
    |---|---|---|
    | torch | `torch.distributed`: NCCL on GPUs, else gloo | what `torchrun` sets: `RANK`, ... |
    | JAX (0.8 or later) | `jax.distributed` | `KERAS_DISTRIBUTION_JOB_ADDRESSES`, ... |
    | TensorFlow | its collectives | `TF_CONFIG` |

    If none of these variables is set, or if there is only one worker, the result is a
    `LocalCommunicator`. If the program has already started an engine itself, with
    `torch.distributed`, `jax.distributed` or `keras.distribution`, this engine is used. That is the
    recommended way on TPUs, where these variables are not needed.

    Every call of the communicator ends within the timeout. It raises an error if a worker is dead
    or does not answer. The error names this worker if the engine knows it. On JAX every worker
    knows it. On TensorFlow every worker knows it, unless worker 0 is the missing one. On torch only
    worker 0 knows it.

    Two cases cannot be handled. On JAX, if worker 0 dies, JAX aborts the other workers; and if a
    worker is missing at the start, JAX aborts those that wait for it. On TensorFlow, if a worker is
    missing at the start, worker 0 waits as long as TensorFlow does, and not for the timeout.

    The engines listen on sockets. torch's store and JAX' coordinator listen at the address that the
    launcher names. (For JAX, `JAX_COORDINATOR_BIND_ADDRESS` sets another address.) TensorFlow's
    servers listen on every interface. On torch, `GLOO_SOCKET_IFNAME` names the interface of gloo.

    Args:
        timeout: Number > 0, in seconds. How long to wait for other workers, here and in each call.
            It must be longer than the time by which one worker may be ahead of another. Default
            600.

    Returns:
        A `keras_avg.distributed.Communicator`.

    Raises:
        ValueError: If `timeout` is not a positive number, or if only some of the launcher's
            variables are set.
        RuntimeError: If not all workers come within the timeout, or if it is too late to join.

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
