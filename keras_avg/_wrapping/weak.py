"""Collections of what others keep alive, which several threads may look through and change."""

import threading
import weakref
from collections.abc import Iterator
from typing import Any


class WeakList:
    """Objects, in any order, as long as somebody else keeps them alive.

    Looking through a `weakref.WeakSet` fails while another thread adds something to it. So each
    look is at a copy.
    """

    def __init__(self) -> None:
        self._references: dict[int, Any] = {}
        self._guard = threading.RLock()  # again in one thread, when garbage is collected meanwhile

    def add(self, thing: Any) -> None:
        """Remember an object, once."""
        key = id(thing)

        def forget(reference: Any) -> None:
            with self._guard:
                if self._references.get(key) is reference:
                    del self._references[key]

        with self._guard:
            if thing not in self:
                self._references[key] = weakref.ref(thing, forget)

    def discard(self, thing: Any) -> None:
        """Forget an object, if it is there."""
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
