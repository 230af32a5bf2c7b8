"""Takes in the background: when tensors may change, where errors surface, and what becomes of them at the end."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from folders import blobs, generations, new_process, run_python
from torch.utils.data import DataLoader, Dataset

from torchsnapshot import Snapshot, StateDict, knobs
from torchsnapshot.engine import background
from torchsnapshot.errors import CorruptionError, SnapshotError, StoreFullError
from torchsnapshot.maintenance import collect
from torchsnapshot.snapshot import PendingSnapshot
from torchsnapshot.store.repository import Repository

CHUNK_NBYTES = 64 << 10
NUMEL = CHUNK_NBYTES // 4
"""float32 elements in one chunk."""


@pytest.fixture(autouse=True)
def _small_chunks() -> Iterator[None]:
    """Every test begins as a new process would, with chunks of 64 KiB and reproducible tensors."""
    new_process()
    torch.manual_seed(0)
    with knobs.override_max_chunk_size_bytes(CHUNK_NBYTES):
        yield


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder for snapshots that nothing else uses."""
    return tmp_path / "run"


class Gate:
    """Holds up every blob on its way into a store, until it is opened; then the blob is put, or ``error`` raised."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened = threading.Event()
        self.reached = threading.Event()
        self.error: Exception | None = None
        put_blob = Repository.put_blob

        def held(repository: Repository, key: str, data: Any, **options: Any) -> None:
            self.reached.set()
            self.opened.wait()
            if self.error is not None:
                raise self.error
            put_blob(repository, key, data, **options)

        monkeypatch.setattr(Repository, "put_blob", held)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """A closed gate before every store; it is open after the test in any case."""
    made = Gate(monkeypatch)
    yield made
    made.opened.set()


def begin(path: Path, state: dict[str, Any], **options: Any) -> PendingSnapshot:
    """Begin a take of one ``StateDict`` under the key ``s``."""
    return Snapshot.async_take(str(path), {"s": StateDict(**state)}, **options)


def restored(path: Path) -> dict[str, Any]:
    """What a snapshot holds, restored into nothing."""
    target = StateDict()
    Snapshot(str(path)).restore({"s": target})
    return target.data


# ------------------------------------------------------------------ when it returns

NUMELS = [1, 2, 64, 65, 1000, NUMEL - 1, NUMEL, NUMEL + 1, 3 * NUMEL, 40 * NUMEL]


@pytest.mark.parametrize("budget", [None, 1, 3 * CHUNK_NBYTES], ids=str)
@pytest.mark.parametrize("repeated", [False, True], ids=["first", "again"])
def test_tensors_of_every_size_may_change_on_return(
    root: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch, repeated: bool, budget: int | None
) -> None:
    """Whatever is written into the tensors after the return, the snapshot holds what they held before."""
    gate.opened.set()
    if budget is not None:
        monkeypatch.setenv(knobs.MEMORY_BUDGET, str(budget))
    state = {f"t{numel}": torch.rand(numel) for numel in NUMELS}
    state |= {f"strided{numel}": torch.rand(numel, 2)[:, 1] for numel in NUMELS}
    state["half"] = torch.rand(3 * NUMEL).half()
    if repeated:
        begin(root / "step_0", state).wait()
        for number, tensor in enumerate(state.values()):
            if number % 2:
                tensor[-1] += 1
    expected = {name: tensor.clone() for name, tensor in state.items()}
    pending = begin(root / "step_1", state)
    for tensor in state.values():
        tensor.fill_(-1)
    pending.wait()
    found = restored(root / "step_1")
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_nothing_is_put_before_everything_is_staged_where_memory_allows(root: Path, gate: Gate) -> None:
    """With the gate closed no blob reaches the store, and the call returns all the same; then all may change."""
    state = {f"t{numel}": torch.rand(numel) for numel in NUMELS}
    expected = {name: tensor.clone() for name, tensor in state.items()}
    pending = begin(root / "step_1", state)
    assert not pending.done()
    assert blobs(root) == {}
    pending.wait_staged()
    for tensor in state.values():
        tensor.fill_(-1)
    gate.opened.set()
    pending.wait()
    found = restored(root / "step_1")
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor)


def test_values_and_arrays_may_change_on_return(root: Path, gate: Gate) -> None:
    """Lists, dicts, bytes and numpy arrays too; and the state's own structure."""
    state = StateDict(
        list=[1, 2],
        bytes=bytearray(b"x" * 50_000),
        array=numpy.arange(3 * NUMEL),
        small=numpy.arange(3),
        t=torch.ones(5),
    )
    pending = Snapshot.async_take(str(root / "step_1"), {"s": state})
    state["list"].append(3)
    state["bytes"][:] = b"y" * 50_000
    state["array"][:] = 0
    state["small"][:] = 0
    del state["t"]
    gate.opened.set()
    pending.wait()
    found = restored(root / "step_1")
    assert (found["list"], found["bytes"]) == ([1, 2], bytearray(b"x" * 50_000))
    assert (found["array"] == numpy.arange(3 * NUMEL)).all()
    assert (found["small"] == numpy.arange(3)).all()
    assert torch.equal(found["t"], torch.ones(5))


def test_handle_that_nobody_keeps_is_no_obstacle(root: Path, gate: Gate) -> None:
    """A take goes on when its handle and the tensors themselves are gone; a later take waits for it."""
    state = {"t": torch.rand(5 * NUMEL)}
    expected = state["t"].clone()
    begin(root / "step_1", state)
    del state
    gate.opened.set()
    Snapshot.take(str(root / "step_2"), {"s": StateDict(n=2)})
    assert torch.equal(restored(root / "step_1")["t"], expected)


# ------------------------------------------------------------------ waiting


def test_wait_with_a_timeout(root: Path, gate: Gate) -> None:
    """It raises ``TimeoutError`` while the take goes on, and returns the snapshot once that is committed."""
    pending = begin(root / "step_1", {"t": torch.rand(NUMEL)})
    for timeout in (0, 0.001):
        with pytest.raises(TimeoutError, match="it goes on"):
            pending.wait(timeout=timeout)
    assert not pending.done()
    assert "done=False" in repr(pending)
    assert Snapshot.latest(str(root)) is None
    gate.opened.set()
    snapshot = pending.wait()
    assert pending.done()
    assert pending.wait(timeout=0).path == snapshot.path
    assert snapshot.stats is pending.stats
    assert pending.stats.num_new_chunks == 1
    assert {"stage", "write", "commit"} <= pending.stats.seconds.keys()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (StoreFullError("no space left, says the disk"), "no space left, says the disk"),
        (ValueError("something unforeseen"), "something unforeseen"),
        (TimeoutError("the filesystem timed out"), "the filesystem timed out"),
    ],
    ids=["ours", "foreign", "timeout"],
)
def test_errors_surface_in_wait(root: Path, gate: Gate, error: Exception, words: str) -> None:
    """Every error becomes a ``SnapshotError`` with its own words, each time; nothing is committed."""
    gate.error = error
    gate.opened.set()
    pending = begin(root / "step_1", {"t": torch.rand(3 * NUMEL), "small": torch.rand(100)})
    for timeout in (None, 60, None):
        with pytest.raises(SnapshotError, match=words):
            pending.wait(timeout)
    assert pending.done()
    assert not (root / "step_1").exists()
    assert Snapshot.latest(str(root)) is None
    assert list((root / ".torchsnapshot" / "leases").iterdir()) == []
    gate.error = None
    begin(root / "step_1", {"t": torch.rand(3 * NUMEL)}).wait()
    assert generations(root / "step_1") == ["000001", "000001.ok"]


def test_errors_before_staging_are_raised_at_once(root: Path) -> None:
    """What is wrong with arguments or state does not wait for ``wait``."""
    with pytest.raises(TypeError, match="cannot be stored"):
        begin(root / "step_1", {"lock": threading.Lock()})
    with pytest.raises(ValueError, match="encoding"):
        begin(root / "step_1", {}, encoding="zip")
    assert not root.exists()


def test_error_that_nobody_waits_for_is_told_by_the_next_take(
    root: Path, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    """A training that never calls ``wait`` hears of failures all the same, once each."""
    gate.error = StoreFullError("no space left")
    gate.opened.set()
    begin(root / "step_1", {"t": torch.rand(NUMEL)})
    with pytest.raises(SnapshotError):
        begin(root / "step_2", {"t": torch.rand(NUMEL)}).wait()
    gate.error = None
    begin(root / "step_3", {"t": torch.rand(NUMEL)}).wait()
    begin(root / "step_4", {"t": torch.rand(NUMEL)}).wait()
    told = [record.message for record in caplog.records if record.levelno >= logging.ERROR]
    assert told == [f"async_take of {root / 'step_1'} failed, and nobody has waited for it"]


# ------------------------------------------------------------------ several at a time


def test_busy_skip_returns_the_take_in_flight(root: Path, gate: Gate) -> None:
    """While one is in flight, another take that may be skipped is; afterwards it is done."""
    first = begin(root / "step_1", {"t": torch.rand(NUMEL)})
    assert begin(root / "step_2", {"t": torch.rand(NUMEL)}, busy="skip") is first
    skipped = Snapshot.take(str(root / "step_2"), {"s": StateDict(n=1)}, busy="skip")
    assert skipped.path == str(root / "step_1")
    gate.opened.set()
    first.wait()
    assert not (root / "step_2").exists()
    assert begin(root / "step_3", {"n": 3}, busy="skip").wait().path == str(root / "step_3")


def test_busy_wait_comes_after_the_take_in_flight(root: Path, gate: Gate) -> None:
    """A second take begins only when the first has ended, so it shares with it."""
    state = {"t": torch.rand(3 * NUMEL)}
    first = begin(root / "step_1", state)
    second: list[PendingSnapshot] = []
    thread = threading.Thread(target=lambda: second.append(begin(root / "step_2", state)))
    thread.start()
    gate.reached.wait()
    assert second == []
    gate.opened.set()
    thread.join()
    assert first.done()
    second[0].wait()
    assert second[0].stats.num_new_chunks == 0
    assert second[0].wait().head.parent == first.wait().head.take_id


def test_busy_overlap_does_not_wait(root: Path, gate: Gate) -> None:
    """Several takes may be in flight; each commits what its tensors held when it began."""
    state = {"t": torch.zeros(3 * NUMEL)}
    pending = []
    for step in range(4):
        state["t"].fill_(step)
        pending.append(begin(root / f"step_{step}", state, busy="overlap"))
    assert not any(take.done() for take in pending)
    gate.opened.set()
    for step, take in enumerate(pending):
        take.wait()
        assert torch.equal(restored(root / f"step_{step}")["t"], torch.full((3 * NUMEL,), float(step)))


def test_takes_of_one_path_commit_in_the_order_of_their_starts(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A take that has all its blobs durable still comes after an earlier one of the same path that has not."""
    held, second_is_ready = threading.Event(), threading.Event()
    put_blob = Repository.put_blob
    puts: list[str] = []

    def put(repository: Repository, key: str, data: Any, **options: Any) -> None:
        puts.append(key)
        if len(puts) == 1:
            held.wait()
            put_blob(repository, key, data, **options)
        else:
            put_blob(repository, key, data, **options)
            second_is_ready.set()

    monkeypatch.setattr(Repository, "put_blob", put)
    first = begin(root / "best", {"t": torch.zeros(NUMEL)})
    second = begin(root / "best", {"t": torch.ones(NUMEL)}, busy="overlap")
    second_is_ready.wait()
    assert not second.done()
    held.set()
    second.wait()
    assert first.done()
    assert generations(root / "best") == ["000002", "000002.ok"]
    assert torch.equal(restored(root / "best")["t"], torch.ones(NUMEL))
    assert second.wait().head.created_ms > first.wait().head.created_ms


def test_failed_take_of_a_path_holds_up_no_later_one(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next take of the path commits when the failed one has ended."""
    put_blob = Repository.put_blob
    held = threading.Event()
    reached = threading.Event()
    puts: list[str] = []

    def put(repository: Repository, key: str, data: Any, **options: Any) -> None:
        puts.append(key)
        if len(puts) == 1:
            reached.set()
            held.wait()
            raise StoreFullError("no space left")
        put_blob(repository, key, data, **options)

    monkeypatch.setattr(Repository, "put_blob", put)
    first = begin(root / "best", {"t": torch.zeros(NUMEL)})
    reached.wait()
    second = begin(root / "best", {"t": torch.ones(NUMEL)}, busy="overlap")
    held.set()
    second.wait()
    with pytest.raises(StoreFullError):
        first.wait()
    assert generations(root / "best") == ["000001", "000001.ok"]
    assert torch.equal(restored(root / "best")["t"], torch.ones(NUMEL))


def test_restore_while_a_take_is_in_flight(root: Path, gate: Gate) -> None:
    """Going back to an older snapshot does not change what the take in flight stores."""
    state = {"t": torch.rand(3 * NUMEL)}
    gate.opened.set()
    begin(root / "step_1", state).wait()
    gate.opened.clear()
    state["t"].add_(1)
    expected = state["t"].clone()
    pending = begin(root / "step_2", state)
    Snapshot(str(root / "step_1")).restore({"s": StateDict(**state)})
    assert not torch.equal(state["t"], expected)
    gate.opened.set()
    pending.wait()
    assert torch.equal(restored(root / "step_2")["t"], expected)


# ------------------------------------------------------------------ the end of the process

UNWAITED = """
import sys, torch
from torchsnapshot import Snapshot, StateDict
state = StateDict(t=torch.arange(3_000_000), small=torch.ones(100), value=list(range(100_000)))
Snapshot.async_take(sys.argv[1], {"s": state}, **eval(sys.argv[2]))
state["t"].zero_()
"""


@pytest.mark.parametrize(
    "ending", ["", "raise SystemExit(3)", "raise ValueError('sorry')"], ids=["end", "exit", "error"]
)
def test_take_that_nobody_waits_for_is_committed_when_the_process_ends(root: Path, ending: str) -> None:
    """However the interpreter ends by itself, the take is finished first, and the lease dropped."""
    finished = run_python(UNWAITED + ending, str(root / "step_1"), "{}")
    assert finished.returncode == {"": 0, "raise SystemExit(3)": 3}.get(ending, 1), finished.stderr
    assert ("sorry" in finished.stderr) == ("sorry" in ending)
    assert torch.equal(restored(root / "step_1")["t"], torch.arange(3_000_000))
    assert Snapshot(str(root / "step_1")).verify() == []
    assert list((root / ".torchsnapshot" / "leases").iterdir()) == []


def test_take_through_a_filesystem_is_committed_when_the_process_ends(root: Path) -> None:
    """Also where a filesystem brings threads and loops of its own, which Python shuts down early."""
    code = UNWAITED.replace("sys.argv[1]", "'local://' + sys.argv[1]")
    finished = run_python(code, str(root / "step_1"), "{}")
    assert (finished.returncode, finished.stderr) == (0, "")
    assert torch.equal(restored(root / "step_1")["t"], torch.arange(3_000_000))


def test_take_that_fails_when_the_process_ends_is_told_and_commits_nothing(root: Path) -> None:
    """The error goes to the log, the process ends by itself, no lease is left, and the next take works."""
    Snapshot.take(str(root / "step_0"), {"s": StateDict(n=0)})
    folder = root / ".torchsnapshot" / "blobs"
    assert not folder.exists()
    folder.write_bytes(b"no folder")
    finished = run_python(UNWAITED, str(root / "step_1"), "{}")
    assert finished.returncode == 0
    assert "async_take of" in finished.stderr
    assert "failed, and nobody has waited for it" in finished.stderr
    assert not (root / "step_1").exists()
    assert list((root / ".torchsnapshot" / "leases").iterdir()) == []
    folder.unlink()
    assert run_python(UNWAITED, str(root / "step_1"), "{}").stderr == ""
    assert torch.equal(restored(root / "step_1")["t"], torch.arange(3_000_000))


KILLED = """
import os, sys, threading, torch
from torchsnapshot import Snapshot, StateDict
from torchsnapshot.store.repository import Repository
state = StateDict(t=torch.arange(100_000))
Snapshot.take(sys.argv[1] + "/step_1", {"s": state})
put_blob = Repository.put_blob
lock, puts = threading.Lock(), []
def put(repository, key, data, **options):
    with lock:
        if len(puts) < 3:
            puts.append(key)
            return put_blob(repository, key, data, **options)
    os.write(1, b"putting\\n")
    threading.Event().wait()
Repository.put_blob = put
state["t"].add_(1_000_000)
Snapshot.async_take(sys.argv[1] + "/step_2", {"s": state}).wait()
"""


def test_killed_process_leaves_what_was_committed_and_garbage(root: Path) -> None:
    """After ``SIGKILL`` in the middle of a take the older snapshot restores, the next take and gc just work."""
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(root)], stdout=subprocess.PIPE, env=dict(os.environ), text=True
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    assert line == "putting\n"
    assert process.returncode == -signal.SIGKILL
    assert len(list((root / ".torchsnapshot" / "leases").iterdir())) == 1
    assert [snapshot.name for snapshot in Snapshot.list(str(root))] == ["step_1"]
    state = {"t": torch.arange(100_000) + 1_000_000}
    begin(root / "step_2", state).wait()
    report = collect(str(root), wait=0)
    assert report.freed_blobs >= 3
    assert list((root / ".torchsnapshot" / "leases").iterdir()) == []
    for name, first in (("step_1", 0), ("step_2", 1_000_000)):
        assert torch.equal(restored(root / name)["t"], torch.arange(100_000) + first)
        assert Snapshot(str(root / name)).verify() == []


# ------------------------------------------------------------------ forks


@pytest.mark.filterwarnings("ignore:.*fork")
def test_fork_during_a_take_does_no_harm(root: Path, gate: Gate) -> None:
    """A child can neither wait for its parent's take nor harm it; the parent's take commits."""
    state = {"t": torch.rand(5 * NUMEL)}
    expected = state["t"].clone()
    pending = begin(root / "step_1", state)
    gate.reached.wait()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            try:
                pending.wait()
            except SnapshotError as error:
                code = 0 if "forked child" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    gate.opened.set()
    pending.wait()
    assert torch.equal(restored(root / "step_1")["t"], expected)
    assert Snapshot(str(root / "step_1")).verify() == []


class Numbers(Dataset[int]):
    """What a training loop loads."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> int:
        return index


@pytest.mark.filterwarnings("ignore:.*fork")
def test_data_loaders_fork_while_takes_write(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DataLoader workers that are forked again and again during takes harm neither batches nor snapshots."""
    loader = DataLoader(Numbers(), batch_size=16, num_workers=2, multiprocessing_context="fork")
    # chunks that are large enough for direct I/O, which a fork would corrupt if buffers were ordinary memory
    monkeypatch.setenv(knobs.CHUNK_SIZE, str(4 << 20))
    state = {"t": torch.rand(3_000_000), "small": torch.rand(1000)}
    taken: list[dict[str, torch.Tensor]] = []
    for step in range(3):
        state["t"].add_(1.0)
        taken.append({name: tensor.clone() for name, tensor in state.items()})
        pending = begin(root / f"step_{step}", state)
        # the tensors may change from here on, and the workers' copies of this process know nothing of the take
        state["t"].mul_(-1.0)
        is_done = False
        while not is_done:
            is_done = pending.done()
            assert torch.cat(list(loader)).tolist() == list(range(64))
        pending.wait()
        state["t"].mul_(-1.0)
    for step, expected in enumerate(taken):
        found = restored(root / f"step_{step}")
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        assert Snapshot(str(root / f"step_{step}")).verify() == []
    assert list((root / ".torchsnapshot" / "leases").iterdir()) == []


FORKING = """
import os, sys, threading, torch
from torchsnapshot import Snapshot, StateDict
from torchsnapshot.store.repository import Repository
torch.set_num_threads(1)
put_blob = Repository.put_blob
reached, opened = threading.Event(), threading.Event()
def put(repository, key, data, **options):
    reached.set()
    opened.wait()
    put_blob(repository, key, data, **options)
Repository.put_blob = put
root = sys.argv[1]
pending = Snapshot.async_take(root + "/parent", {"s": StateDict(t=torch.arange(100_000))})
reached.wait()
child = os.fork()
if child == 0:
    opened.set()
    # neither waits for the parent's take nor skips because of it
    Snapshot.async_take(root + "/child_1", {"s": StateDict(t=torch.arange(50_000))}, busy="skip").wait()
    Snapshot.take(root + "/child_2", {"s": StateDict(t=torch.arange(50_000))})
    Snapshot(root + "/child_1").restore({"s": StateDict()})
    Snapshot.async_take(root + "/child_3", {"s": StateDict(t=torch.arange(60_000))})
    sys.exit(7)
status = os.waitpid(child, 0)[1]
assert os.waitstatus_to_exitcode(status) == 7, status
assert len(os.listdir(root + "/.torchsnapshot/leases")) == 1, os.listdir(root + "/.torchsnapshot/leases")
opened.set()
pending.wait()
"""


def test_child_takes_and_restores_by_itself_and_exits(root: Path) -> None:
    """A child that is forked during a take has snapshots of its own, and its exit leaves the parent's lease alone."""
    finished = run_python(FORKING, str(root))
    assert (finished.returncode, finished.stderr) == (0, "")
    assert sorted(snapshot.name for snapshot in Snapshot.list(str(root))) == ["child_1", "child_2", "child_3", "parent"]
    for name, count in (("parent", 100_000), ("child_2", 50_000), ("child_3", 60_000)):
        assert torch.equal(restored(root / name)["t"], torch.arange(count))
    assert list((root / ".torchsnapshot" / "leases").iterdir()) == []


# ------------------------------------------------------------------ tasks


def test_task_that_cannot_start_is_forgotten(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    """Where no thread can be started the call fails, drops its lease, and the exit waits for nothing."""
    start = threading.Thread.start
    tasks = list(background._tasks)

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith("async_take"):
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(background.threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            begin(root / "step_1", {"n": 1})
    assert background._tasks == tasks
    assert list((root / ".torchsnapshot" / "leases").iterdir()) == []
    begin(root / "step_1", {"n": 1}).wait()


def test_damage_found_in_the_background_surfaces_as_it_is() -> None:
    """Errors of this library keep their type."""

    def fail() -> Snapshot:
        raise CorruptionError("bad bytes")

    pending = PendingSnapshot("x", None, None, background.Task(fail, "x"))  # type: ignore[arg-type]
    with pytest.raises(CorruptionError, match="bad bytes"):
        pending.wait()
