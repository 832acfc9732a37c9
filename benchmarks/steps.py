"""Optimizer steps on bare tensors, in units of the limit: `add(a, b, out=c)` of the same size.

For each parameter, a float32 average reads two values and writes one, as the sum does. So the limit
is 1. It is less if the memory need not be read before it is overwritten.
"""

import gc
import importlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import keras

from benchmarks import averages, measuring

LIMIT = "limit"
SIZES = (
    (1_000_000, 10, "float32"),
    (1_000_000, 200, "float32"),
    (1_000_000, 2_000, "float32"),
    (10_000_000, 200, "float32"),
    (50_000_000, 200, "float32"),
    (50_000_000, 2_000, "float32"),
    (200_000_000, 200, "float32"),
    (1_000_000, 200, "bfloat16"),
    (50_000_000, 200, "bfloat16"),
)
QUICK_SIZES = ((1_000_000, 10, "float32"), (10_000_000, 200, "float32"))
AT_ONCE = 4  # averages that are in memory at the same time, if each of them is large
LARGE = 100_000_000  # parameters


def measure(sizes: list[tuple[int, int, str]], rounds: int) -> list[dict[str, Any]]:
    """One row for each size, mode and contender."""
    framework = importlib.import_module(f"benchmarks.on_{averages.backend()}")
    rows = []
    for (parameters, tensors, dtype), mode in itertools.product(sizes, framework.MODES):
        shapes = averages.shapes(parameters, tensors)
        for names in _groups(framework, parameters):
            steps = framework.Steps(shapes, dtype, mode)
            unit = framework.triad(sum(rows * columns for rows, columns in shapes))
            for row in _rows(steps, unit, names, rounds):
                size = {"parameters": parameters, "tensors": tensors, "dtype": dtype, "mode": mode}
                rows.append(size | row)
                print(rows[-1], flush=True)
            del steps, unit
            gc.collect()
    return rows


def _groups(framework: Any, parameters: int) -> Iterator[list[str]]:
    """Groups of names of contenders. Those of a group are measured in turn."""
    names = list(averages.optimizers(keras.optimizers.SGD))
    names += framework.Steps([(1, 1)], "float32", framework.MODES[0]).rivals()
    names.remove(averages.BARE)
    size = AT_ONCE if parameters >= LARGE else len(names)
    for first in range(0, len(names), size):
        yield names[first : first + size]


def _rows(
    steps: Any, unit: Callable[[], Any], names: list[str], rounds: int
) -> Iterator[dict[str, Any]]:
    ours, rivals = averages.optimizers(keras.optimizers.SGD), steps.rivals()
    calls = {LIMIT: unit, averages.BARE: steps.of(ours[averages.BARE]())}
    for name in names:
        step = steps.of(ours[name]()) if name in ours else rivals[name]()
        calls[name] = _repeated(step, _steps_in_a_call(name))
    seconds = measuring.interleaved(calls, rounds)
    bare, limit = seconds[averages.BARE], seconds[LIMIT]
    for name in names:
        each = [total / _steps_in_a_call(name) for total in seconds[name]]
        yield {
            "name": name,
            "cost": measuring.cost(each, bare, limit),
            "step_ms": 1000 * measuring.summary(each)["median"],
            "added_us": 1e6 * measuring.added(each, bare)["median"],
            "bare_ms": 1000 * measuring.summary(bare)["median"],
            "limit_ms": 1000 * measuring.summary(limit)["median"],
        }


def _steps_in_a_call(name: str) -> int:
    return averages.STEPS_OF_A_PERIOD if name == averages.PERIOD else 1


def _repeated(step: Callable[[], Any], times: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(times):
            step()

    return run
