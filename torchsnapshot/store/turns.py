"""Takes of one path in one process commit in the order of their starts: who waits for whom.

What lives here: the queues of this process. What doesn't: other processes (the generation number orders those).
"""

from __future__ import annotations

import os
import threading
import weakref

_POLL_SECONDS = 1.0


class Turn:
    """A place in the queue of one path. A turn that is left, or forgotten by everybody, holds up nobody."""

    __slots__ = ("__weakref__", "_place")

    def __init__(self, place: tuple[str, str]) -> None:
        self._place = place
        with _state.condition:
            _state.queues.setdefault(place, []).append(weakref.ref(self))

    def wait(self) -> None:
        """Return when every earlier turn of this path has been left."""
        with _state.condition:
            while self._is_behind():
                # the time-out is for turns that are garbage-collected, which wakes nobody
                _state.condition.wait(_POLL_SECONDS)

    def leave(self) -> None:
        """Let the later ones go on. May be called twice."""
        with _state.condition:
            queue = [ref for ref in _state.queues.get(self._place, ()) if ref() not in (None, self)]
            if queue:
                _state.queues[self._place] = queue
            else:
                _state.queues.pop(self._place, None)
            _state.condition.notify_all()

    def _is_behind(self) -> bool:
        for ref in _state.queues.get(self._place, ()):
            turn = ref()
            if turn is not None:
                return turn is not self
        return False


class _State:
    def __init__(self) -> None:
        self.condition = threading.Condition()
        self.queues: dict[tuple[str, str], list[weakref.ref[Turn]]] = {}


_state = _State()


def _forget() -> None:
    global _state
    # a forked child has none of the threads that would leave these turns, and maybe a lock that nobody releases
    _state = _State()


os.register_at_fork(after_in_child=_forget)
