"""Measures several functions in turn, and compares their cost."""

import statistics
import time
from collections.abc import Callable

Call = Callable[[], object]

#: How seconds are counted. `"cpu"` is the sum of the processor time of all threads of the process.
#: Other processes on the machine hardly change it.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
clock = CLOCKS["wall"]


def use_clock(name: str) -> None:
    """Measure with one of `CLOCKS` from now on."""
    global clock
    clock = CLOCKS[name]


def interleaved(calls: dict[str, Call], rounds: int, warm_up: int = 2) -> dict[str, list[float]]:
    """Seconds of each call in each round.

    Each round begins with another call.

    Args:
        calls: Dict of functions without arguments. They return when their work is done.
        rounds: Integer. The number of measured rounds.
        warm_up: Integer. The number of rounds before them, which are not measured.
    """
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(warm_up + rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            began = clock()
            calls[name]()
            seconds[name].append(clock() - began)
    return {name: found[warm_up:] for name, found in seconds.items()}


def summary(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4)
    return {"median": median, "low": low, "high": high}


def cost(seconds: list[float], bare: list[float], unit: list[float]) -> dict[str, float]:
    """The time above `bare`, in units that were measured in the same rounds.

    "undisturbed" compares the first quartiles. They are more precise than medians if other
    processes disturb most of the rounds.
    """
    triples = zip(seconds, bare, unit, strict=True)
    found = summary([(own - without) / one for own, without, one in triples])
    own, without, one = (summary(values)["low"] for values in (seconds, bare, unit))
    return found | {"undisturbed": (own - without) / one}


def ratio(seconds: list[float], unit: list[float]) -> dict[str, float]:
    """The ratio of two times of the same round."""
    return cost(seconds, [0.0] * len(unit), unit)


def added(seconds: list[float], bare: list[float]) -> dict[str, float]:
    """The difference of two times of the same round, in seconds."""
    return cost(seconds, bare, [1.0] * len(bare))
