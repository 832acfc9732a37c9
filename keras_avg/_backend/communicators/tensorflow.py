"""The engine is TensorFlow's collectives, and TF_CONFIG names the job.

A MultiWorkerMirroredStrategy starts the engine and is used for nothing else: models are built
outside its scope, so that each worker has variables of its own.
"""

import json
import os
import re
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf
from tensorflow.python.eager import context

from keras_avg._backend.communicators import TooLateError, UnreachableError, place

WORKERS = ("chief", "worker")
GROUP = 0x6B61  # far from the keys that strategies count up from 1


def launched() -> tuple[int, int] | None:
    text = os.environ.get("TF_CONFIG")
    if not text:
        return None
    try:
        config = json.loads(text)
        cluster, task = config["cluster"], config["task"]
        job, index = task["type"], str(task["index"])
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
        self._strategy = strategy  # the engine lives as long as it does
        self._meetings = self._sums = 0

    def meet(self, numbers: Sequence[int]) -> list[list[int]]:
        self._meetings += 1
        meeting = f"keras_avg/{self._meetings}"
        # The service behind the engine tells who is missing; a collective that runs into its
        # timeout does not. It has no public name.
        service = context.context()
        try:
            service.set_config_key_value(f"{meeting}/{self.rank}", json.dumps(numbers))
            if self._meetings > 2:  # everybody has read that one
                service.delete_config_key_value(f"keras_avg/{self._meetings - 2}/{self.rank}")
            service.wait_at_barrier(meeting, round(1000 * self._timeout))
            brought = [
                service.get_config_key_value(f"{meeting}/{rank}", round(1000 * self._timeout))
                for rank in range(self.size)
            ]
        except tf.errors.OpError as error:
            raise UnreachableError(error, self._named_in(str(error))) from error
        return [json.loads(numbers) for numbers in brought]

    def sum(self, flat: tf.Tensor) -> tf.Tensor:
        self._sums += 1
        try:
            with tf.device(self._device):
                return tf.raw_ops.CollectiveReduceV2(
                    input=tf.identity(flat),
                    group_size=self.size,
                    group_key=GROUP,
                    instance_key=self._sums,
                    ordering_token=[],
                    merge_op="Add",
                    final_op="Id",
                    timeout_seconds=self._timeout,
                )
        except tf.errors.OpError as error:
            raise UnreachableError(error) from error

    def _named_in(self, text: str) -> tuple[int, ...]:
        """Ranks of the tasks that a message calls late, one on a line, or without a heartbeat."""
        cluster = json.loads(os.environ["TF_CONFIG"])["cluster"]
        first = {"chief": 0, "worker": len(cluster.get("chief", ()))}
        task = r"/job:(\w+)/replica:0/task:(\d+)"
        named = re.findall(f"^{task}$", text, re.MULTILINE)
        named += re.findall(f"Task {task} heartbeat timeout", text)
        return tuple(sorted({first[job] + int(index) for job, index in named}))


def pack(arrays: Sequence[Any], dtype: str) -> tf.Tensor:
    tensors = [keras.ops.convert_to_tensor(array, dtype) for array in arrays]
    return tf.concat([tf.reshape(tensor, [-1]) for tensor in tensors], 0)


def unpack(flat: tf.Tensor, shapes: Sequence[tuple[int, ...]]) -> list[tf.Tensor]:
    parts = tf.split(flat, [tf.TensorShape(shape).num_elements() for shape in shapes])
    return [tf.reshape(part, shape) for part, shape in zip(parts, shapes, strict=True)]
