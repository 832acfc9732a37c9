"""Things that take turns, and what they cost beside each other."""

import statistics
import time
from collections.abc import Callable

Call = Callable[[], object]

#: How seconds are counted. `"cpu"` is the processor time of all threads of the process, which is
#: hardly disturbed where others use the machine too; but threads that work at the same time add up.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
clock = CLOCKS["wall"]


def use_clock(name: str) -> None:
    """Count by one of `CLOCKS` from now on."""
    global clock
    clock = CLOCKS[name]


def interleaved(calls: dict[str, Call], rounds: int, warm_up: int = 2) -> dict[str, list[float]]:
    """Seconds of each call in each round.

    Each round begins with another call, so that none always comes after the same one.

    Args:
        calls: Dict of functions without arguments, which return when their work is done.
        rounds: Integer. How many rounds count.
        warm_up: Integer. How many go before them.
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
    """What something takes more than `bare`, in units that were measured in the same rounds.

    Where others use the machine too, most rounds are disturbed, and the first quartiles of each,
    which are compared under "undisturbed", tell more than medians.
    """
    triples = zip(seconds, bare, unit, strict=True)
    found = summary([(own - without) / one for own, without, one in triples])
    own, without, one = (summary(values)["low"] for values in (seconds, bare, unit))
    return found | {"undisturbed": (own - without) / one}


def ratio(seconds: list[float], unit: list[float]) -> dict[str, float]:
    """How often something takes as long as something else in the same round."""
    return cost(seconds, [0.0] * len(unit), unit)


def added(seconds: list[float], bare: list[float]) -> dict[str, float]:
    """How many seconds something takes more than something else in the same round."""
    return cost(seconds, bare, [1.0] * len(bare))
