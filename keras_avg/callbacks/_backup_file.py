"""Writes and reads a backup. It is one file with Keras' weights and the position in training.

If there were two files and the process was killed between them, they would not fit together.
"""

import json
import pathlib
from typing import Any, NamedTuple

import h5py
import keras
import numpy as np

PART = "keras_avg_backup"  # The part of the file with the position. Keras ignores it.
INTEGERS, METRICS = "integers", "metrics"


class Position(NamedTuple):
    """A position in training.

    Attributes:
        epoch: Integer. The epoch in which training goes on. The first epoch is 0.
        batches: Integer. The number of finished batches of this epoch.
        metrics: List of arrays, the values of the model's metrics after these batches.
    """

    epoch: int
    batches: int
    metrics: list[np.ndarray]


def save(model: Any, path: pathlib.Path, epoch: int, batches: int) -> None:
    """Write a backup of a model, with the epoch and the number of finished batches in it."""
    model.save_weights(path, overwrite=True)
    with h5py.File(path, "r+") as file:
        part = file.create_group(PART)
        part.attrs["position"] = json.dumps({"epoch": epoch, "batches": batches})
        _write(part.create_group(INTEGERS), _integers(model))
        _write(part.create_group(METRICS), model.metrics_variables if batches else [])


def load(model: Any, path: pathlib.Path) -> Position | None:
    """Give a model the state of a backup.

    Returns:
        The position in training. None if the file has no position.

    Raises:
        OSError: If the file is damaged.
        ValueError: If it is of another model.
    """
    model.load_weights(path)
    with h5py.File(path, "r") as file:
        if PART not in file:
            return None
        part = file[PART]
        integers, arrays = _integers(model), _read(part[INTEGERS])
        if [v.shape for v in integers] == [a.shape for a in arrays]:
            for variable, array in zip(integers, arrays, strict=True):
                variable.assign(array)
        return Position(**json.loads(part.attrs["position"]), metrics=_read(part[METRICS]))


def _integers(model: Any) -> list[Any]:
    """The integer variables, such as the seeds of Dropout. Keras does not save all of them."""
    return [v for v in model.variables if not keras.backend.is_float_dtype(v.dtype)]


def _write(group: Any, variables: list[Any]) -> None:
    for i, variable in enumerate(variables):
        group[str(i)] = keras.ops.convert_to_numpy(variable)


def _read(group: Any) -> list[np.ndarray]:
    return [group[str(i)][...] for i in range(len(group))]
