"""The engine is TensorFlow's collectives. TF_CONFIG describes the job.

A MultiWorkerMirroredStrategy starts the engine, and is used for nothing else. Models must be built
outside its scope, because each worker needs variables of its own.
"""

import json
import math
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf
from tensorflow.python.eager import context

from keras_avg import _backend
from keras_avg._backend._tensorflow.program import Program
from keras_avg._backend.communicators import TooLateError, UnreachableError, place

WORKERS = ("chief", "worker")
ALIGNMENT = 16  # elements. TensorFlow splits a tensor without a copy if the parts are aligned.
GROUP = 0x6B61  # Strategies count their keys from 1, so this key is not one of theirs.


def launched() -> tuple[int, int] | None:
    text = os.environ.get("TF_CONFIG")
    if not text:
        return None
    try:
        config = json.loads(text)
        cluster, task = config["cluster"], config["task"]
        job, index = task["type"], str(task["index"])
        if job == "evaluator":  # It is not one of the workers.
            return None
        if job not in WORKERS:
            raise ValueError(f"task type {job!r} is none of {', '.join(WORKERS)}")
        sizes = [len(cluster.get(kind, ())) for kind in WORKERS]
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        missing = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(
            "TF_CONFIG must be JSON that names `cluster` and this worker's `task`, as in "
            '{"cluster": {"worker": ["10.0.0.1:5000", "10.0.0.2:5000"]}, "task": {"type": '
            f'"worker", "index": 0}}}}. Received: TF_CONFIG={text} ({missing}). Unset it to train '
            "alone."
        ) from error
    first = 0 if job == "chief" else sizes[0]
    rank, _ = place("task index", index, f"number of {job}s", str(len(cluster.get(job, ()))))
    return first + rank, sum(sizes)


class Engine:
    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self.rank, self.size = launched() or (0, 1)
        try:
            strategy = tf.distribute.MultiWorkerMirroredStrategy()
        except RuntimeError as error:
            raise TooLateError(error) from error
        except tf.errors.OpError as error:
            raise UnreachableError(error) from error
        self._device = strategy.extended.worker_devices[0]
        self._strategy = strategy  # The engine stops when the strategy is deleted.
        self._compiled = {dtype: Program(self._sum_in(dtype)) for dtype in ("float32", "float64")}
        self._meetings = self._sums = 0

    def meet(self, numbers: Sequence[int]) -> list[list[int]]:
        self._meetings += 1
        meeting = f"keras_avg/{self._meetings}"
        # The coordination service behind the engine says which worker is missing. A collective that
        # runs into its timeout does not say it. The service has no public name.
        service = context.context()
        try:
            service.set_config_key_value(f"{meeting}/{self.rank}", json.dumps(numbers))
            if self._meetings > 2:  # All workers have read the numbers of that meeting.
                service.delete_config_key_value(f"keras_avg/{self._meetings - 2}/{self.rank}")
            service.wait_at_barrier(meeting, round(1000 * self._timeout))
            brought = [
                service.get_config_key_value(f"{meeting}/{rank}", round(1000 * self._timeout))
                for rank in range(self.size)
            ]
        except tf.errors.OpError as error:
            raise UnreachableError(error, self._named_in(str(error))) from error
        return [json.loads(numbers) for numbers in brought]

    def sum(self, arrays: Sequence[Any], dtype: str) -> list[tf.Tensor]:
        self._sums += 1
        try:
            return self._compiled[dtype]([tf.constant(self._sums), *_backend.detached(arrays)])
        except tf.errors.OpError as error:
            raise UnreachableError(error) from error

    def _sum_in(self, dtype: str) -> Callable[[list[tf.Tensor]], list[tf.Tensor]]:
        # This is compiled, because two hundred operations from Python take as long as the memory
        # transfers. Compiled code also writes the sums into the memory of the terms.
        def compiled(tensors: list[tf.Tensor]) -> list[tf.Tensor]:
            key, *arrays = tensors
            with tf.device(self._device):
                flat = tf.raw_ops.CollectiveReduceV2(
                    input=tf.concat([p for array in arrays for p in _aligned(array, dtype)], 0),
                    group_size=self.size,
                    group_key=GROUP,
                    instance_key=key,
                    ordering_token=[],
                    merge_op="Add",
                    final_op="Id",
                    timeout_seconds=self._timeout,
                )
                sizes = [math.prod(array.shape) for array in arrays]
                lines = tf.split(flat, [size + -size % ALIGNMENT for size in sizes])
                parts = zip(lines, sizes, arrays, strict=True)
                return [tf.reshape(line[:size], array.shape) for line, size, array in parts]

        return compiled

    def _named_in(self, text: str) -> tuple[int, ...]:
        """The ranks of the tasks that an error message calls late or without a heartbeat."""
        cluster = json.loads(os.environ["TF_CONFIG"])["cluster"]
        first = {"chief": 0, "worker": len(cluster.get("chief", ()))}
        task = r"/job:(\w+)/replica:0/task:(\d+)"
        named = re.findall(f"^{task}$", text, re.MULTILINE)
        named += re.findall(f"Task {task} heartbeat timeout", text)
        return tuple(sorted({first[job] + int(index) for job, index in named}))


def _aligned(array: tf.Tensor, dtype: str) -> list[tf.Tensor]:
    """The elements of an array, and zeros up to the next aligned place. A pad would copy them."""
    line = tf.reshape(tf.cast(array, dtype), [-1])
    gap = -line.shape[0] % ALIGNMENT
    return [line, tf.zeros(gap, dtype)] if gap else [line]
