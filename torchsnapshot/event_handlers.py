"""Who hears of events: handlers that a program registers, and those that installed packages name.

A package names a handler by an entry point of the group ``event_handlers``: a function without arguments that returns
an object with ``handle_event(event)``.

Invariant: nothing that a handler does can fail the work it hears of. What it raises is logged, and the others still
hear the event.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Protocol, runtime_checkable

from torch import distributed

from torchsnapshot.event import Event

logger = logging.getLogger(__name__)

ENTRY_POINT_GROUP = "event_handlers"

_log_handlers: list[EventHandler] = []
"""Handlers that the program registered; the name is the old torchsnapshot's."""


@runtime_checkable
class EventHandler(Protocol):
    """Hears of every event, in the thread in which it happens."""

    def handle_event(self, event: Event) -> None:
        """Take note of ``event``."""


def register_event_handler(handler: EventHandler) -> None:
    """Let ``handler`` hear of every event from now on. Registering it again changes nothing.

    Raises:
        TypeError: it has no ``handle_event``.
    """
    if not isinstance(handler, EventHandler):
        raise TypeError(f"an event handler needs a method handle_event(event); got {type(handler).__name__}")
    if handler not in _log_handlers:
        _log_handlers.append(handler)


def unregister_event_handler(handler: EventHandler) -> None:
    """Let ``handler`` hear of nothing any more. One that was never registered is no error."""
    if handler in _log_handlers:
        _log_handlers.remove(handler)


def get_event_handlers() -> list[EventHandler]:
    """Every handler: those of installed packages (looked up once for a process), then the registered ones."""
    return [*_installed_handlers(), *_log_handlers]


def log_event(event: Event) -> None:
    """Tell every handler of ``event``."""
    for handler in get_event_handlers():
        try:
            handler.handle_event(event)
        except Exception:
            logger.warning("event handler %r failed on event %r", handler, event.name, exc_info=True)


@contextmanager
def logged_action(name: str) -> Generator[None, None, None]:
    """Tell every handler that the work ``name`` starts, runs as the block, and how it ends."""
    # not from `random`: whoever seeded it must get the same numbers with and without snapshots
    unique_id = int.from_bytes(os.urandom(7), "little")
    rank = distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
    log_event(Event(name, {"action": "start", "unique_id": unique_id, "rank": rank}))
    is_success = False
    try:
        yield
        is_success = True
    finally:
        log_event(Event(name, {"action": "end", "unique_id": unique_id, "rank": rank, "is_success": is_success}))


@cache
def _installed_handlers() -> tuple[EventHandler, ...]:
    made = (_make(point) for point in entry_points(group=ENTRY_POINT_GROUP))
    return tuple(handler for handler in made if handler is not None)


def _make(point: EntryPoint) -> EventHandler | None:
    try:
        handler = point.load()()
    except Exception:
        logger.warning("event handler %r (%s) can't be made", point.name, point.value, exc_info=True)
        return None
    if not isinstance(handler, EventHandler):
        logger.warning("event handler %r (%s) has no method handle_event(event)", point.name, point.value)
        return None
    return handler
