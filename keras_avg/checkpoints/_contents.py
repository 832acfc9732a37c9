"""Reads names, shapes and single arrays from a file of Keras. No model is needed."""

import contextlib
import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import h5py
import numpy as np

from keras_avg.checkpoints import _files

WEIGHTS_IN_KERAS = "model.weights.h5"
KINDS = (".keras", ".weights.h5", ".weights.json")


class Contents:
    """The arrays of a file, and its config if it has one. An array is read only on request.

    Args:
        arrays: Dict of HDF5 data sets by their full names, such as `"optimizer/vars/updates"`.
        config: Dict, the config of the model in a `.keras` file. None for other kinds of files.
    """

    def __init__(self, arrays: Mapping[str, Any], config: Any) -> None:
        self.arrays = arrays
        self.config = config

    def groups(self) -> dict[str, dict[str, Any]]:
        """A dict by the paths of the saved objects. Each is a dict of data sets by their names."""
        found: dict[str, dict[str, Any]] = {}
        for name, array in self.arrays.items():
            path, _, own = name.rpartition("/")
            found.setdefault(path.removesuffix("vars").rstrip("/"), {})[own] = array
        return found


def read_array(array: Any) -> Any:
    """A data set as a NumPy array. It has the dtype that was saved."""
    if array.attrs.get("dtype") == "bfloat16":
        return np.array(array, dtype="bfloat16")
    return array[...]


@contextlib.contextmanager
def opened(file: Any) -> Iterator[Contents]:
    """Context in which the contents of a file can be read. Links to other files are left out.

    Raises:
        ValueError: If the file is missing, of another kind, or cut short.
    """
    _files.refuse_missing(file)
    path = os.fspath(file)
    if not path.endswith(KINDS):
        raise ValueError(f"A file must end in {', '.join(KINDS)}. Received: {path!r}.")
    with contextlib.ExitStack() as stack:
        try:
            contents = _contents(path, stack)
        except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise _files.unreadable(path, error) from error
        yield contents


def _contents(path: str, stack: contextlib.ExitStack) -> Contents:
    if path.endswith(".keras"):
        archive = stack.enter_context(zipfile.ZipFile(path))
        config = json.loads(archive.read("config.json"))
        stored = stack.enter_context(archive.open(WEIGHTS_IN_KERAS))
        return Contents(dict(_arrays(stack.enter_context(h5py.File(stored, "r")))), config)
    if path.endswith(".weights.h5"):
        return Contents(dict(_arrays(stack.enter_context(h5py.File(path, "r")))), None)
    with open(path, encoding="utf-8") as text:
        shards = json.load(text)["weight_map"].values()
    names = {name for each in shards for name in ([each] if isinstance(each, str) else each)}
    arrays: dict[str, Any] = {}
    for name in sorted(names):
        shard = os.path.join(os.path.dirname(path), os.path.basename(name))
        arrays.update(_arrays(stack.enter_context(h5py.File(shard, "r"))))
    return Contents(arrays, None)


def _arrays(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name in group:
        if type(group.get(name, getlink=True)) is not h5py.HardLink:
            continue
        found = group[name]
        if isinstance(found, h5py.Group):
            yield from _arrays(found, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", found
