"""Files that are there whole or not at all, whenever the process or the machine stops."""

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

ASIDE = ".aside-"  # what the names of unfinished files begin with


def is_local(path: Any) -> bool:
    """Whether a path is one of this machine's files, which can be renamed, and no URL."""
    return "://" not in os.fspath(path)


@contextlib.contextmanager
def written_aside(path: Any) -> Iterator[pathlib.Path]:
    """Context that gives another path to write to; what was written there then takes its place.

    The new file is flushed to disk before it takes the old one's name, so that at any moment the
    name stands for a whole file: the old one, or the new one. If the body raises, the old one
    stays. Where a process was killed, its unfinished file is left; the next one to write the same
    path removes it, and no other process may be writing that path meanwhile.

    Args:
        path: String or path of a local file. Its folder is made if it is not there.

    Yields:
        A path in the same folder, with the same suffixes.
    """
    target = pathlib.Path(os.path.realpath(path))  # of a link, the file that it leads to
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_unfinished(target)
    aside = pathlib.Path(tempfile.mkdtemp(prefix=_mark(target), dir=target.parent), target.name)
    try:
        yield aside
        flush(aside)
        _keep_permissions(target, aside)
        os.replace(aside, target)
        flush(target.parent)
    finally:
        _remove(aside.parent)


def remove_unfinished(path: Any) -> None:
    """Remove what processes that were killed have left of a file that they were writing."""
    target = pathlib.Path(os.path.realpath(path))
    for folder in target.parent.glob(f"{_escaped(_mark(target))}*"):
        _remove(folder)


def keep_as(path: Any, other: Any) -> None:
    """Let a file stay under another name too, whatever comes to have its own name."""
    with written_aside(other) as aside:
        try:
            os.link(path, aside)
        except OSError:  # not every file system has links
            shutil.copy2(path, aside)


def flush(path: pathlib.Path) -> None:
    """Let a file, or the names in a folder, reach the disk; Windows cannot do so for folders."""
    if path.is_dir() and os.name == "nt":
        return
    number = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _mark(target: pathlib.Path) -> str:
    return f"{ASIDE}{target.name}-"


def _escaped(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _keep_permissions(target: pathlib.Path, aside: pathlib.Path) -> None:
    if target.exists():
        aside.chmod(target.stat().st_mode & 0o7777)


def _remove(folder: pathlib.Path) -> None:
    with contextlib.suppress(OSError):
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
