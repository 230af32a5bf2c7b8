"""What a take, a restore or a read tells those who watch: an event and its facts. Who hears it: ``event_handlers``."""

from __future__ import annotations

from dataclasses import dataclass, field

Fact = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened.

    Args:
        name: what: ``take``, ``async_take``, ``restore`` or ``read_object``.
        metadata: facts about it. The library gives ``action`` (``start``, ``end``; an asynchronous take also
            ``end_collection``), ``unique_id`` (the same for all events of one call), ``rank`` and, when it ends,
            ``is_success``.
    """

    name: str
    metadata: dict[str, Fact] = field(default_factory=dict)
