"""Tables of the results, in Markdown."""

import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

TITLES = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch"}
Rows = list[dict[str, Any]]


def write(results: dict[str, Any], file: pathlib.Path) -> None:
    software = ", ".join(f"{name} {version}" for name, version in results["software"].items())
    lines = [f"# {results['hardware']}", "", f"{software}.", ""]
    for backend, parts in results["results"].items():
        lines += [f"## {TITLES[backend]}", ""]
        for part, rows in parts.items():
            lines += [*TABLES[part](rows), ""]
    file.write_text("\n".join(lines))


def steps(rows: Rows) -> Iterator[str]:
    yield "Cost of a step above the bare step, in sums `add(a, b, out=c)` of as many float32."
    yield ""
    sizes = list(dict.fromkeys(map(_size, rows)))
    names = list(dict.fromkeys(row["name"] for row in rows))
    cells = {(row["name"], _size(row)): row for row in rows}
    yield from _head(["", *sizes])
    for name in names:
        found = [cells.get((name, size)) for size in sizes]
        yield _line([name, *(f"{row['cost']['median']:.2f}" if row else "" for row in found)])
    first = [next(row for row in rows if _size(row) == size) for size in sizes]
    yield _line(["bare step, ms", *(f"{row['bare_ms']:.2f}" for row in first)])
    yield _line(["the sum, ms", *(f"{row['limit_ms']:.2f}" for row in first)])


def fits(rows: Rows) -> Iterator[str]:
    yield "Microseconds that averaging adds to a step of `fit` (quartiles)."
    yield ""
    yield from _head(["model", "average", "added", "share of the step", "implied by the limit"])
    for row in rows:
        added = row["added_us"]
        yield _line(
            [
                f"{row['model']}, {row['parameters']:,} parameters, {row['bare_us']:.0f} µs",
                row["name"],
                f"{added['median']:.0f} ({added['low']:.0f} to {added['high']:.0f})",
                f"{row['share']:.1%}",
                f"{row['implied_share']:.1%}",
            ]
        )


def swaps(rows: Rows) -> Iterator[str]:
    yield "A swap to the averages and a swap back, in copies of the same bytes."
    yield ""
    yield from _head(["parameters", "tensors", "", "copies", "ms"])
    for row in rows:
        what = [f"{row['parameters']:,}", f"{row['tensors']:,}", row["name"]]
        yield _line([*what, f"{row['copies']['median']:.2f}", f"{row['ms']:.1f}"])


def memory(rows: Rows) -> Iterator[str]:
    yield "Peak resident memory above that of the bare optimizer, in float32 copies of the"
    yield "parameters."
    yield ""
    yield from _head(["", "in training", "while swapped"])
    for row in rows:
        figures = [f"{row['training_copies']:.2f}", f"{row['swapped_copies']:.2f}"]
        yield _line([row["name"], *figures])


def batch_norm(rows: Rows) -> Iterator[str]:
    yield "`update_batch_norm`, in units of the time of `predict` on the same batches."
    yield ""
    yield from _head(["batch size", "ratio"])
    for row in rows:
        yield _line([str(row["batch_size"]), f"{row['ratio']['median']:.2f}"])


def workers(rows: Rows) -> Iterator[str]:
    yield "A round of two workers, in units of the time of the engine's bare sum of the same bytes."
    yield ""
    sizes = list(dict.fromkeys(map(_tensors, rows)))
    cells = {(row["name"], _tensors(row)): row for row in rows}
    yield from _head(["", *sizes])
    for name in dict.fromkeys(row["name"] for row in rows):
        found = [cells[name, size] for size in sizes]
        yield _line([name, *(f"{row['sums']['median']:.2f} ({row['ms']:.0f} ms)" for row in found)])


TABLES = {
    "steps": steps,
    "fits": fits,
    "swaps": swaps,
    "memory": memory,
    "batch_norm": batch_norm,
    "workers": workers,
}


def _size(row: dict[str, Any]) -> str:
    mode = "" if row["mode"] in ("eager", "jit") else f", {row['mode']}"
    return _tensors(row) + ("" if row["dtype"] == "float32" else f", {row['dtype']}") + mode


def _tensors(row: dict[str, Any]) -> str:
    return f"{row['parameters'] / 1e6:g} M, {row['tensors']:,} tensors"


def _head(titles: Sequence[str]) -> list[str]:
    return [_line(titles), "|" + "---|" * len(titles)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
