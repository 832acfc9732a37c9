"""Finds the averages that wrappers of keras_avg wrote into a file."""

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import keras

from keras_avg._wrapping import belonging
from keras_avg.checkpoints._contents import Contents, read_array


class AveragesInFile(NamedTuple):
    """The state that one wrapper wrote into a file.

    Attributes:
        path: The place in the file: `"optimizer"`, or `"optimizer/inner_optimizer"`.
        arrays: Dict of the wrapper's data sets by their names.
        config: Dict, the serialized wrapper. None if the file does not contain it.
    """

    path: str
    arrays: dict[str, Any]
    config: Any

    def counter(self, name: str) -> int:
        """The value of a counter: `"updates"`, `"snapshots"` or `"averages_in_model"`."""
        return int(read_array(self.arrays[name]))

    def stores(self) -> dict[str, dict[int, Any]]:
        """The stores: a dict by their names. Each is a dict of data sets by variable number."""
        found: dict[str, dict[int, Any]] = {}
        for name, array in self.arrays.items():
            numbered = re.fullmatch(r"(.+)_(\d+)", name)
            if numbered and not name.startswith(("raw_", "slot_", "variable_", "weight_")):
                found.setdefault(numbered[1], {})[int(numbered[2])] = array
        return found

    def kind(self) -> Any:
        """The wrapper's class. None if the class is not registered in this process."""
        if self.config is None:
            return None
        name = self.config.get("registered_name") or self.config["class_name"]
        return keras.saving.get_registered_object(name)

    def why_none(self) -> str:
        """A sentence that says why the file has no averages, or ""."""
        attributes = dict(self.arrays[belonging.COUNTERS[0]].attrs)
        why = belonging.WHY.get(attributes.get("why_none", ""))
        return f" The file has no averages, because {why}" if why else ""


def averages_in(contents: Contents) -> list[AveragesInFile]:
    """The wrappers whose state is in a file, outer ones first."""
    configs = dict(_configs(contents.config))
    return [
        AveragesInFile(path, arrays, configs.get(path))
        for path, arrays in sorted(contents.groups().items())
        if set(belonging.COUNTERS) <= arrays.keys()
    ]


def _configs(config: Any) -> Iterator[tuple[str, Any]]:
    """The serialized optimizers of a `.keras` file, with the paths under which Keras saves them."""
    compiled = (config or {}).get("compile_config") or {}
    optimizer = compiled.get("optimizer")
    if isinstance(optimizer, dict):
        yield from _walk("optimizer", optimizer)


def _walk(path: str, optimizer: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    yield path, optimizer
    own = optimizer.get("config") or {}
    for key in ("optimizer", "inner_optimizer"):  # The keys of our wrappers and of Keras'.
        if isinstance(own.get(key), dict):
            yield from _walk(f"{path}/inner_optimizer", own[key])
    members = (own.get("optimizer_map") or {}).get("config") or {}
    counts: Counter[str] = Counter()
    for member in [members.get("default_optimizer"), *members.get("optimizer_map", {}).values()]:
        if isinstance(member, dict):
            # Keras numbers the members of one class. Its order may differ from this order, but
            # members with the same name have the same class.
            name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", member["class_name"]).lower()
            number = f"_{counts[name]}" if counts[name] else ""
            counts[name] += 1
            yield from _walk(f"{path}/optimizers/{name}{number}", member)
