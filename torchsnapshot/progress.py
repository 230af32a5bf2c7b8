"""How long work tells somebody how far it is.

What lives here: the protocol and the one that says nothing. What doesn't: anything that prints; the command line has
its own.
"""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Told about work as it goes on. Every method may be called from any thread."""

    def start(self, label: str, total_nbytes: int | None = None) -> None:
        """A piece of work begins; where one is under way, it ends here.

        Args:
            label: what is done, for people ("reading manifests").
            total_nbytes: how many bytes the work has, None where nobody knows yet.
        """

    def advance(self, nbytes: int, items: int = 1) -> None:
        """``nbytes`` more bytes, in ``items`` more objects, are done."""

    def finish(self) -> None:
        """The work that was started last has ended, well or not."""


class _NoProgress:
    """Says nothing."""

    __slots__ = ()

    def start(self, label: str, total_nbytes: int | None = None) -> None: ...

    def advance(self, nbytes: int, items: int = 1) -> None: ...

    def finish(self) -> None: ...


NO_PROGRESS: Progress = _NoProgress()
"""For work that nobody watches."""
