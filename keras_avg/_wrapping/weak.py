"""A list of weak references that several threads may read and change."""

import threading
import weakref
from collections.abc import Iterator
from typing import Any


class WeakList:
    """A collection of objects without an order. It does not keep the objects alive.

    A loop over a `weakref.WeakSet` fails if another thread adds an object meanwhile. So a loop over
    this list uses a copy.
    """

    def __init__(self) -> None:
        self._references: dict[int, Any] = {}
        self._guard = threading.RLock()  # `forget` may run in the same thread while it is held.

    def add(self, thing: Any) -> None:
        """Add an object, if it is not in the list."""
        key = id(thing)

        def forget(reference: Any) -> None:
            with self._guard:
                if self._references.get(key) is reference:
                    del self._references[key]

        with self._guard:
            if thing not in self:
                self._references[key] = weakref.ref(thing, forget)

    def discard(self, thing: Any) -> None:
        """Remove an object, if it is in the list."""
        with self._guard:
            if thing in self:
                del self._references[id(thing)]

    def __contains__(self, thing: Any) -> bool:
        reference = self._references.get(id(thing))
        return reference is not None and reference() is thing

    def __bool__(self) -> bool:
        return bool(self._references)

    def __iter__(self) -> Iterator[Any]:
        with self._guard:
            references = list(self._references.values())
        return iter([thing for r in references if (thing := r()) is not None])
