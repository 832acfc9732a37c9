"""Pictures of the results: bars compared with the limit, and cost over size."""

import pathlib
from typing import Any

from benchmarks.tables import TITLES

BARS_AT = (50_000_000, 200, "float32")  # or the largest there is
OURS, OTHERS, LIMIT = "#2f6db5", "#b9bec6", "#c0392b"
EMA = "EMA every step"
Rows = list[dict[str, Any]]


def draw(results: dict[str, Any], file: pathlib.Path) -> None:
    """Draw two pictures beside `file`. Draw nothing if matplotlib or the steps are missing."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("agg")
    found = {name: parts["steps"] for name, parts in results["results"].items() if "steps" in parts}
    title = f"One averaging step on {results['hardware']}"
    if found:
        _bars(found, title, file.with_name(f"{file.stem}-bars.png"))
    found = {name: chosen for name, rows in found.items() if (chosen := _comparable(rows))}
    if found:
        _lines(found, title, file.with_name(f"{file.stem}-sizes.png"))


def _panels(count: int, height: float) -> Any:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, count, figsize=(6 * count, height), squeeze=False)
    return figure, axes[0]


def _bars(found: dict[str, Rows], title: str, file: pathlib.Path) -> None:
    figure, axes = _panels(len(found), 4.5)
    for panel, (backend, rows) in zip(axes, found.items(), strict=True):
        rows = _at(rows, BARS_AT)
        names = [_name(row) for row in rows][::-1]
        costs = [row["cost"] for row in rows][::-1]
        medians = [max(0.0, cost["median"]) for cost in costs]
        colors = [OURS if name.startswith(("EMA", "SWA")) else OTHERS for name in names]
        panel.barh(names, medians, color=colors)
        for place, cost in enumerate(costs):
            panel.plot([cost["low"], cost["high"]], [place, place], color="black", linewidth=1)
        panel.axvline(1, color=LIMIT, linestyle="--", linewidth=1)
        panel.set_title(f"{TITLES[backend]}: {rows[0]['parameters'] / 1e6:g} M parameters")
        panel.set_xlabel("above the bare step; 1: add(a, b, out=c)")
        panel.set_xlim(0, max(1.2, 1.1 * max(medians)))
        panel.spines[["top", "right"]].set_visible(False)
    _save(figure, title, file)


def _lines(found: dict[str, Rows], title: str, file: pathlib.Path) -> None:
    figure, axes = _panels(len(found), 4)
    for panel, (backend, rows) in zip(axes, found.items(), strict=True):
        for name in dict.fromkeys(map(_name, rows)):
            points = sorted(
                (row["parameters"], row["cost"]["median"]) for row in rows if _name(row) == name
            )
            is_ours = name.startswith("EMA every step")
            style = {"color": OURS, "linewidth": 2.5} if is_ours else {"linewidth": 1, "alpha": 0.7}
            panel.plot(*zip(*points, strict=True), marker="o", label=name, **style)
        panel.axhline(1, color=LIMIT, linestyle="--", linewidth=1)
        panel.set_xscale("log")
        panel.set_ylim(0, 4)
        panel.set_title(TITLES[backend])
        panel.set_xlabel("parameters, in 200 tensors")
        panel.set_ylabel("cost; 1 is add(a, b, out=c)")
        panel.legend(fontsize=6)
        panel.spines[["top", "right"]].set_visible(False)
    _save(figure, title, file)


def _comparable(rows: Rows) -> Rows:
    """The rows that differ only in the number of parameters."""
    return [row for row in rows if (row["tensors"], row["dtype"]) == BARS_AT[1:]]


def _at(rows: Rows, size: tuple[int, int, str]) -> Rows:
    """The rows of a size, or of the largest size if this one was not measured."""
    sizes = {(row["parameters"], row["tensors"], row["dtype"]) for row in rows}
    chosen = size if size in sizes else max(sizes)
    return [row for row in rows if (row["parameters"], row["tensors"], row["dtype"]) == chosen]


def _name(row: dict[str, Any]) -> str:
    return row["name"] + ("" if row["mode"] in ("eager", "jit") else f" ({row['mode']})")


def _save(figure: Any, title: str, file: pathlib.Path) -> None:
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
