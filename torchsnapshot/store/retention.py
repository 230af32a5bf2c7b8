"""Which snapshots to keep, by policy. The plan is pure; ``retain`` carries it out.

What lives here: the policy. What doesn't: freeing space (``gc`` does that, afterwards).

Invariants: what no rule keeps is dropped, except for the newest snapshot, which is always kept. Exactly the manifests
that the plan was made of are removed: what a take commits meanwhile stays.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torchsnapshot.store.repository import Repository, SnapshotInfo

_NUMBER = re.compile(r"[0-9]+")


@dataclass(frozen=True, slots=True)
class RetentionPlan:
    """What stays, with the rules that keep it, and what goes; both in the order of their commits."""

    keep: tuple[tuple[SnapshotInfo, tuple[str, ...]], ...]
    drop: tuple[SnapshotInfo, ...]


def step_number(name: str) -> int | None:
    """The step that a snapshot's name speaks of: the last integer in its last component ("run7/step_100" → 100)."""
    numbers = _NUMBER.findall(name.rpartition("/")[2])
    return int(numbers[-1]) if numbers else None


def plan_retention(
    snapshots: Sequence[SnapshotInfo], *, last: int | None = None, every: int | None = None, keep: Sequence[str] = ()
) -> RetentionPlan:
    """Decide what to keep.

    Args:
        snapshots: committed snapshots, the newest commit last.
        last: keep this many of the newest.
        every: keep those whose step number is a multiple of this.
        keep: keep those whose name, or its last component, matches one of these patterns (``*``, ``?``, ``[…]``).

    Raises:
        TypeError: a number is no int, or ``keep`` is no list of patterns.
        ValueError: no rule is given, or a number is not positive.
    """
    if last is None and every is None and not keep:
        raise ValueError("a retention policy needs at least one rule: last, every or keep")
    # whoever is not checked by mypy may pass anything, and what is misread here is deleted
    globs: Any = keep
    if not isinstance(globs, (list, tuple, set, frozenset)) or not all(isinstance(glob, str) for glob in globs):
        raise TypeError(f"keep must be a list of patterns, as in ['best*'], not {globs!r}")
    numbers: dict[str, object] = {"last": last, "every": every}
    for name, value in numbers.items():
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise TypeError(f"{name} must be an int, not {value!r}")
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    kept = []
    dropped = []
    for age, info in enumerate(reversed(snapshots)):
        reasons = _reasons(info, age, last, every, keep)
        if reasons:
            kept.append((info, reasons))
        else:
            dropped.append(info)
    return RetentionPlan(tuple(reversed(kept)), tuple(reversed(dropped)))


def _reasons(info: SnapshotInfo, age: int, last: int | None, every: int | None, keep: Sequence[str]) -> tuple[str, ...]:
    reasons = []
    if last is not None and age < last:
        reasons.append(f"one of the last {last}")
    step = step_number(info.name)
    if every is not None and step is not None and step % every == 0:
        reasons.append(f"step {step} is a multiple of {every}")
    names = (info.name, info.name.rpartition("/")[2])
    reasons += [f"matches {glob!r}" for glob in keep if any(fnmatch.fnmatchcase(name, glob) for name in names)]
    if not reasons and age == 0:
        reasons.append("the newest")
    return tuple(reasons)


def retain(
    repository: Repository,
    *,
    below: str = "",
    last: int | None = None,
    every: int | None = None,
    keep: Sequence[str] = (),
    dry_run: bool = False,
) -> RetentionPlan:
    """Remove every snapshot that no rule keeps. Their content goes with the next gc.

    Args:
        repository: the store.
        below: only the snapshot of this name and those below it: one run's of a store of many; "" = all.
        last: see ``plan_retention``.
        every: see ``plan_retention``.
        keep: see ``plan_retention``.
        dry_run: only plan.

    Raises:
        ValueError: see ``plan_retention``.
        StoreError: a manifest could not be removed.
    """
    plan = plan_retention(repository.list_snapshots(below), last=last, every=every, keep=keep)
    if not dry_run and plan.drop:
        # the manifests as they are now, older generations with them, but none that is newer than the plan knows
        newest = {info.name: info.ref.manifest for info in plan.drop}
        refs = [ref for name in newest for ref in repository.manifests_of(name) if ref.manifest <= newest[name]]
        repository.remove_manifests(refs)
    return plan
