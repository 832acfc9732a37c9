"""One part on one backend, in a process of its own: `python -m benchmarks.part PART OPTIONS`."""

import importlib
import json
import pathlib
import sys
from typing import Any

from benchmarks import measuring, models, steps, swaps, workers

LEAST_ROUNDS = 15


def arguments(part: str, options: dict[str, Any]) -> tuple[Any, ...]:
    """The arguments of the part's `measure`.

    Args:
        part: Name of a module of this package.
        options: Dict with `quick`, `rounds`, `clock`, and `sizes`: None, or lists of parameters,
            tensors and a dtype.
    """
    quick, rounds = options["quick"], max(LEAST_ROUNDS, options["rounds"])
    sizes = [tuple(size) for size in options["sizes"] or ()]
    pairs = list(dict.fromkeys(size[:2] for size in sizes))
    return {
        "steps": (sizes or (steps.QUICK_SIZES if quick else steps.SIZES), rounds),
        "fits": (["tiny", "tiny but deep"] if quick else list(models.MODELS), rounds),
        "swaps": (pairs or (swaps.QUICK_SIZES if quick else swaps.SIZES), rounds),
        "memory": (5_000_000 if quick else 50_000_000,),
        "batch_norm": (rounds,),
        "workers": (
            pairs or (workers.SIZES[:1] if quick else workers.SIZES),
            rounds,
            options["clock"],
        ),
    }[part]


def main(part: str, options: str, output: str) -> None:
    """Measure the part, and write its rows as JSON."""
    chosen = json.loads(options)
    measuring.use_clock(chosen["clock"])
    rows = importlib.import_module(f"benchmarks.{part}").measure(*arguments(part, chosen))
    pathlib.Path(output).write_text(json.dumps(rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
