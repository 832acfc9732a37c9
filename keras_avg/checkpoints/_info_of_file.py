"""Describes the averages in a file in a few lines of text."""

import os
import pathlib
from collections.abc import Iterator
from typing import Any

from keras_avg.checkpoints import _files, _snapshot_files
from keras_avg.checkpoints._averages_in_file import averages_in
from keras_avg.checkpoints._contents import opened
from keras_avg.decays import PowerFunction

UNSAID = ("name", "sequential_update")  # These arguments do not describe the rule.


def lines(file: Any) -> Iterator[str]:
    """Yield the lines that describe a file of Keras, or a file of `SaveAverages`.

    Raises:
        ValueError: If the file is missing, of another kind, or cut short.
    """
    _files.refuse_missing(file)
    path = os.fspath(file)
    is_of_keras = path.endswith(".weights.h5") or not path.endswith(".h5")
    yield from _of_model(path) if is_of_keras else _of_snapshot(pathlib.Path(path))


def _of_model(path: str) -> Iterator[str]:
    with opened(path) as contents:
        found = averages_in(contents)
        yield f"{path}: {len(contents.arrays)} arrays"
        in_model = [each for each in found if each.counter("averages_in_model")]
        for each in found:
            yield f"{each.path}: {_rule(each.config)}"
            yield f"  updates: {each.counter('updates')}"
            yield f"  snapshots: {each.counter('snapshots')}"
            for name, arrays in each.stores().items():
                numbers = sum(array.size for array in arrays.values())
                yield f"  {name}: {len(arrays)} arrays, {numbers} numbers"
            if why := each.why_none():
                yield f"  {' '.join(why.split())}"
        if not found:
            yield "averages: none"
        held = f"the averages of {in_model[0].path}" if in_model else "the raw weights"
        yield f"in the model: {held}"


def _of_snapshot(path: pathlib.Path) -> Iterator[str]:
    snapshot = _snapshot_files.described(path)
    yield f"{path}: a snapshot of SaveAverages, for keras_avg.checkpoints.synthesize"
    yield f"updates: {snapshot.updates}"
    yield f"run: {snapshot.run.name or 'unknown'}"
    for each in snapshot.averages:
        length = PowerFunction(gamma=each.profile.gamma).sigma_rel
        yield f"{each.group}: PowerFunction(gamma={each.profile.gamma:.6g}, sigma_rel={length:.4g})"
        yield f"  updates: {each.profile.time:.0f}, from step {each.start} on"
        yield f"  average: {each.arrays} arrays, {each.numbers} numbers, {each.dtype}"
    yield f"without an average: {snapshot.rest} arrays"


def _rule(config: Any) -> str:
    if config is None:
        return "averages of an unknown rule (only .keras files say)"
    shown = {
        name: value
        for name, value in config["config"].items()
        if isinstance(value, str | int | float) and value is not False and name not in UNSAID
    }
    decay = config["config"].get("average_decay")
    if isinstance(decay, dict):
        inside = ", ".join(f"{name}={value!r}" for name, value in decay["config"].items())
        shown["average_decay"] = f"{decay['class_name']}({inside})"
    return f"{config['class_name']}({', '.join(f'{n}={v}' for n, v in shown.items())})"
