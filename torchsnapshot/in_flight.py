"""The asynchronous takes of this process, and what a new take does about those that have not ended.

What lives here: the registry and the rules of ``busy``, alone and among ranks. What doesn't: the take itself
(``taking.take``, ``ranks.group_take``), the thread behind it (``engine.background``).

Invariant: among ranks all skip, or none does; a rank that cannot begin tells the others.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch.distributed import ProcessGroup

from torchsnapshot.coordination.distributed import group_of
from torchsnapshot.engine.background import Task
from torchsnapshot.errors import SnapshotError
from torchsnapshot.ranks.group_take import GroupTake
from torchsnapshot.state.app_state import check_app_state
from torchsnapshot.taking.take import Take, TakeOptions, open_take

Busy = Literal["wait", "skip", "overlap"]


@dataclass(frozen=True, slots=True, eq=False)
class InFlight:
    """One asynchronous take: the handle that its caller got, its thread, and the global ranks that take part."""

    handle: Any
    task: Task[Any]
    ranks: tuple[int, ...]


_in_flight: list[InFlight] = []


def begin_take(
    path: str,
    app_state: Mapping[str, Any],
    make_options: Callable[[], TakeOptions],
    pg: ProcessGroup | None,
    busy: Busy,
    *,
    in_background: bool,
) -> Take | GroupTake | InFlight:
    """Check the arguments and begin a take; returns the earlier one instead because of which this one is skipped.

    Args:
        path: where the snapshot will be.
        app_state: as the caller gave it.
        make_options: makes the options; an error of theirs is told to the other ranks, too.
        pg: process group of the job.
        busy: what to do about earlier takes in flight.
        in_background: return as soon as the caller may change its tensors.
    """
    group = group_of(pg)
    try:
        _wait_if_asked(busy)
        statefuls, options = check_app_state(app_state), make_options()
    except Exception as error:
        # the other ranks are on their way into this take, and would wait for this one
        raised = group.fail(error)
        if raised is error:
            raise
        raise raised from error
    earlier = next((each for each in reversed(_in_flight) if each.ranks == group.global_ranks), None)
    is_in_the_way = busy == "skip" and earlier is not None and not earlier.task.done()
    if group.world_size == 1:
        if is_in_the_way and earlier is not None:
            return earlier
        alone = open_take(path, statefuls, options)
        _begin(alone, in_background)
        return alone
    take = GroupTake(group, path, statefuls, options, skips=is_in_the_way)
    _begin(take, in_background)
    if not take.is_skipped:
        return take
    if earlier is None:
        raise SnapshotError("another rank has an earlier take of this group in flight, and this rank never began one")
    return earlier


def _begin(take: Take | GroupTake, in_background: bool) -> None:
    try:
        take.begin(in_background=in_background)
    except BaseException:
        take.close()
        raise


def _wait_if_asked(busy: Busy) -> None:
    """Do what ``busy`` says about takes in flight, and tell of those that failed unheard."""
    if busy not in ("wait", "skip", "overlap"):
        raise ValueError(f"busy={busy!r}: allowed are 'wait', 'skip' and 'overlap'")
    for each in list(_in_flight):
        if busy == "wait":
            each.task.wait_ended()
        each.task.report_unheard()


def note_in_flight(handle: Any, task: Task[Any], ranks: Sequence[int]) -> None:
    """Take in a take that goes on in the background."""
    found = InFlight(handle, task, tuple(ranks))
    # of those that have ended, the last of each group may still be in flight for other ranks
    _in_flight[:] = [each for each in _in_flight if not each.task.done() or each.ranks != found.ranks]
    _in_flight.append(found)


# the takes of a process are no business of its children
os.register_at_fork(after_in_child=_in_flight.clear)
