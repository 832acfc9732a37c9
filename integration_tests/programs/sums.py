"""A worker that sums arrays, and prints the sums.

python sums.py [LATE_RANK SECONDS]
"""

import hashlib
import json
import os
import sys
import time

import keras
import numpy as np

import keras_avg
from keras_avg.distributed._weighted_sum import weighted_sum


def numbers(array):
    return keras.ops.convert_to_numpy(array).astype("float64").tolist()


def refusal(call, *arguments):
    try:
        call(*arguments)
    except ValueError as error:
        return str(error)
    return None


def main(late=None, seconds=0):
    if late is not None and str(late) in rank_in_environment():
        time.sleep(float(seconds))
    communicator = keras_avg.distributed.initialize(timeout=60)
    rank = communicator.rank
    same = keras_avg.distributed.initialize() is communicator
    variables = [
        keras.Variable(np.full((2, 3), rank + 1.0), dtype="float32"),
        keras.Variable(rank * 0.5, dtype="bfloat16"),
        keras.Variable(np.zeros((0, 4)), dtype="float16"),
    ]
    tensor = keras.ops.convert_to_tensor(np.arange(3, dtype="float32") * 10**rank)
    sums = communicator.all_reduce_sum([*variables, tensor, np.float32(rank)])
    wide = communicator.all_reduce_sum([np.array(1 + 2.0**-40 * rank), variables[0]])
    big = np.random.default_rng(rank).normal(size=100_000).astype("float32")
    (big,) = communicator.all_reduce_sum([big])
    communicator.barrier()
    own = [variables[0], np.full(2, np.nan if rank else 3.0, "float32")]
    broadcast, one = weighted_sum(communicator, own, float(rank == 0))
    mean, total = weighted_sum(communicator, variables[:1], rank + 1.0)
    other_sizes = refusal(communicator.all_reduce_sum, [np.ones(5 + rank, "float32")])
    other_shapes = refusal(communicator.all_reduce_sum, [np.ones((6, 1 + 2 * rank))[:2]])
    other_calls = refusal(*((communicator.all_reduce_sum, []) if rank else (communicator.barrier,)))
    time.sleep(1.5 * rank)  # Worker 0 ends first. The others must not be disturbed by that.
    print(
        json.dumps(
            {
                "rank": rank,
                "size": communicator.size,
                "chief": communicator.is_chief,
                "same": same,
                "shapes": [list(s.shape) for s in sums],
                "dtypes": [keras.backend.standardize_dtype(s.dtype) for s in [*sums, *wide]],
                "sums": [numbers(s) for s in sums],
                "wide": numbers(wide[0]),
                "digest": hashlib.sha256(keras.ops.convert_to_numpy(big).tobytes()).hexdigest(),
                "own": [numbers(v) for v in variables],
                "broadcast": [numbers(b) for b in broadcast],
                "total": [one, total],
                "mean": numbers(mean[0] / total),
                "nobody": weighted_sum(communicator, variables, 0)[1],
                "refusals": [other_sizes, other_shapes, other_calls],
                "empty": communicator.all_reduce_sum([]),
            }
        )
    )


def rank_in_environment():
    config = json.loads(os.environ.get("TF_CONFIG", '{"task": {"index": ""}}'))
    names = ("RANK", "KERAS_DISTRIBUTION_PROCESS_ID")
    return [*(os.environ.get(name) for name in names), str(config["task"]["index"])]


main(*sys.argv[1:])
