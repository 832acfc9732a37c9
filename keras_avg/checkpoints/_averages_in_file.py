"""The averages that wrappers of keras_avg left in a file."""

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import keras

from keras_avg._wrapping import belonging
from keras_avg.checkpoints._contents import Contents, read_array


class AveragesInFile(NamedTuple):
    """What one wrapper left in a file.

    Attributes:
        path: Where in the file: `"optimizer"`, or `"optimizer/inner_optimizer"`.
        arrays: Dict of its data sets by their names.
        config: Dict, the serialized wrapper; None where the file does not say.
    """

    path: str
    arrays: dict[str, Any]
    config: Any

    def counter(self, name: str) -> int:
        """One of the counters: `"updates"`, `"snapshots"`, `"averages_in_model"`."""
        return int(read_array(self.arrays[name]))

    def stores(self) -> dict[str, dict[int, Any]]:
        """What was kept: data sets by the name of their store, and by their variables' numbers."""
        found: dict[str, dict[int, Any]] = {}
        for name, array in self.arrays.items():
            numbered = re.fullmatch(r"(.+)_(\d+)", name)
            if numbered and not name.startswith(("raw_", "slot_", "variable_", "weight_")):
                found.setdefault(numbered[1], {})[int(numbered[2])] = array
        return found

    def kind(self) -> Any:
        """The wrapper's class, if it is known here; else None."""
        if self.config is None:
            return None
        name = self.config.get("registered_name") or self.config["class_name"]
        return keras.saving.get_registered_object(name)

    def why_none(self) -> str:
        """A sentence, if the file should have had averages and has none; else ""."""
        attributes = dict(self.arrays[belonging.COUNTERS[0]].attrs)
        why = belonging.WHY.get(attributes.get("why_none", ""))
        return f" The file has no averages, because {why}" if why else ""


def averages_in(contents: Contents) -> list[AveragesInFile]:
    """The wrappers that left something in a file, outer ones first."""
    configs = dict(_configs(contents.config))
    return [
        AveragesInFile(path, arrays, configs.get(path))
        for path, arrays in sorted(contents.groups().items())
        if set(belonging.COUNTERS) <= arrays.keys()
    ]


def _configs(config: Any) -> Iterator[tuple[str, Any]]:
    """The serialized optimizers of a `.keras` file, by the paths under which Keras saves them."""
    compiled = (config or {}).get("compile_config") or {}
    optimizer = compiled.get("optimizer")
    if isinstance(optimizer, dict):
        yield from _walk("optimizer", optimizer)


def _walk(path: str, optimizer: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    yield path, optimizer
    own = optimizer.get("config") or {}
    for key in ("optimizer", "inner_optimizer"):  # of a wrapper of ours, and of Keras'
        if isinstance(own.get(key), dict):
            yield from _walk(f"{path}/inner_optimizer", own[key])
    members = (own.get("optimizer_map") or {}).get("config") or {}
    counts: Counter[str] = Counter()
    for member in [members.get("default_optimizer"), *members.get("optimizer_map", {}).values()]:
        if isinstance(member, dict):
            # Keras numbers what has one class. Its order may be another: the class is the same.
            name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", member["class_name"]).lower()
            number = f"_{counts[name]}" if counts[name] else ""
            counts[name] += 1
            yield from _walk(f"{path}/optimizers/{name}{number}", member)
