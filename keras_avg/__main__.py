"""Averages files from the command line, without a script: `python -m keras_avg --help`."""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import keras

from keras_avg import _atomic, checkpoints
from keras_avg.checkpoints import _info_of_file
from keras_avg.checkpoints._contents import opened
from keras_avg.checkpoints._merge_weights import CURVES

WRITTEN = (".keras", ".weights.h5")  # the endings of the files that `average` writes


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit status: 0, or 2 after an error. The error is printed in one line.
    """
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except Exception as error:  # Users of a command need a message and no traceback.
        print(f"keras_avg: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


class _Parser(argparse.ArgumentParser):
    """Prints an error in one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"keras_avg: error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m keras_avg", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    average = commands.add_parser(
        "average",
        help="write the mean of several files into a new one",
        description="Write the mean of the weights in several files into a new one. At least one "
        "is a .keras file: the model is made from the last one. The new file has no optimizer.",
    )
    average.add_argument("files", nargs="+", metavar="FILE", help="files, oldest first")
    average.add_argument("--out", required=True, help="the file to write")
    average.add_argument(
        "--weights",
        default="linear",
        help=f"{', '.join(CURVES)} (an annealing that the mean imitates; linear is the plain mean, "
        "the default), or numbers as 1,2,3",
    )
    average.add_argument("--last", type=int, metavar="N", help="take the last N of the files only")
    average.set_defaults(run=_average)
    info = commands.add_parser(
        "info",
        help="say which averages a file holds",
        description="Say which averages a file holds, of which rule, how many snapshots they are "
        "of, and which copy is in the model. Files of callbacks.SaveAverages are described too. Of "
        "arrays only the shapes are read.",
    )
    info.add_argument("file", metavar="FILE")
    info.set_defaults(run=_info)
    return parser


def _average(options: Any) -> None:
    files = _last(options.files, options.last)
    weights = _weights(options.weights, len(files))
    _refuse_output(options.out, files)
    _warn_of_order(options.files, options.last is not None or len(set(weights)) > 1)
    model = _model(files)
    checkpoints.average(model, files, weights)
    with _atomic.written_aside(options.out) as aside:
        (model.save if options.out.endswith(".keras") else model.save_weights)(aside)
    print(f"{options.out}: the mean of {len(files)} files, {files[0]} to {files[-1]}")


def _last(files: list[str], number: int | None) -> list[str]:
    if number is None:
        return files
    if not 1 <= number <= len(files):
        raise ValueError(
            f"--last must be between 1 and the number of files. Received: --last {number} of "
            f"{len(files)} files."
        )
    return files[-number:]


def _weights(text: str, number: int) -> list[float]:
    if text in CURVES:
        return checkpoints.merge_weights(number, text)
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"--weights must be {', '.join(CURVES)}, or numbers as 1,2,3. Received: {text!r}."
        ) from None


def _refuse_output(out: str, files: Sequence[str]) -> None:
    if not out.endswith(WRITTEN):
        raise ValueError(f"--out must end in {' or '.join(WRITTEN)}. Received: {out!r}.")
    if os.path.realpath(out) in map(os.path.realpath, files):
        raise ValueError(f"--out must not be one of the files. Received: {out!r}.")
    if not os.path.isdir(os.path.dirname(out) or os.curdir):
        raise ValueError(f"There is no directory for --out {out!r}.")


def _warn_of_order(files: Sequence[str], does_order_matter: bool) -> None:
    def numbers(name: str) -> list[Any]:
        return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]

    if does_order_matter and list(files) != sorted(files, key=numbers):
        print(
            "keras_avg: warning: the files are not in the order of the numbers in their names; "
            "they are taken as oldest first, as given (`ls -v` sorts by numbers)",
            file=sys.stderr,
        )


def _model(files: Sequence[str]) -> Any:
    for file in reversed(files):
        if file.endswith(".keras"):
            with opened(file):  # This raises a clear error if the file is damaged.
                pass
            return keras.saving.load_model(file, compile=False)
    raise ValueError(
        "At least one of the files must be a .keras file: others do not say what the model is. "
        "In a script, keras_avg.checkpoints.average(model, files) takes them."
    )


def _info(options: Any) -> None:
    for line in _info_of_file.lines(options.file):
        print(line)


if __name__ == "__main__":
    sys.exit(main())
