"""Functions that the studies share: intervals over seeds, tables, and the result files."""

import json
import os
import pathlib

import keras
import numpy as np
import scipy.stats


def interval(values):
    """The mean, and half the width of its 95 % interval (Student's t)."""
    values = np.asarray(values, "float64")
    if len(values) < 2:
        return float(values.mean()), float("nan")
    error = values.std(ddof=1) / len(values) ** 0.5
    return float(values.mean()), float(error * scipy.stats.t.ppf(0.975, len(values) - 1))


def cell(score, values):
    mean, half = interval(values)
    digits = 3 if "likelihood" in score else 2
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def by_method(runs):
    """Turn one dict of methods and scores for each seed into lists with a value for each seed."""
    return {
        method: {score: [run[method][score] for run in runs] for score in runs[0][method]}
        for method in runs[0]
    }


def table(found, compared_with):
    """A Markdown table of each method and score, with the difference in accuracy, seed by seed.

    Args:
        found: Dict of methods, of dicts of scores, of lists with one value for each seed.
        compared_with: The method that the differences are taken from.
    """
    scores = list(found[compared_with])
    heading = f"{scores[0]}, less {compared_with}"
    lines = ["| " + " | ".join(["", *scores, heading]) + " |", "|---" * (len(scores) + 2) + "|"]
    base = np.asarray(found[compared_with][scores[0]])
    for method, values in found.items():
        cells = [cell(score, values[score]) for score in scores]
        difference = np.asarray(values[scores[0]]) - base
        cells.append("" if method == compared_with else cell(scores[0], difference))
        lines.append("| " + " | ".join([method, *cells]) + " |")
    return "\n".join(lines)


def save(path, description, settings, seeds, values, compared_with, **more):
    """Write the results into a JSON file, and the tables into a page beside it. Print the page.

    Args:
        path: The path of the JSON file. The page has the same name with the ending `.md`.
        description: The docstring of the study.
        settings: Dict. The settings, and how they were chosen.
        seeds: Integer. The number of seeds.
        values: Dict of headings, of methods, of scores, of lists with one value for each seed.
        compared_with: The method that the differences are taken from.
        **more: Dicts of numbers. Each becomes a small table of its own.
    """
    path = pathlib.Path(path)
    about = {
        "hardware": f"{os.cpu_count()} CPU cores",
        "keras": keras.__version__,
        "backend": keras.backend.backend(),
        "seeds": seeds,
        "settings": settings,
    }
    path.write_text(json.dumps(about | {"values": values} | more, indent=1) + "\n")
    title, _, text = description.strip().partition("\n")
    lines = [
        f"# {title.rstrip('.')}",
        text.strip("\n"),
        f"Mean over {seeds} seeds, and its 95 % interval.",
    ]
    for heading, found in values.items():
        lines += [f"## {heading}", table(found, compared_with)]
    for heading, numbers in more.items():
        rows = "\n".join(f"| {name} | {number:.2f} |" for name, number in numbers.items())
        lines += [f"## {heading}", "| | |\n|---|---|\n" + rows]
    lines.append(
        f"Keras {about['keras']} on {about['backend']}, {about['hardware']}. "
        f"The values of each seed are in `{path.name}`."
    )
    page = "\n\n".join(lines) + "\n"
    path.with_suffix(".md").write_text(page)
    print(page, flush=True)
