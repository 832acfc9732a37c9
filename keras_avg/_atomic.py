"""Writes files so that a stop of the process or the machine leaves a whole file or none."""

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

ASIDE = ".aside-"  # The names of unfinished files begin with this.


def is_local(path: Any) -> bool:
    """Whether a path is a file of this machine, and not a URL. Such a file can be renamed."""
    return "://" not in os.fspath(path)


@contextlib.contextmanager
def written_aside(path: Any) -> Iterator[pathlib.Path]:
    """Context that gives another path to write to. At its end the new file replaces the old one.

    The new file is flushed to disk before it takes the name of the old one. So at any moment the
    name stands for a whole file: the old one, or the new one. If the body raises, the old file
    stays. If the process is killed, its unfinished file is left behind. The next process that
    writes to the same path removes it. Two processes must not write to the same path at one time.

    Args:
        path: String or path of a local file. Its folder is made if it does not exist.

    Yields:
        A path in the same folder, with the same suffixes.
    """
    target = pathlib.Path(os.path.realpath(path))  # For a link, the file to which it leads.
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
    """Remove unfinished files that killed processes have left beside a file."""
    target = pathlib.Path(os.path.realpath(path))
    for folder in target.parent.glob(f"{_escaped(_mark(target))}*"):
        _remove(folder)


def keep_as(path: Any, other: Any) -> None:
    """Give a file a second name. The file keeps it when another file takes the first name."""
    with written_aside(other) as aside:
        try:
            os.link(path, aside)
        except OSError:  # Some file systems have no links.
            shutil.copy2(path, aside)


def flush(path: pathlib.Path) -> None:
    """Write a file, or the names in a folder, to the disk. Windows cannot do it for folders."""
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
