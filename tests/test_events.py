"""Events reach every handler, whatever a handler does."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from importlib.metadata import EntryPoint

import pytest

from torchsnapshot import event_handlers
from torchsnapshot.event import Event
from torchsnapshot.event_handlers import (
    EventHandler,
    get_event_handlers,
    log_event,
    logged_action,
    register_event_handler,
    unregister_event_handler,
)


class Recorder:
    """Keeps what it hears."""

    def __init__(self) -> None:
        self.heard: list[Event] = []

    def handle_event(self, event: Event) -> None:
        """Keep the event."""
        self.heard.append(event)


class Broken:
    """Fails on everything."""

    def handle_event(self, event: Event) -> None:
        """Fail."""
        raise OSError("no network")


INSTALLED = Recorder()


def make_installed() -> EventHandler:
    """What an entry point names."""
    return INSTALLED


def make_nothing() -> object:
    """A factory whose product is no handler."""
    return object()


@pytest.fixture(autouse=True)
def clean_handlers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test sees another's handlers."""
    monkeypatch.setattr(event_handlers, "_log_handlers", [])
    INSTALLED.heard.clear()
    event_handlers._installed_handlers.cache_clear()
    yield
    event_handlers._installed_handlers.cache_clear()


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The functions in this module that installed packages name."""
    names: list[str] = []

    def entry_points(group: str) -> list[EntryPoint]:
        assert group == "event_handlers"
        return [EntryPoint(name, f"{__name__}:{name}", group) for name in names]

    monkeypatch.setattr(event_handlers, "entry_points", entry_points)
    return names


def test_registered_handler_hears_until_it_is_unregistered() -> None:
    """A handler hears each event once while it is registered, however often it was registered."""
    recorder = Recorder()
    register_event_handler(recorder)
    register_event_handler(recorder)
    event = Event("take", {"action": "start", "rank": 0})
    log_event(event)
    unregister_event_handler(recorder)
    unregister_event_handler(recorder)
    log_event(Event("take"))
    assert recorder.heard == [event]


def test_failing_handler_fails_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """What one handler raises is logged, and the next one still hears the event."""
    recorder = Recorder()
    register_event_handler(Broken())
    register_event_handler(recorder)
    with caplog.at_level(logging.WARNING):
        log_event(Event("restore"))
    assert [event.name for event in recorder.heard] == ["restore"]
    assert "no network" in caplog.text


def test_action_is_told_from_start_to_end() -> None:
    """A block's start and end are events with one id, the end says whether it raised, and ``random`` is not drawn."""
    recorder = Recorder()
    register_event_handler(recorder)
    state = random.getstate()
    with logged_action("take"):
        assert [event.metadata["action"] for event in recorder.heard] == ["start"]

    def fail() -> None:
        with logged_action("restore"):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert random.getstate() == state
    facts = [(event.name, event.metadata["action"], event.metadata.get("is_success")) for event in recorder.heard]
    assert facts == [
        ("take", "start", None),
        ("take", "end", True),
        ("restore", "start", None),
        ("restore", "end", False),
    ]
    ids = [event.metadata["unique_id"] for event in recorder.heard]
    assert ids[0] == ids[1] != ids[2] == ids[3]
    assert all(event.metadata["rank"] == 0 for event in recorder.heard)


def test_only_handlers_can_be_registered() -> None:
    """An object without ``handle_event`` is refused."""
    with pytest.raises(TypeError, match="handle_event"):
        register_event_handler(object())  # type: ignore[arg-type]


def test_installed_handler_is_found(installed: list[str]) -> None:
    """A handler that an entry point names hears events without being registered."""
    installed.append("make_installed")
    log_event(Event("read_object"))
    assert [event.name for event in INSTALLED.heard] == ["read_object"]


def test_bad_entry_points_are_passed_over(installed: list[str], caplog: pytest.LogCaptureFixture) -> None:
    """Entry points that can't be loaded, or name no handler, are logged; the others count."""
    installed.extend(["missing", "make_nothing", "make_installed"])
    with caplog.at_level(logging.WARNING):
        assert get_event_handlers() == [INSTALLED]
    assert "missing" in caplog.text
    assert "make_nothing" in caplog.text
