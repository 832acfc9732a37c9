"""Writes and reads files of averages. Each snapshot is one file: a whole file, or none."""

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import h5py
import numpy as np
from keras import ops

from keras_avg import _atomic, _keras_internals
from keras_avg.checkpoints import _files, _runs
from keras_avg.checkpoints._profiles import Profile
from keras_avg.checkpoints._runs import Run

FORMAT = "keras_avg averages 1"
NAME = re.compile(r"averages-(\d+)\.h5")
REST = "rest"
ROUNDING, TINY = 1e-3, 1e-7  # of float16, and of its smallest numbers


class Kept(NamedTuple):
    """One average of a model's variables.

    Attributes:
        profile: The weights that the average gives to the values of the run.
        start: Integer. The step at which averaging began.
        values: Dict of tensors by the places of their variables in `model.variables`.
    """

    profile: Profile
    start: int
    values: Mapping[int, Any]


def path_of(directory: Any, updates: int) -> pathlib.Path:
    """The file of the snapshot after this number of updates."""
    return pathlib.Path(directory) / f"averages-{updates:010d}.h5"


def in_directory(directory: Any) -> list[pathlib.Path]:
    """The files of snapshots in a directory, oldest first. Unfinished files are left out."""
    found = [p for p in pathlib.Path(directory).iterdir() if NAME.fullmatch(p.name)]
    return sorted(found, key=lambda path: updates_of(path))


def updates_of(path: pathlib.Path) -> int:
    """The number of updates before a snapshot, from the name of its file.

    Raises:
        ValueError: If the file has another name.
    """
    found = NAME.fullmatch(path.name)
    if found is None:
        raise ValueError(
            "A file of SaveAverages has a name such as averages-0000001200.h5. Received: "
            f"{str(path)!r}."
        )
    return int(found[1])


def write(path: pathlib.Path, model: Any, averages: Sequence[Kept], dtype: str, run: Run) -> None:
    """Write a snapshot. If the process is killed at any moment, there is a whole file or none.

    Args:
        path: The file.
        model: The model. Its variables that have no average are written as they are.
        averages: List of averages.
        dtype: String. Arrays with numbers that are too large for it are written in float32.
        run: The run that writes.
    """
    with _atomic.written_aside(path) as aside, h5py.File(aside, "w") as file:
        file.attrs.update(format=FORMAT, **run.attributes())
        _fill(file, model, averages, dtype)


def _fill(file: Any, model: Any, averages: Sequence[Kept], dtype: str) -> None:
    averaged = {place for kept in averages for place in kept.values}
    paths = list(map(_keras_internals.path_of, model.variables))
    rest = {i: v for i, v in enumerate(model.variables) if i not in averaged}
    for number, kept in enumerate(averages):
        group = file.create_group(f"average_{number}")
        group.attrs.update(gamma=kept.profile.gamma, time=kept.profile.time, start=kept.start)
        for place, value in kept.values.items():
            array = ops.convert_to_numpy(value)
            group.create_dataset(str(place), data=_narrow(array, dtype))
            group[str(place)].attrs["path"] = paths[place]
    group = file.create_group(REST)
    for place, variable in rest.items():
        array = np.asarray(ops.convert_to_numpy(variable))
        is_known = array.dtype.kind in "biuf"  # HDF5 has no bfloat16.
        group.create_dataset(str(place), data=array if is_known else array.astype("float32"))
        group[str(place)].attrs["path"] = paths[place]


def _narrow(array: Any, dtype: str) -> Any:
    with np.errstate(over="ignore"):
        narrow = array.astype(dtype)
    return narrow if np.isfinite(narrow).all() else array.astype(np.promote_types(dtype, "f4"))


class Stored(NamedTuple):
    """The description of one average in a file. Its values have not been read."""

    file: pathlib.Path
    group: str
    profile: Profile
    start: int
    arrays: int
    numbers: int
    dtype: str


class Snapshot(NamedTuple):
    """The description of a file.

    Attributes:
        file: The file.
        updates: Integer. The number of updates before the snapshot.
        run: The run that wrote it.
        averages: List of the averages in it.
        rest: Integer. The number of variables in it that have no average.
    """

    file: pathlib.Path
    updates: int
    run: Run
    averages: list[Stored]
    rest: int


def described(path: pathlib.Path) -> Snapshot:
    """The description of a file.

    Raises:
        ValueError: If it is not a file of snapshots, or if it is damaged.
    """
    try:
        with h5py.File(path, "r") as file:
            if file.attrs.get("format") != FORMAT:
                raise OSError("it was not written by SaveAverages")
            run = _runs.of_file(file.attrs)
            averages = [_stored(path, name, file[name]) for name in sorted(file) if name != REST]
            rest = len(file[REST])
    except (OSError, KeyError, ValueError) as error:
        raise _files.unreadable(str(path), error) from error
    return Snapshot(path, updates_of(path), run, averages, rest)


def _stored(path: pathlib.Path, name: str, group: Any) -> Stored:
    profile = Profile(float(group.attrs["gamma"]), float(group.attrs["time"]))
    dtypes = sorted({array.dtype.name for array in group.values()})
    numbers = sum(array.size for array in group.values())
    start = int(group.attrs["start"])
    return Stored(path, name, profile, start, len(group), numbers, " and ".join(dtypes))


def all_described(directory: pathlib.Path) -> list[Snapshot]:
    """The descriptions of all files in a directory, oldest first. None if it does not exist."""
    return [described(file) for file in in_directory(directory)] if directory.is_dir() else []


def are_in(stored: Stored, values: Mapping[int, Any]) -> bool:
    """Whether an average in a file has these values, up to the rounding of float16."""
    with h5py.File(stored.file, "r") as file:
        group = file[stored.group]
        if {str(place) for place in values} != set(group):
            return False
        return all(
            group[str(place)].shape == tuple(value.shape)
            and np.allclose(group[str(place)][...], ops.convert_to_numpy(value), ROUNDING, TINY)
            for place, value in values.items()
        )
