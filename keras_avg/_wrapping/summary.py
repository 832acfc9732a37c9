"""Describes a model's averages as text."""

import math
import re
from collections.abc import Callable
from itertools import zip_longest
from typing import Any

import keras

from keras_avg._wrapping import due_steps, finding


def summary(model: keras.Model, print_fn: Callable[[str], object] | None = None) -> None:
    """Print a table of a model's averages. It has a column for each wrapper, the outermost first.

    The table shows the wrapper and its rule, the numbers of updates and snapshots so far, the step
    of the next snapshot, the memory of the stores, and which copy is in the model now.

    Args:
        model: A compiled `keras.Model`.
        print_fn: Function that is called with each line. Default None: `print`.

    Returns:
        None.

    Raises:
        ValueError: If the model's optimizer keeps no averages.

    Example:

    ```python
    model.compile(optimizer=keras_avg.SWA("adam", start_averaging=100), loss="mse")
    model.fit(x, y, epochs=10)
    keras_avg.summary(model)
    ```
    """
    wrappers = finding.wrappers_of(model)
    if not wrappers:
        raise ValueError(
            "The model's optimizer keeps no averages. Received: "
            f"optimizer={getattr(model, 'optimizer', None)!r}. Compile the model with an "
            'optimizer such as keras_avg.SWA("adam").'
        )
    cells = [_describe(wrapper) for wrapper in wrappers]
    rows = [
        [name if i == 0 else "", *parts]
        for name in cells[0]
        for i, parts in enumerate(zip_longest(*(each[name] for each in cells), fillvalue=""))
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        padded = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        (print_fn or print)("   ".join(padded).rstrip())


def in_one_line(wrapper: Any) -> str:
    """A line with the name of the average, its rule, and the numbers of snapshots and updates."""
    return (
        f"{wrapper.name} ({wrapper.rule()}): {wrapper.num_snapshots} snapshots in "
        f"{wrapper.updates_so_far()} updates"
    )


def _describe(wrapper: Any) -> dict[str, list[str]]:
    """Lines of text for each row of the table."""
    step = due_steps.next_due(wrapper)
    return {
        "wrapper": [f"{type(wrapper).__name__} ({wrapper.name})"],
        "rule": re.split(r", (?=\w+=)(?![^(]*\))", wrapper.rule() or "-"),
        "updates": [f"{wrapper.updates_so_far():,}"],
        "snapshots": [f"{wrapper.num_snapshots:,}"],
        "next snapshot": ["not known" if step is None else f"after update {step + 1:,}"],
        "memory": [_readable(sum(map(_bytes_of, wrapper.kept_variables())))],
        "in the model": ["averages" if wrapper.averages_in_model else "raw weights"],
    }


def _bytes_of(variable: Any) -> int:
    bits = re.search(r"\d+", keras.backend.standardize_dtype(variable.dtype))
    return math.prod(variable.shape) * (int(bits[0]) // 8 if bits else 1)


def _readable(number: float) -> str:
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while number >= 1000 and len(units) > 1:
        number, units = number / 1000, units[1:]
    return f"{number:.0f} bytes" if units[0] == "bytes" else f"{number:.1f} {units[0]}"
