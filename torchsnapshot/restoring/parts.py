"""A part of a state on its way from a manifest into memory: every restore and every read is made of these.

What lives here: ``Part``, and what is done with several of them: their targets found together, all put together, and
what of them is refused. What doesn't: the order of a restore (``restore``), the reads (``reading.reads``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from torchsnapshot.errors import MismatchError, PartialRestoreError
from torchsnapshot.format.entries import (
    Entry,
    OpaqueEntry,
    ShardedTensorEntry,
    StoredManifest,
    TensorEntry,
    ValueEntry,
    spans_of,
)
from torchsnapshot.pauses import collector_paused
from torchsnapshot.reading.reads import Reading, load_opaque
from torchsnapshot.reading.targets import Target, TargetFinder
from torchsnapshot.state import values
from torchsnapshot.state.flatten import find_targets, inflate, resolver
from torchsnapshot.state.kinds import Resolve

AllocateTensor = Callable[[str, TensorEntry | ShardedTensorEntry], Any]
"""Makes the target of a tensor that has none; None where it cannot."""


class Part:
    """Entries below one path, on their way into memory: first ``gather``, then, once all is read, ``build``.

    Args:
        entries: the entries of the part by path, without rank.
        prefix: the path of the part's root.
        current: what the application has at that place, or None.
        resolve: gives classes by stored name; those that stand in ``current`` where None.
        allocate: makes targets that are not there. Where it makes none for a sharded tensor, that is an error; without
            it the whole tensor is read.
    """

    def __init__(
        self,
        entries: Mapping[str, Entry],
        prefix: str,
        current: Any,
        resolve: Resolve | None = None,
        allocate: AllocateTensor | None = None,
    ) -> None:
        self._entries = entries
        self._prefix = prefix
        self._current = current
        self._targets: dict[str, Target] = {}
        self._data: dict[str, bytes | bytearray] = {}
        self._resolve = resolve or resolver(current)
        self._allocate = allocate

    def opaque(self) -> list[tuple[str, str]]:
        """The values that only pickle can rebuild: (path, type name)."""
        return [(path, entry.type_name) for path, entry in self._entries.items() if isinstance(entry, OpaqueEntry)]

    def gather(self, work: Reading, finder: TargetFinder) -> None:
        """Find a target for every tensor, and want every byte."""
        current = find_targets(self._prefix, self._entries, self._current)
        for path, entry in self._entries.items():
            if isinstance(entry, (TensorEntry, ShardedTensorEntry)):
                target = self._find(path, entry, current.get(path), finder)
                if target is not None:
                    self._targets[path] = target
                    work.add_tensor(path, entry, target)
            elif isinstance(entry, (ValueEntry, OpaqueEntry)):
                self._data[path] = work.add_bytes(path, entry)

    def _find(
        self, path: str, entry: TensorEntry | ShardedTensorEntry, current: Any, finder: TargetFinder
    ) -> Target | None:
        if current is None and self._allocate is not None:
            current = self._allocate(path, entry)
            if current is None and isinstance(entry, ShardedTensorEntry):
                finder.mismatches.append(
                    f"{path}: it is spread over ranks {list(entry.sharding.mesh_ranks)}, and the target has no tensor "
                    "here that says how it is to be spread now"
                )
                return None
        return finder.find(path, entry, current)

    @property
    def writes(self) -> bool:
        """Whether tensors of the application are written to, once the part has been gathered and read."""
        return any(target.is_own for target in self._targets.values())

    def leaf(self, path: str, entry: Entry) -> Any:
        """The restored tensor, value or object at a path."""
        if isinstance(entry, (TensorEntry, ShardedTensorEntry)):
            return self._targets[path].value
        if isinstance(entry, OpaqueEntry):
            return load_opaque(path, entry.type_name, self._data[path])
        return values.decode(memoryview(self._data[path]), self._resolve)

    def build(self) -> Any:
        """The whole part."""
        return inflate(self._prefix, self._entries, self.leaf, self._current, self._resolve)


@collector_paused()
def gather(
    parts: Iterable[Part], work: Reading, manifest: StoredManifest, device: torch.device | str | None = None
) -> None:
    """Find all targets of these parts together, so that no two share memory by accident.

    Args:
        parts: of one restore.
        work: what is to be read for them.
        manifest: where their entries are from.
        device: where tensors are allocated whose target is on the meta device; None means the CPU.

    Raises:
        MismatchError: tensors of another shape, or of a dtype that does not convert; all of them at once.
    """

    def content(entry: TensorEntry | ShardedTensorEntry) -> object:
        inline = entry.inline if isinstance(entry, TensorEntry) else None
        return inline, tuple(digest for span in spans_of(entry) for digest in manifest.digests(span))

    finder = TargetFinder(torch.device("cpu" if device is None else device), content)
    for part in parts:
        part.gather(work, finder)
    if finder.mismatches:
        listed = "\n".join(f"  {mismatch}" for mismatch in finder.mismatches)
        raise MismatchError(f"these tensors do not fit the target, nothing was restored:\n{listed}")
    work.stats.converted.update(finder.converted)


def built(parts: Mapping[str, Part]) -> dict[str, Any]:
    """All parts put together, before any of them is handed to its object.

    Raises:
        PartialRestoreError: one of them cannot be, and tensors have been written by now.
        SnapshotError: one of them cannot be; the target is as it was.
    """
    try:
        return {key: part.build() for key, part in parts.items()}
    except Exception as error:
        if not any(part.writes for part in parts.values()):
            raise
        raise PartialRestoreError(
            "the restore failed after tensors had been written, and before any load_state_dict was called: the target "
            f"is now a mix of old and new values. {error}"
        ) from error


def refusal(refused: Mapping[str, list[tuple[str, str]]], restored: list[str]) -> str:
    """Which values were refused because only pickle can rebuild them, and what to do."""
    lines = [f"  {path}: {type_name}" for opaque in refused.values() for path, type_name in opaque]
    others = f"Restored all the same: {', '.join(restored)}." if restored else "Nothing was restored."
    return "\n".join(
        [
            "these values are stored as pickles, and loading a pickle runs code from the snapshot:",
            *lines,
            f"{others} If you trust this snapshot, pass allow_pickle=True or set TORCHSNAPSHOT_ALLOW_PICKLE=1.",
        ]
    )
