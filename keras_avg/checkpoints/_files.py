"""Checks lists of files, and reads a model's values from each file."""

import os
from collections.abc import Iterable, Iterator
from typing import Any

import keras

from keras_avg import _keras_internals
from keras_avg._wrapping import nesting
from keras_avg.checkpoints import _weights


def listed(filepaths: Any) -> list[Any]:
    """The files as a list, after a check that all of them exist.

    Raises:
        ValueError: If `filepaths` is not a list of paths, is empty, or a file is missing.
    """
    if isinstance(filepaths, str | bytes | os.PathLike) or not isinstance(filepaths, Iterable):
        raise ValueError(
            f"`filepaths` must be a list of files. Received: filepaths={filepaths!r}. For a "
            "pattern pass sorted(glob.glob(pattern))."
        )
    files = list(filepaths)
    if not files:
        raise ValueError("There is no file to read. Received: filepaths=[].")
    for file in files:
        refuse_missing(file)
    return files


def refuse_missing(file: Any) -> None:
    """Raise if this is not the path of a file that exists."""
    if not isinstance(file, str | os.PathLike):
        raise ValueError(f"A file must be given by its path. Received: {file!r}.")
    is_remote = "://" in str(file)  # Keras copies such a file to this machine to read it.
    if not is_remote and not os.path.exists(file):
        raise ValueError(f"There is no file {os.fspath(file)!r}. Nothing was changed.")


def with_progress(files: list[Any], verbose: int, passes: int = 1) -> Iterator[Any]:
    """Yield the files one after the other, and move a progress bar after each.

    Args:
        files: List of files.
        verbose: Integer, as for `keras.utils.Progbar`.
        passes: Integer >= 1. The number of passes over the list.
    """
    progress = keras.utils.Progbar(passes * len(files), verbose=verbose, unit_name="file")
    for _ in range(passes):
        for file in files:
            yield file
            progress.add(1)


def read(model: Any, file: Any) -> list[Any]:
    """The values in a file for each of `model.variables`, as tensors. None if there is no value.

    The model does not change. The optimizer and the metrics in the file are not read.

    Raises:
        ValueError: If it is not a file of such a model, or if it is cut short.
    """
    path = os.fspath(file)
    without = [*nesting.optimizers_of(model), *model.metrics]
    try:
        return _keras_internals.values_in_file(model, path, without)
    except Exception as error:  # From zip, HDF5, Keras or a layer: the message names the file.
        raise unreadable(path, error, f"into the model {model.name!r}") from error
    finally:
        _weights.renew_what_is_derived(model)  # They may be derived from the file's values.


def unreadable(path: str, error: Exception, where: str = "") -> ValueError:
    """The error to raise after another error occurred while a file was read."""
    if isinstance(error, OSError | EOFError) or "zip" in str(error):
        advice = "It may have been cut short, or be something else than a file of Keras."
    else:
        advice = "It must be of a model with the same layers and shapes."
    return ValueError(
        f"{path!r} cannot be read{where and ' '}{where}. {advice} Nothing was changed. Received: "
        f"{type(error).__name__}: {error}"
    )
