"""A round of ModelAverage on two workers, compared with the engine's bare sum of the same bytes.

The table is by the numbers of parameters and tensors. All calls are measured in turn. The workers
meet before each measurement, so none waits for the other to start. The other parts of a round are
also measured one by one. A round must write at least two copies.
"""

import importlib.util
import json
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from benchmarks import averages, measuring

WORKERS = 2
SIZES = tuple((millions * 10**6, tensors) for millions in (10, 50) for tensors in (20, 200, 2_000))
STARTER = pathlib.Path(__file__).parents[1] / "integration_tests" / "workers.py"


def measure(sizes: Sequence[tuple[int, int]], rounds: int, clock: str) -> list[dict[str, Any]]:
    """One row for each size (parameters, tensors) and each part of a round."""
    rows = []
    for parameters, tensors in sizes:
        workers = _starter()
        jobs = workers.start(__file__, WORKERS, parameters, tensors, rounds, clock)
        results = [result for _, result, _ in workers.finish(jobs, timeout=1200)]
        seconds = {name: [s for r in results for s in r[name]] for name in results[0]}
        for name in seconds:
            row = {"parameters": parameters, "tensors": tensors, "name": name}
            row["sums"] = measuring.ratio(seconds[name], seconds["bare"])
            row["ms"] = 1000 * measuring.summary(seconds[name])["median"]
            rows.append(row)
            print(row, flush=True)
    return rows


def _starter() -> Any:
    spec = importlib.util.spec_from_file_location("workers_of_tests", STARTER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def bare_sum(engine: Any, elements: int) -> Callable[[], Any]:
    """The framework's own sum over the workers, of `elements` float32 in its own kind of array."""
    if averages.backend() == "torch":
        import torch

        flat = torch.ones(elements)
        return lambda: torch.distributed.all_reduce(flat)
    if averages.backend() == "jax":
        import jax

        row = jax.device_put(np.ones((1, elements), "float32"), engine._device)
        shape, sharding = (engine.size, elements), engine._one_row_each
        rows = jax.make_array_from_single_device_arrays(shape, sharding, [row])
        return lambda: engine._sum_rows(rows).block_until_ready()
    import tensorflow as tf

    flat = tf.ones(elements)
    return lambda: engine.sum([flat], "float32")  # nothing to pack


def work(parameters: int, tensors: int, rounds: int) -> dict[str, list[float]]:
    """The program of one worker. It returns the seconds of each call in each round."""
    import keras_avg

    communicator = keras_avg.distributed.initialize(timeout=600)
    random = np.random.default_rng(communicator.rank)
    variables = [
        keras.Variable(random.normal(size=shape).astype("float32"))
        for shape in averages.shapes(parameters, tensors)
    ]
    optimizer = keras_avg.ModelAverage("sgd", communicator=communicator)
    optimizer.build(variables)
    arrays = [*variables, np.ones((), "float32")]  # the size of a round, including the weight
    calls = {
        "bare": bare_sum(communicator._engine, parameters),
        "meeting": communicator.barrier,
        "all_reduce_sum": lambda: communicator.all_reduce_sum(arrays),
        "round": lambda: (optimizer.meet(), keras.ops.convert_to_numpy(variables[-1])),
    }
    names, warm_up = list(calls), 3
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds + warm_up):
        for name in names:
            communicator.barrier()
            began = measuring.clock()
            calls[name]()
            seconds[name].append(measuring.clock() - began)
    return {name: found[warm_up:] for name, found in seconds.items()}


if __name__ == "__main__":
    measuring.use_clock(sys.argv[4])
    print(json.dumps(work(*map(int, sys.argv[1:4]))))
