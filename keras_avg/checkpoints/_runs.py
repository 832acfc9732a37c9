"""Tells the snapshots of one run from those that other runs left in the same directory."""

import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple


class Run(NamedTuple):
    """One training that writes snapshots into a directory.

    A resumed training is a new run. It goes on from a snapshot of an earlier run, or from an update
    between two of them.

    Attributes:
        name: String that no other run has.
        earlier: Dict from the names of the runs that wrote into the directory before. The value is
            the number of updates after which this run goes on: snapshots of the earlier run up to
            there are part of this run. It is 0 if this run does not go on from the earlier one.
    """

    name: str
    earlier: Mapping[str, int]

    def has(self, snapshot: Any) -> bool:
        """Whether a snapshot is part of this run. The snapshot has a `run` and `updates`."""
        if snapshot.run.name == self.name:
            return True
        return snapshot.updates <= self.earlier.get(snapshot.run.name, 0)

    def attributes(self) -> dict[str, str]:
        """What is written into each file of this run."""
        return {"run": self.name, "earlier": json.dumps(dict(self.earlier))}


def of_file(attributes: Mapping[str, Any]) -> Run:
    """The run that wrote a file. Files of version 0.2.0 do not say it: they are of one run."""
    return Run(str(attributes.get("run", "")), json.loads(attributes.get("earlier", "{}")))


def begun(snapshots: Sequence[Any], updates: int, directory: Any) -> Run:
    """A new run, which begins after `updates` updates in a directory with these snapshots.

    Raises:
        ValueError: If it goes on from an earlier run, but several runs wrote the snapshots.
    """
    if updates:
        before = [newest(snapshots, directory)] if snapshots else []
    else:
        before = [snapshot.run for snapshot in snapshots]
    earlier = {name: min(n, updates) for run in before for name, n in run.earlier.items()}
    return Run(uuid.uuid4().hex, earlier | {run.name: updates for run in before})


def newest(snapshots: Sequence[Any], directory: Any) -> Run:
    """The run before which all other runs in a directory took place.

    Raises:
        ValueError: If there is no such run, because two runs did not know of each other.
    """
    runs = {snapshot.run.name: snapshot.run for snapshot in snapshots}
    for run in runs.values():
        if runs.keys() <= {run.name, *run.earlier}:
            return run
    firsts = [next(s.file.name for s in snapshots if s.run.name == name) for name in runs]
    raise ValueError(
        f"The snapshots in {str(directory)!r} are of several runs, and cannot be combined. "
        f"Received: {_some(firsts)}, each of another run. Keep the snapshots of one run in a "
        "directory."
    )


def names(snapshots: Iterable[Any]) -> str:
    """The names of the first few files, for a message."""
    return _some([snapshot.file.name for snapshot in snapshots])


def _some(files: Sequence[str]) -> str:
    return ", ".join(files[:3]) + ", ..." * (len(files) > 3)
