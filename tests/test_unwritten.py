"""Takes and restores that do not read what nobody has written: the same snapshots, and states, as those that read all.

How the kernel is asked, and what is concluded, is tested in ``test_page_watch`` and ``test_live_digests``.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from folders import blobs, manifest, new_process, refs
from launch import launch, succeed
from memory_watch import needs_page_watch
from torch import nn

from torchsnapshot import Snapshot, StateDict, knobs
from torchsnapshot.engine.page_watch import PageWatch, Range
from torchsnapshot.errors import SnapshotError
from torchsnapshot.format.entries import ContainerEntry, spans_of
from torchsnapshot.state import live_digests as module
from torchsnapshot.state.live_digests import Look, live_digests
from torchsnapshot.state.watched_chunks import Extent

pytestmark = needs_page_watch

CHUNK_NBYTES = 256 << 10
NUMEL = CHUNK_NBYTES // 4
"""float32 elements in one chunk."""


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test begins as a new process would, with chunks of 256 KiB; nothing has to survive a power cut."""
    new_process()
    torch.manual_seed(0)
    monkeypatch.setenv(knobs.DURABLE, "0")
    with knobs.override_max_chunk_size_bytes(CHUNK_NBYTES):
        yield
    new_process()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder for snapshots that nothing else uses."""
    return tmp_path / "run"


@pytest.fixture
def no_audit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is hashed only to check on the kernel."""
    monkeypatch.setattr(module, "AUDIT_EVERY", 1 << 60)


def take(path: Path, state: dict[str, Any], **options: Any) -> int:
    """Take in the foreground; the bytes that were hashed for it."""
    snapshot = Snapshot.take(str(path), state, **options)
    assert snapshot.stats is not None
    return snapshot.stats.hashed_nbytes


def take_in_background(path: Path, state: dict[str, Any]) -> int:
    """The same in the background."""
    stats = Snapshot.async_take(str(path), state).wait().stats
    assert stats is not None
    return stats.hashed_nbytes


def take_custom(path: Path, state: dict[str, Any]) -> int:
    """The same with a function that is shown every tensor: such a state is planned anew each time."""
    return take(path, state, _custom_tensor_prepare_func=lambda path, tensor, tracing: tensor)


@pytest.mark.usefixtures("no_audit")
@pytest.mark.parametrize("take_it", [take, take_in_background, take_custom])
def test_what_nobody_writes_is_hashed_no_more(root: Path, take_it: Callable[[Path, dict[str, Any]], int]) -> None:
    """From the fourth take on, a state that lies still is not read; what is written is, and its change is stored."""
    state = {"s": StateDict(a=torch.randn(8 * NUMEL), b=torch.randn(3 * NUMEL), n=1)}
    hashed = [take_it(root / f"step_{step}", state) for step in range(5)]
    assert hashed[:3] == [11 * CHUNK_NBYTES] * 3
    assert hashed[3:] == [0, 0]
    state["s"]["b"][NUMEL + 1000] = 5.0
    hashed.append(take_it(root / "changed", state))
    assert hashed[-1] == CHUNK_NBYTES
    target = {"s": StateDict(a=torch.zeros(8 * NUMEL), b=torch.zeros(3 * NUMEL), n=0)}
    Snapshot(str(root / "changed")).restore(target)
    assert torch.equal(target["s"]["a"], state["s"]["a"])
    assert torch.equal(target["s"]["b"], state["s"]["b"])
    Snapshot(str(root / "step_4")).restore(target)
    assert target["s"]["b"][NUMEL + 1000] != 5.0


class Model:
    """Tensors of many kinds, and ways to change them that leave few traces."""

    def __init__(self) -> None:
        self.module = nn.Sequential(nn.Linear(300, 400), nn.Linear(400, 300, bias=False))
        self.optimizer = torch.optim.AdamW(self.module.parameters(), fused=True)
        self.array = numpy.zeros(2 * NUMEL, dtype=numpy.float32)
        self.table = StateDict(
            rows=torch.zeros(2000, 200),
            turned=torch.randn(500, 700).t(),
            array=self.array,
            bits=torch.zeros(300_000, dtype=torch.uint8),
            strided=torch.randn(200_000)[::2],
        )
        for parameter in self.module.parameters():
            parameter.grad = torch.ones_like(parameter)
        self.optimizer.step()

    @property
    def app_state(self) -> dict[str, Any]:
        """What is taken."""
        return {"model": self.module, "optim": self.optimizer, "table": self.table}

    def change(self, chance: random.Random) -> None:
        """One of many things."""
        row = chance.randrange(2000)
        changes: list[Callable[[], object]] = [
            self.optimizer.step,
            lambda: self.module[1].weight.data.mul_(1.5),
            lambda: self.table["rows"][row].add_(1),
            lambda: self.array.__setitem__(slice(row, row + 3), row),
            lambda: self.table["bits"].numpy().__setitem__(row, 7),
            lambda: self.table["turned"].uniform_(),
            lambda: self.table["strided"].zero_(),
            lambda: self.table.update(rows=self.table["rows"].clone()),
            lambda: self.module[0].weight.data.set_(torch.full((400, 300), float(row))),
            lambda: self.module.load_state_dict({key: value + 1 for key, value in self.module.state_dict().items()}),
        ]
        chance.choice(changes)()


def digests(path: Path) -> dict[str, object]:
    """What a snapshot has at each place: digests, or what stands in the manifest itself."""
    stored = manifest(path)
    return {
        key: entry
        if isinstance(entry, ContainerEntry)
        else [digest for span in spans_of(entry) for digest in stored.digests(span)] or entry
        for key, entry in stored.entries_of(0).items()
    }


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("in_background", [False, True])
def test_snapshots_are_those_of_takes_that_read_everything(
    root: Path, monkeypatch: pytest.MonkeyPatch, seed: int, in_background: bool
) -> None:
    """Whatever is changed between takes, and however: each snapshot has the contents that reading everything finds."""
    monkeypatch.setattr(module, "MIN_NBYTES", 4096)
    model, chance = Model(), random.Random(seed)
    total = spared = 0
    for step in range(40):
        path = root / "watched" / f"step_{step}"
        monkeypatch.setenv(knobs.WATCH_MEMORY, "1")
        pending = Snapshot.async_take(str(path), model.app_state)
        if not in_background:
            pending.wait()
        monkeypatch.setenv(knobs.WATCH_MEMORY, "0")
        Snapshot.take(str(root / "read" / f"step_{step}"), model.app_state)
        if chance.random() < 0.5:
            model.change(chance)
        stats = pending.wait().stats
        assert stats is not None
        total, spared = total + stats.state_nbytes, spared + stats.state_nbytes - stats.hashed_nbytes
        assert digests(path) == digests(root / "read" / f"step_{step}")
    assert spared > 0.3 * total


@pytest.mark.usefixtures("no_audit")
@pytest.mark.parametrize("take_it", [take, take_in_background, take_custom])
def test_stores_that_know_different_steps(tmp_path: Path, take_it: Callable[[Path, dict[str, Any]], int]) -> None:
    """What nobody has written since another store's take may be new to this one: then it is stored here."""
    state = {"s": StateDict(a=torch.randn(8 * NUMEL), b=torch.randn(NUMEL))}
    for step in range(4):
        take_it(tmp_path / "one" / f"step_{step}", state)
    for value in (1.0, 2.0):
        state["s"]["a"][:NUMEL].fill_(value)
        for step in range(5):
            take_it(tmp_path / "other" / f"step_{value}_{step}", state)
        assert take_it(tmp_path / "one" / f"step_{value}", state) <= CHUNK_NBYTES
        for name in (f"one/step_{value}", f"other/step_{value}_4"):
            target = {"s": StateDict(a=torch.zeros(8 * NUMEL), b=torch.zeros(NUMEL))}
            Snapshot(str(tmp_path / name)).restore(target)
            assert torch.equal(target["s"]["a"], state["s"]["a"])
            assert torch.equal(target["s"]["b"], state["s"]["b"])


@pytest.mark.usefixtures("no_audit")
def test_a_blob_that_is_gone_is_written_again(root: Path) -> None:
    """That nobody has written a tensor does not make its blob be there: it is looked for in each take."""
    state = {"s": StateDict(a=torch.randn(4 * NUMEL))}
    for step in range(4):
        take(root / f"step_{step}", state)
    (lost, *_) = refs(root / "step_3", "s/a")
    blobs(root)[lost.key].unlink()
    take(root / "after", state)
    assert lost.digest in {ref.digest for ref in refs(root / "after", "s/a")}
    target = {"s": StateDict(a=torch.zeros(4 * NUMEL))}
    Snapshot(str(root / "after")).restore(target)
    assert torch.equal(target["s"]["a"], state["s"]["a"])
    with pytest.raises(SnapshotError, match="is not in"):
        Snapshot(str(root / "step_3")).restore({"s": StateDict(a=torch.zeros(4 * NUMEL))})


@pytest.mark.usefixtures("no_audit")
def test_a_restore_reads_only_what_differs_and_hashes_nothing_else(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Going back and forth between steps of a state that is watched costs what differs between them."""
    state = {"s": StateDict(a=torch.randn(16 * NUMEL), b=torch.randn(NUMEL))}
    want = {}
    for step in range(6):
        state["s"]["b"].add_(1)
        want[step] = state["s"]["b"].clone()
        take(root / f"step_{step}", state)
    a = state["s"]["a"].clone()
    hashed: list[int] = []
    hash_all = Look.hash_all

    def counted(look: Look, extents: Sequence[Extent], buffers: Sequence[Any]) -> list[bytes]:
        hashed.extend(nbytes for _, nbytes in extents)
        return hash_all(look, extents, buffers)

    monkeypatch.setattr(Look, "hash_all", counted)
    for step in (3, 5, 0):
        hashed.clear()
        snapshot = Snapshot(str(root / f"step_{step}"))
        snapshot.restore(state)
        assert torch.equal(state["s"]["b"], want[step])
        assert torch.equal(state["s"]["a"], a)
        assert sum(hashed) == CHUNK_NBYTES
    take(root / "back", state)
    assert digests(root / "back") == digests(root / "step_0")


def test_a_target_that_was_made_where_another_tensor_lay(root: Path) -> None:
    """New targets are never taken for what was known of their memory before."""
    state = {"s": StateDict(a=torch.randn(8 * NUMEL))}
    for step in range(5):
        take(root / f"step_{step}", state)
    want = state["s"]["a"].clone()
    for _ in range(5):
        address = state["s"]["a"].data_ptr()
        state["s"]["a"] = None
        state["s"]["a"] = torch.zeros(8 * NUMEL)
        again = state["s"]["a"].data_ptr() == address
        Snapshot(str(root / "step_4")).restore(state)
        assert torch.equal(state["s"]["a"], want), again


class _Blind(PageWatch):
    """A kernel that sees no write."""

    def written(self, start: int, end: int) -> list[Range]:
        """Nothing."""
        return []


def test_a_kernel_that_misses_a_write_fails_the_take(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A take that finds out commits nothing and says what to do; the next one, which reads everything, is right."""
    monkeypatch.setattr(module, "PageWatch", _Blind)
    state = {"s": StateDict(a=torch.randn(64 * NUMEL))}
    for step in range(4):
        take(root / f"step_{step}", state)
    state["s"]["a"].add_(1)
    with pytest.raises(SnapshotError, match=r"the kernel has seen no write.*TORCHSNAPSHOT_WATCH_MEMORY=0"):
        take(root / "missed", state)
    assert not (root / "missed").exists()
    assert take(root / "right", state) == 64 * CHUNK_NBYTES
    target = {"s": StateDict(a=torch.zeros(64 * NUMEL))}
    Snapshot(str(root / "right")).restore(target)
    assert torch.equal(target["s"]["a"], state["s"]["a"])


def test_handles_and_watches_end_with_forgetting(root: Path) -> None:
    """``forget`` gives everything back."""
    state = {"s": StateDict(a=torch.randn(4 * NUMEL))}
    for step in range(4):
        take(root / f"step_{step}", state)
    assert live_digests()._watch is not None
    live_digests().forget()
    assert take(root / "after", state) == 4 * CHUNK_NBYTES


def ranks_take(root: str) -> list[int]:
    """Four ranks' worth of tensors: what this rank hashes in each of six takes, of which the last has a change."""
    import torch.distributed as dist

    rank = dist.get_rank()
    state = {"s": StateDict(own=torch.full((8 * NUMEL,), float(rank)), both=torch.ones(8 * NUMEL))}
    hashed = []
    for step in range(6):
        if step == 5:
            state["s"]["own"][0] = -1.0
        snapshot = Snapshot.take(f"{root}/step_{step}", state, replicated=["s/both"])
        assert snapshot.stats is not None
        hashed.append(snapshot.stats.hashed_nbytes)
    target = {"s": StateDict(own=torch.zeros(8 * NUMEL), both=torch.zeros(8 * NUMEL))}
    Snapshot(f"{root}/step_5").restore(target)
    assert torch.equal(target["s"]["own"], state["s"]["own"])
    assert torch.equal(target["s"]["both"], state["s"]["both"])
    Snapshot(f"{root}/step_4").restore(target)
    assert target["s"]["own"][0] == rank
    return hashed


def test_ranks_hash_no_more_what_nobody_writes(root: Path) -> None:
    """Under ``torch.distributed`` each rank knows its own memory, and all of them agree as before."""
    options = {"TORCHSNAPSHOT_MAX_CHUNK_SIZE_BYTES_OVERRIDE": str(CHUNK_NBYTES)}
    for outcome in succeed(launch(2, ranks_take, args=[str(root)], environment=options)):
        hashed = outcome.result()
        assert hashed[0] == 16 * CHUNK_NBYTES
        # and sometimes a chunk that is hashed only to check on the kernel
        assert hashed[4] in (0, CHUNK_NBYTES)
        assert hashed[5] in (CHUNK_NBYTES, 2 * CHUNK_NBYTES)
