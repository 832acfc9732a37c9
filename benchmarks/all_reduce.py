"""Summing 200 tensors over two workers, beside the engine's bare all-reduce of the same bytes.

KERAS_BACKEND=jax python benchmarks/all_reduce.py [ROUNDS]

Both are measured in turn in one run, each after a meeting of the workers, so that neither waits for
the other worker to start.
"""

import json
import pathlib
import statistics
import sys
import time

import keras
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "integration_tests"))

ELEMENTS, TENSORS, WORKERS = 10_000_000, 200, 2


def seconds(communicator, call, *arguments):
    communicator.barrier()
    began = time.perf_counter()
    result = call(*arguments)
    keras.ops.convert_to_numpy(result[-1])  # waits until it has been computed
    return time.perf_counter() - began


def worker(rounds):
    import keras_avg
    from keras_avg._backend import communicators

    communicator = keras_avg.distributed.initialize(timeout=120)
    random = np.random.default_rng(communicator.rank)
    arrays = np.split(random.normal(size=ELEMENTS).astype("float32"), TENSORS)
    variables = [keras.Variable(array.reshape(100, -1)) for array in arrays]
    flat = communicators.of_backend().pack(variables, "float32")
    engine = communicator._engine
    bare, whole = [], []
    for _ in range(rounds + 3):
        bare.append(seconds(communicator, lambda: [engine.sum(flat)]))
        whole.append(seconds(communicator, communicator.all_reduce_sum, variables))
    print(json.dumps({"bare": bare[3:], "all_reduce_sum": whole[3:]}))


def main(rounds=30):
    import workers

    results = [r for _, r, _ in workers.finish(workers.start(__file__, WORKERS, "worker", rounds))]
    bare, whole = (
        statistics.median(v for r in results for v in r[key]) for key in ("bare", "all_reduce_sum")
    )
    print(f"{keras.backend.backend()}: {ELEMENTS:,} float32 on {WORKERS} workers")
    print(f"engine's all-reduce        {1000 * bare:8.1f} ms")
    print(f"all_reduce_sum of {TENSORS:5}    {1000 * whole:8.1f} ms")
    print(f"ratio                      {whole / bare:8.2f}")


if sys.argv[1:2] == ["worker"]:
    worker(int(sys.argv[2]))
else:
    main(*map(int, sys.argv[1:]))
