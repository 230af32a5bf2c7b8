"""A model of what users do with a ROOT, in any order: whatever was taken and not deleted restores exactly.

The model is a dict of deep copies by snapshot name. Everything runs for real, on a local folder.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import blobs, keys, mislabelled, new_process
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from torchsnapshot import Snapshot, StateDict
from torchsnapshot.errors import CollectorStoppedError
from torchsnapshot.maintenance import collect, retain
from torchsnapshot.snapshot import PendingSnapshot
from torchsnapshot.test_utils import check_state_dict_eq

CHUNK_NBYTES = 4096
NUMELS = {"inline": 20, "small": 300, "chunk": CHUNK_NBYTES // 4, "chunks": 5 * CHUNK_NBYTES // 4 + 7}
NAMES = ["a", "step_1", "step_20", "nested/b"]
ENVIRONMENT = {
    "TORCHSNAPSHOT_MAX_CHUNK_SIZE_BYTES_OVERRIDE": str(CHUNK_NBYTES),
    # what survives a power cut is not the question here
    "TORCHSNAPSHOT_DURABLE": "0",
}

State = dict[str, Any]


def copied(state: State) -> State:
    """A copy that shares nothing."""
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in state.items()}


class Root(RuleBasedStateMachine):
    """One ROOT, the live state of one training, and the model."""

    def __init__(self) -> None:
        super().__init__()
        new_process()
        self.folder = Path(tempfile.mkdtemp(prefix="torchsnapshot-model-"))
        self.root = self.folder / "run"
        self.generator = torch.Generator().manual_seed(0)
        self.live: State = {f"{size}_{copy}": self.random(size) for size in NUMELS for copy in range(3)}
        self.live["value"] = 0
        self.model: dict[str, State] = {}
        self.pending: list[tuple[str, State, PendingSnapshot]] = []
        self.was_moved = 0
        self.turn = 0

    def random(self, size: str) -> torch.Tensor:
        """A tensor of one of the sizes, of few different values: content that comes again is what this is about."""
        return torch.randint(0, 3, (NUMELS[size],), generator=self.generator).float()

    def path(self, name: str) -> str:
        """Where a snapshot is."""
        return str(self.root / name)

    def settle(self) -> None:
        """Wait for the takes in flight."""
        for name, state, pending in self.pending:
            pending.wait()
            self.model[name] = state
        self.pending.clear()

    def is_free(self, name: str) -> bool:
        """Whether no take in flight writes there."""
        return all(name != other for other, _, _ in self.pending)

    # ------------------------------------------------------------------ the training

    @rule(size=st.sampled_from(sorted(NUMELS)), copy=st.integers(0, 2), place=st.integers(0, 10**6))
    def change_one_element(self, size: str, copy: int, place: int) -> None:
        """An ordinary step of a sparse layer."""
        tensor = self.live.get(f"{size}_{copy}")
        if tensor is not None:
            tensor.view(-1)[place % tensor.numel()] += 1

    @rule(
        size=st.sampled_from(sorted(NUMELS)), copy=st.integers(0, 2), what=st.sampled_from(["random", "zero", "copy"])
    )
    def change_whole_tensor(self, size: str, copy: int, what: str) -> None:
        """An ordinary step of a dense layer, or content that another tensor has."""
        name = f"{size}_{copy}"
        if what == "random":
            self.live[name] = self.random(size)
        elif what == "zero":
            self.live[name] = torch.zeros(NUMELS[size])
        else:
            self.live[name] = self.live.get(f"{size}_{(copy + 1) % 3}", self.random(size))

    @rule(size=st.sampled_from(sorted(NUMELS)), copy=st.integers(0, 2), long=st.booleans())
    def change_structure(self, size: str, copy: int, long: bool) -> None:
        """A tensor leaves the state, and a value changes."""
        self.live.pop(f"{size}_{copy}", None)
        self.live["value"] = list(range(12_000)) if long else self.turn

    # ------------------------------------------------------------------ takes and restores

    @rule(name=st.sampled_from(NAMES), encoding=st.sampled_from(["raw", "auto", "smallest"]))
    def take(self, name: str, encoding: Any) -> None:
        """Take a snapshot, maybe of a path that has one; what is in flight is committed before."""
        before = set(blobs(self.root)) if name in self.model else None
        same = self.is_free(name) and not self.pending and self.is_last(name)
        stats = Snapshot.take(
            self.path(name), {"s": StateDict(**self.live)}, encoding=encoding, store=str(self.root)
        ).stats
        self.settle()
        self.model[name] = copied(self.live)
        self.last = name
        assert stats is not None
        if same:
            assert stats.num_new_chunks == 0
            assert set(blobs(self.root)) == before

    last: str | None = None

    def is_last(self, name: str) -> bool:
        """Whether the live state is exactly what was taken last, at this path, and still there."""
        return name == self.last and name in self.model and check_state_dict_eq(self.model[name], self.live)

    @precondition(lambda self: len(self.pending) < 3)
    @rule(name=st.sampled_from(NAMES), changes=st.booleans())
    def begin_take(self, name: str, changes: bool) -> None:
        """Take in the background, beside others, and change every tensor at once."""
        state = copied(self.live)
        pending = Snapshot.async_take(
            self.path(name), {"s": StateDict(**self.live)}, busy="overlap", store=str(self.root)
        )
        self.pending.append((name, state, pending))
        self.last = None
        if changes:
            for value in {id(value): value for value in self.live.values()}.values():
                if isinstance(value, torch.Tensor):
                    value.add_(1)

    @rule()
    def wait(self) -> None:
        """Wait for what is in flight."""
        self.settle()

    @precondition(lambda self: self.model)
    @rule(data=st.data(), in_place=st.booleans())
    def restore(self, data: st.DataObject, in_place: bool) -> None:
        """Go back to any snapshot, in place or into nothing."""
        name = data.draw(st.sampled_from(sorted(self.model)))
        if not self.is_free(name):
            self.settle()
        target = StateDict(**self.live) if in_place else StateDict()
        Snapshot(self.path(name)).restore({"s": target})
        found = {key: target[key] for key in self.model[name]}
        assert check_state_dict_eq(found, self.model[name])
        self.live = found
        self.last = None

    @rule()
    def begin_as_a_new_process(self) -> None:
        """All memory of the store is gone."""
        self.settle()
        new_process()
        self.last = None

    # ------------------------------------------------------------------ looking after snapshots

    def draw_free(self, data: st.DataObject) -> str | None:
        """Any snapshot that no take in flight writes to."""
        names = [name for name in sorted(self.model) if self.is_free(name)]
        return data.draw(st.sampled_from(names)) if names else None

    @precondition(lambda self: self.model)
    @rule(data=st.data(), how=st.sampled_from(["api", "rm"]))
    def delete(self, data: st.DataObject, how: str) -> None:
        """Delete a snapshot by the library, or its folder behind its back, also while takes are in flight."""
        name = self.draw_free(data)
        if name is None:
            return
        if how == "api":
            Snapshot(self.path(name)).delete()
            assert not (self.root / name).exists()
        else:
            shutil.rmtree(self.root / name)
        del self.model[name]

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def rename(self, data: st.DataObject) -> None:
        """Move a snapshot's folder inside of ROOT."""
        name = self.draw_free(data)
        if name is None:
            return
        self.was_moved += 1
        os.rename(self.root / name, self.root / f"moved_{self.was_moved}")
        self.model[f"moved_{self.was_moved}"] = self.model.pop(name)
        self.last = None

    @precondition(lambda self: self.model)
    @rule(last=st.integers(1, 3), keep=st.sampled_from([(), ("a",), ("moved_*", "b")]))
    def retain(self, last: int, keep: tuple[str, ...]) -> None:
        """Keep the newest, and what matches."""
        self.settle()
        names = [snapshot.name for snapshot in Snapshot.list(str(self.root))]
        assert sorted(names) == sorted(self.model)
        plan = retain(str(self.root), last=last, keep=keep)
        kept = [info.name for info, _ in plan.keep]
        assert set(names[-last:]) <= set(kept)
        self.model = {name: self.model[name] for name in kept}

    @precondition(lambda self: self.root.exists())
    @rule()
    def collect(self) -> None:
        """Free what nothing needs; without takes in flight exactly what the snapshots refer to is left."""
        if not self.model:
            self.settle()
        if not self.model:
            if blobs(self.root):
                with pytest.raises(CollectorStoppedError, match="not a single"):
                    collect(str(self.root))
            return
        was_quiet = not self.pending
        collect(str(self.root))
        if was_quiet:
            referenced = set().union(*(keys(self.path(name)) for name in self.model))
            assert set(blobs(self.root)) == referenced
            leases = self.root / ".torchsnapshot" / "leases"
            assert not leases.exists() or list(leases.iterdir()) == []
        self.check_all()

    # ------------------------------------------------------------------ what is always true

    def check_one(self, name: str) -> None:
        """A snapshot restores exactly."""
        target = StateDict()
        Snapshot(self.path(name)).restore({"s": target})
        assert check_state_dict_eq(target.data, self.model[name])

    def check_all(self) -> None:
        """Every snapshot restores exactly, and nothing else is there."""
        quiet = [name for name in self.model if self.is_free(name)]
        listed = [snapshot.name for snapshot in Snapshot.list(str(self.root))] if self.root.exists() else []
        assert set(quiet) <= set(listed)
        for name in quiet:
            found = Snapshot(self.path(name)).get_state_dict_for_key("s")
            assert check_state_dict_eq(found, self.model[name])

    @invariant()
    def some_snapshot_restores(self) -> None:
        """One snapshot after each step, all in turn; read without being remembered as what was restored last."""
        self.turn += 1
        quiet = sorted(name for name in self.model if self.is_free(name))
        if quiet:
            name = quiet[self.turn % len(quiet)]
            found = Snapshot(self.path(name)).get_state_dict_for_key("s")
            assert check_state_dict_eq(found, self.model[name])

    def teardown(self) -> None:
        """At the end everything restores, and every blob is what its key says."""
        try:
            self.settle()
            self.check_all()
            if self.root.exists():
                assert mislabelled(self.root) == []
        finally:
            shutil.rmtree(self.folder)


def test_whatever_was_taken_and_not_deleted_restores_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over takes, changes, deletions, renames, retention, gc and new processes in any order, no snapshot is lost."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        Root,
        settings=settings(
            max_examples=8,
            stateful_step_count=20,
            deadline=None,
            # each step costs milliseconds of disk: shrinking would outlast the time that a hanging test is given
            phases=[Phase.explicit, Phase.reuse, Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )
