"""Simulated processes over one store: real takes and collectors, one store operation at a time, in a chosen order."""

from __future__ import annotations

import threading
from collections.abc import Callable

from faults import Crash, WrappingBackend
from tiny_takes import Time, new_store, reopened

from torchsnapshot.errors import SnapshotError
from torchsnapshot.recent import Recent
from torchsnapshot.store import known
from torchsnapshot.store.backend import Backend

HOURS = 3600.0


class Stopped(BaseException):
    """The run is over; whoever still waits ends here."""


class Actor:
    """One process: a thread that the scheduler lets do one store operation at a time."""

    def __init__(self, world: World, name: str, run: Callable[[Actor], None]) -> None:
        self.world = world
        self.name = name
        self.process = name
        self.backend = GatedBackend(world.backend, self)
        self.repository = reopened(world.repository, self.backend)
        self.go = threading.Semaphore(0)
        self.is_done = False
        self.is_dead = False
        self.holds_deletes = False
        self.next = ("", "")
        self.keys: set[str] = set()
        self._run = run
        self.thread = threading.Thread(target=self._main, name=name, daemon=True)

    def _main(self) -> None:
        self.world.local.actor = self
        try:
            self.pause()
            self._run(self)
        except (Crash, Stopped, SnapshotError):
            pass
        except BaseException as error:
            self.world.errors.append(error)
        finally:
            self.is_done = True
            self.world.turn.release()

    def pause(self) -> None:
        """Wait to be let on."""
        self.world.turn.release()
        self.go.acquire()
        if self.world.is_over:
            raise Stopped
        if self.is_dead:
            raise Crash

    def sleep(self, seconds: float) -> None:
        """As a clock: others act meanwhile."""
        self.next = ("sleep", "")
        self.pause()
        self.world.time.seconds += seconds

    def now(self) -> float:
        """As a clock."""
        return self.world.time.seconds

    def monotonic(self) -> float:
        """As a clock."""
        return self.world.time.seconds


class GatedBackend(WrappingBackend):
    """Waits for the scheduler before each operation; a deleted blob is deleted once more at any time later."""

    def __init__(self, inner: Backend, actor: Actor) -> None:
        super().__init__(inner)
        self._actor = actor

    def around(self, operation: str, key: str, call: Callable[[], object]) -> object:
        """Wait, then do it."""
        self._actor.next = (operation, key)
        if operation == "put":
            self._actor.keys.add(key)
        self._actor.pause()
        if operation == "delete" and "/blobs/" in key:
            self._actor.world.late_deletes.append(key)
            if self._actor.holds_deletes:
                return {}
        return call()


class World:
    """A store, its actors, and the scheduler that picks who goes on."""

    def __init__(self, choose: Callable[[int], int]) -> None:
        self.choose = choose
        self.time = Time()
        self.repository = new_store(self.time)
        self.backend = self.repository.backend
        self.turn = threading.Semaphore(0)
        self.local = threading.local()
        self.errors: list[BaseException] = []
        self.late_deletes: list[str] = []
        self.is_over = False
        self.actors: list[Actor] = []
        self.successes: list[tuple[str, frozenset[str], str]] = []
        self.caches: dict[str, dict[tuple[str, str], known.Filled]] = {}

    def add(self, name: str, run: Callable[[Actor], None]) -> Actor:
        """One more process."""
        actor = Actor(self, name, run)
        self.actors.append(actor)
        return actor

    def start(self) -> None:
        """Bring every actor to the point before its first operation."""
        for actor in self.actors:
            actor.thread.start()
            self.turn.acquire()

    def step(self, actor: Actor) -> None:
        """Let one actor do one operation."""
        actor.go.release()
        self.turn.acquire()

    def run(self, *, jumps: int, crashes: int, max_steps: int = 3000) -> None:
        """Let the actors run, in an order that ``choose`` picks, until all are done."""
        self.start()
        for _ in range(max_steps):
            live = [actor for actor in self.actors if not actor.is_done]
            if not live:
                break
            event = self.choose(40)
            if event == 0 and jumps:
                jumps -= 1
                self.time.seconds += 2 * HOURS
            elif event == 1 and crashes:
                crashes -= 1
                live[self.choose(len(live))].is_dead = True
            elif event == 2 and self.late_deletes:
                self.backend.delete([self.late_deletes[self.choose(len(self.late_deletes))]])
            else:
                self.step(live[self.choose(len(live))])
        self.end()

    def until(self, actor: Actor, operation: str, part: str) -> None:
        """Let one actor go on until it is about to do such an operation on a key that holds ``part``."""
        while not (actor.next[0] == operation and part in actor.next[1]):
            assert not actor.is_done, f"{actor.name} ended without {operation} of {part}"
            self.step(actor)

    def finish(self, actor: Actor) -> None:
        """Let one actor go on to its end."""
        while not actor.is_done:
            self.step(actor)

    def land(self) -> None:
        """Let every delete of a blob that was sent so far land, once more."""
        self.backend.delete(self.late_deletes)

    def end(self) -> None:
        """Stop everybody, and raise what went wrong in them."""
        self.is_over = True
        for actor in self.actors:
            self.finish(actor)
            actor.thread.join()
        if self.errors:
            raise self.errors[0]


class CacheOfProcess(Recent[tuple[str, str], known.Filled]):
    """In place of the process-wide cache of ``known``: one for each simulated process."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world

    def _mine(self) -> dict[tuple[str, str], known.Filled]:
        actor: Actor = self._world.local.actor
        return self._world.caches.setdefault(actor.process, {})

    def get(self, key: tuple[str, str]) -> known.Filled | None:
        """The acting process's own."""
        return self._mine().get(key)

    def put(self, key: tuple[str, str], value: known.Filled) -> None:
        """Set an item of the acting process's own."""
        self._mine()[key] = value
