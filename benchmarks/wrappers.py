"""The memory of each wrapper, and the cost of a step on which nothing is due.

    KERAS_BACKEND=torch python -m benchmarks.wrappers

Memory is counted in copies of the parameters: the bytes of the wrapper's own variables. On PyTorch,
which compiles nothing here, the growth of the process above that with the bare optimizer is
measured too.

A step on which nothing is due is compared with a step of `SWA` before its start. In each round, all
run once. The results are medians of ratios within a round, of the processor time of this process.
`ScheduleFree` and `PrimalAverage` are not measured, because something is due on each of their
steps. On JAX a compiled step takes and returns every array of the state. So it costs more if a
wrapper keeps more arrays, even if nothing is due. The same is measured for steps of `fit` of a
small convolutional model.
"""

import argparse
import ctypes
import gc
import json
import os
import pathlib
import statistics
import time

import keras
import numpy as np

import keras_avg
from benchmarks import measuring, models

FAR = 2**30  # steps: nothing becomes due in the measurement


def sgd():
    return keras.optimizers.SGD(1e-3)


def to_measure_memory():
    """Each wrapper with its default size."""
    return {
        "bare": sgd(),
        "SWA": keras_avg.SWA(sgd()),
        "MovingAverage": keras_avg.MovingAverage(sgd()),
        "LAWA, window 5": keras_avg.LAWA(sgd(), average_period=1),
        "SWAG, rank 20": keras_avg.SWAG(sgd(), average_period=1),
        "SWAG, rank 0": keras_avg.SWAG(sgd(), average_period=1, rank=0),
        "BEMA": keras_avg.BEMA(sgd()),
        "ScheduleFree": keras_avg.ScheduleFree(sgd()),
        "PrimalAverage": keras_avg.PrimalAverage(sgd()),
        "Lookahead": keras_avg.Lookahead(sgd()),
        "ModelAverage, one worker": keras_avg.ModelAverage(sgd(), interval_steps=2),
        "SWA of MovingAverage": keras_avg.SWA(keras_avg.MovingAverage(sgd())),
    }


def with_nothing_due():
    return {
        "SWA": keras_avg.SWA(sgd(), start_averaging=FAR),
        "bare": sgd(),
        "MovingAverage": keras_avg.MovingAverage(sgd(), average_period=FAR),
        "LAWA": keras_avg.LAWA(sgd(), start_averaging=FAR),
        "SWAG": keras_avg.SWAG(sgd(), start_averaging=FAR),
        "BEMA": keras_avg.BEMA(sgd(), average_period=FAR),
        "Lookahead": keras_avg.Lookahead(sgd(), sync_period=FAR),
    }


def variables(parameters, tensors):
    random = np.random.default_rng(0)
    rows = parameters // tensors // 100
    return [
        keras.Variable(random.normal(size=(rows, 100)), dtype="float32") for _ in range(tensors)
    ]


def stepper(optimizer, parameters, tensors):
    """A function that takes a step on its own variables. It is compiled if the backend compiles."""
    owned = variables(parameters, tensors)
    gradients = [keras.ops.ones(v.shape) for v in owned]
    optimizer.build(owned)
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.function(lambda: optimizer.apply(gradients, owned))
    if keras.backend.backend() == "torch":
        return lambda: optimizer.apply(gradients, owned)
    import jax

    state = [[v.value for v in owned], [v.value for v in optimizer.variables]]
    compiled = jax.jit(
        lambda values, own: optimizer.stateless_apply(own, gradients, values), donate_argnums=(0, 1)
    )

    def step():
        state[:] = compiled(*state)
        jax.block_until_ready(state)

    return step


def resident():
    """The resident memory of this process now, in bytes."""
    gc.collect()
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def return_freed_memory_at_once():
    """Make the C library return the memory of each freed array to the system."""
    smallest_array_of_its_own = -3  # M_MMAP_THRESHOLD of glibc
    ctypes.CDLL(None).mallopt(smallest_array_of_its_own, 2**16)


def memory(parameters, tensors):
    """The size of a wrapper's variables, and the growth of the process, in copies."""
    return_freed_memory_at_once()
    stepper(sgd(), parameters, tensors)()  # the first use allocates memory of its own
    unit, found, bare = 4 * parameters, {}, 0.0
    optimizers = to_measure_memory()
    for name in list(optimizers):
        before, optimizer = resident(), optimizers.pop(name)
        step = stepper(optimizer, parameters, tensors)
        step()
        grown = (resident() - before) / unit
        own = sum(np.prod(v.shape, dtype="int64") * 4 for v in optimizer.variables if len(v.shape))
        found[name] = {"variables": int(own) / unit}
        if keras.backend.backend() == "torch":
            bare = grown if name == "bare" else bare
            found[name]["process"] = grown - bare
        print(f"{name:<26}", found[name], flush=True)
        del step, optimizer
    return found


def nothing_due(parameters, tensors, rounds):
    """For each wrapper: the time of a step, in units of that of SWA and in microseconds."""
    steps = {
        name: stepper(optimizer, parameters, tensors)
        for name, optimizer in with_nothing_due().items()
    }
    seconds = {name: [] for name in steps}
    for number in range(rounds + 3):  # three to compile and to warm up
        for name, step in steps.items():
            began = time.process_time()
            step()
            if number >= 3:
                seconds[name].append(time.process_time() - began)
    return {
        name: {
            "ratio": statistics.median(a / b for a, b in zip(found, seconds["SWA"], strict=True)),
            "microseconds": 1e6 * statistics.median(found),
        }
        for name, found in seconds.items()
    }


def nothing_due_in_fit(rounds):
    """For each wrapper: the time of a training step in `fit`, in units of that with SWA."""
    _, data, batch_size, steps = models.MODELS["convolution"]
    x, y = data(steps * batch_size)

    def fitting(optimizer):
        model = models.compiled("convolution", optimizer)
        return lambda: model.fit(x, y, batch_size=batch_size, shuffle=False, verbose=0)

    calls = {name: fitting(optimizer) for name, optimizer in with_nothing_due().items()}
    seconds = measuring.interleaved(calls, rounds)
    return {
        name: measuring.ratio(found, seconds["SWA"])
        | {"microseconds": 1e6 * statistics.median(found) / steps}
        for name, found in seconds.items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=200)
    folder = pathlib.Path(__file__).parent / "results"
    parser.add_argument("--out", type=pathlib.Path, default=folder / "wrappers.json")
    arguments = parser.parse_args()
    found = {
        "memory_in_copies": memory(arguments.parameters, 20),
        "nothing_due_beside_SWA": {
            f"{number} parameters": nothing_due(number, 20, arguments.rounds)
            for number in (arguments.parameters // by for by in (100, 10, 1))
        },
    }
    measuring.use_clock("cpu")
    found["nothing_due_in_fit"] = nothing_due_in_fit(max(2, arguments.rounds // 5))
    for name, step in found["nothing_due_in_fit"].items():
        quartiles = f"{step['low']:.3f} to {step['high']:.3f}"
        print(
            f"in fit {name:<16}{step['median']:>7.3f} ({quartiles}) {step['microseconds']:.0f} us"
        )
    for size, steps in found["nothing_due_beside_SWA"].items():
        for name, step in steps.items():
            print(f"{size} {name:<16}{step['ratio']:>7.2f}{step['microseconds']:>9.0f} us")
    keep(arguments.out, found | {"parameters": arguments.parameters, "rounds": arguments.rounds})


def keep(path, found):
    """Add the results of this backend to those of the others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(path.read_text()) if path.exists() else {}
    results["hardware"] = f"{os.cpu_count()} CPU cores"
    results["keras"] = keras.__version__
    results[keras.backend.backend()] = found
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"Results: {path}")


if __name__ == "__main__":
    main()
