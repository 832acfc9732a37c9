"""A round of ModelAverage over 200 tensors on two workers, beside the engine's bare all-reduce.

KERAS_BACKEND=jax python benchmarks/all_reduce.py [ROUNDS]

The bare all-reduce is of the same bytes. All are measured in turn in one run, each after a meeting
of the workers, so that none waits for the other worker to start.
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
WARM_UP = 3


def seconds(communicator, call):
    communicator.barrier()
    began = time.perf_counter()
    if result := call():
        keras.ops.convert_to_numpy(result[-1])  # waits until it has been computed
    return time.perf_counter() - began


def bare_sum(engine):
    """The framework's own sum over the workers, of ELEMENTS float32 where it takes them from."""
    if keras.backend.backend() == "torch":
        import torch

        flat = torch.ones(ELEMENTS)
        return lambda: torch.distributed.all_reduce(flat)
    if keras.backend.backend() == "jax":
        import jax

        row = jax.device_put(np.ones((1, ELEMENTS), "float32"), engine._device)
        shape, sharding = (engine.size, ELEMENTS), engine._one_row_each
        rows = jax.make_array_from_single_device_arrays(shape, sharding, [row])
        return lambda: engine._sum_rows(rows).block_until_ready() is None
    import tensorflow as tf

    flat = tf.ones(ELEMENTS)
    return lambda: engine.sum([flat], "float32") is None  # nothing to pack


def worker(rounds):
    import keras_avg

    communicator = keras_avg.distributed.initialize(timeout=120)
    random = np.random.default_rng(communicator.rank)
    arrays = np.split(random.normal(size=ELEMENTS).astype("float32"), TENSORS)
    variables = [keras.Variable(array.reshape(100, -1)) for array in arrays]
    optimizer = keras_avg.ModelAverage("sgd", communicator=communicator)
    optimizer.build(variables)

    arrays = [*variables, np.ones((), "float32")]  # as many as in a round, with the weight

    def meet():
        optimizer.meet()
        return variables

    calls = {
        "bare": bare_sum(communicator._engine),
        "all_reduce_sum": lambda: communicator.all_reduce_sum(arrays),
        "round": meet,
    }
    times = {name: [] for name in calls}
    for _ in range(rounds + WARM_UP):
        for name, call in calls.items():
            times[name].append(seconds(communicator, call))
    print(json.dumps({name: found[WARM_UP:] for name, found in times.items()}))


def main(rounds=30):
    import workers

    results = [r for _, r, _ in workers.finish(workers.start(__file__, WORKERS, "worker", rounds))]
    print(f"{keras.backend.backend()}: {ELEMENTS:,} float32 on {WORKERS} workers, medians")
    bare = statistics.median(v for r in results for v in r["bare"])
    for name in results[0]:
        median = statistics.median(v for r in results for v in r[name])
        print(f"{name:<16} {1000 * median:8.1f} ms {median / bare:8.2f}")


if sys.argv[1:2] == ["worker"]:
    worker(int(sys.argv[2]))
else:
    main(*map(int, sys.argv[1:]))
