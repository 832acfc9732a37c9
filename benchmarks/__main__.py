"""`python -m benchmarks`: see `--help`."""

import argparse
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

from benchmarks import __doc__ as description
from benchmarks import hardware, pictures, tables

BACKENDS = ("tensorflow", "jax", "torch")
PARTS = ("steps", "fits", "swaps", "memory", "batch_norm", "workers")
RESULTS = pathlib.Path(__file__).parent / "results"
ROOT = pathlib.Path(__file__).parents[1]  # workers are started by the path of their program


def main() -> None:
    options = parsed()
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / f"{hardware.file_name(options.hardware)}.json"
    for backend in options.backend:
        for part in options.parts:
            print(f"{backend}: {part}", flush=True)
            if (rows := measured(backend, part, options)) is not None:
                rows = [row | {"clock": options.clock} for row in rows]
                keep(file, options.hardware, backend, part, rows)
    if file.exists():
        results = json.loads(file.read_text())
        tables.write(results, file.with_suffix(".md"))
        pictures.draw(results, file)


def parsed() -> argparse.Namespace:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m benchmarks", None, description, formatter_class=style
    )
    there = [name for name in BACKENDS if importlib.util.find_spec(name)]
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, default=there)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--quick", action="store_true", help="fewer and smaller sizes")
    parser.add_argument("--rounds", type=int, default=15, help="how many rounds to measure")
    parser.add_argument(
        "--sizes", nargs="+", type=size, help="parameters x tensors x dtype: 1000000x10xfloat32"
    )
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: processor time of all threads, for a machine with other users",
    )
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--hardware", default=hardware.name(), help="its plain name")
    return parser.parse_args()


def size(text: str) -> tuple[int, int, str]:
    parameters, tensors, dtype = (*text.split("x"), "float32")[:3]
    return int(parameters), int(tensors), dtype


def measured(backend: str, part: str, options: argparse.Namespace) -> list[Any] | None:
    """The rows of one part on one backend. If the part failed, print this and return None."""
    chosen = {name: getattr(options, name) for name in ("quick", "rounds", "sizes", "clock")}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"KERAS_BACKEND": backend, "PYTHONPATH": path}
    environment["TF_CPP_MIN_LOG_LEVEL"] = "3"
    if options.clock == "cpu":
        environment["OMP_WAIT_POLICY"] = "passive"  # waiting threads use no processor time
    with tempfile.TemporaryDirectory() as folder:
        output = pathlib.Path(folder) / "rows.json"
        command = [sys.executable, "-m", "benchmarks.part", part, json.dumps(chosen), str(output)]
        ended = subprocess.run(command, env=environment)
        if ended.returncode == 0:
            return json.loads(output.read_text())
    print(f"{backend}: {part} failed", file=sys.stderr)
    return None


def keep(file: pathlib.Path, name: str, backend: str, part: str, rows: list[Any]) -> None:
    """Write rows into the file. They replace the rows of an earlier run, if there are any."""
    results = json.loads(file.read_text()) if file.exists() else {"results": {}}
    results["hardware"] = name
    results["software"] = results.get("software", {}) | hardware.versions()
    results["results"].setdefault(backend, {})[part] = rows
    file.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
