"""Ranks that stay, and do one thing after the other: a property-based test has one launch for all of its examples."""

from __future__ import annotations

import faulthandler
import importlib
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

from launch import TIMEOUT_SECONDS, Options, Raised, Ranks, result_of, started


class Crew:
    """The ranks of one launch, waiting. See ``crew``."""

    def __init__(self, ranks: Ranks, connections: list[Connection]) -> None:
        self._ranks = ranks
        self._connections = connections
        self.is_whole = True

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What the function, which stands at the top of a test module, returns on every rank.

        Raises:
            AssertionError: it raised on a rank, or a rank has ended; with tracebacks, or the rank's output.
        """
        for connection in self._connections:
            connection.send((function.__module__.rpartition(".")[2], function.__qualname__, args))
        try:
            results = [connection.recv() for connection in self._connections]
        except (EOFError, ConnectionResetError):
            self.is_whole = False
            outcomes = self._ranks.outcomes()
            raise AssertionError([(each.rank, each.exit_code, each.output) for each in outcomes]) from None
        tracebacks = [f"rank {rank}:\n{each.traceback}" for rank, each in enumerate(results) if type(each) is Raised]
        assert not tracebacks, "\n".join(tracebacks)
        return results


@contextmanager
def crew(num_ranks: int) -> Iterator[Crew]:
    """Start ranks in a gloo group, which end with the context."""
    with (
        tempfile.TemporaryDirectory(prefix="crew-") as folder,
        Listener(f"{folder}/socket", "AF_UNIX", backlog=num_ranks) as listener,
        started(num_ranks, [serve], [listener.address], Options()) as ranks,
    ):
        connections: dict[int, Connection] = {}
        while len(connections) < num_ranks:
            connection = listener.accept()
            connections[connection.recv()] = connection
        try:
            yield Crew(ranks, [connections[rank] for rank in range(num_ranks)])
        finally:
            for connection in connections.values():
                connection.close()


def serve(address: str) -> None:
    """On each rank: do what is asked for until nobody asks any more."""
    import torch.distributed as dist

    # nobody has asked for anything yet; nor is it this process that ends, should the test wait for another one
    faulthandler.cancel_dump_traceback_later()
    with Client(address, "AF_UNIX") as connection:
        connection.send(dist.get_rank())
        while True:
            try:
                module, name, args = connection.recv()
            except EOFError:
                return
            faulthandler.dump_traceback_later(TIMEOUT_SECONDS, exit=True)
            connection.send(result_of(getattr(importlib.import_module(module), name), args))
            faulthandler.cancel_dump_traceback_later()
