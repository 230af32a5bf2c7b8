"""Deltas from take to restore: written where they are smaller, whole again bit for bit, and never in anybody's way."""

from __future__ import annotations

import logging
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import blobs, files, new_process, refs
from torch.nn import functional

from torchsnapshot import Snapshot, StateDict, collect, knobs
from torchsnapshot.chunks import bases, coder
from torchsnapshot.copy import copy_snapshot
from torchsnapshot.engine.meter import EncodingMeter
from torchsnapshot.reading.opening import open_snapshot
from torchsnapshot.store.envelope import ChunkRef, Form
from torchsnapshot.store.usage import measure_usage

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
    bases.forget()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder for snapshots that nothing else uses."""
    return tmp_path / "run"


def take(path: Path | str, encoding: str = "smallest", **state: Any) -> Snapshot:
    """Take a snapshot of some tensors."""
    return Snapshot.take(str(path), {"s": StateDict(**state)}, encoding=encoding)  # type: ignore[arg-type]


def restored(path: Path | str) -> dict[str, Any]:
    """What a snapshot holds, restored into nothing."""
    target = StateDict()
    Snapshot(str(path)).restore({"s": target})
    return target.data


def weights(count: int = 4) -> torch.Tensor:
    """So many chunks of fp32 weights."""
    return 0.02 * torch.randn(count * NUMEL)


def trained(tensor: torch.Tensor, by: float = 1e-4) -> torch.Tensor:
    """The weights after some steps."""
    return tensor + by * torch.randn_like(tensor)


def forms(path: Path, name: str = "s/w") -> set[Form]:
    """In which forms the chunks of an entry are stored."""
    return {ref.form for ref in refs(path, name)}


def decide(monkeypatch: pytest.MonkeyPatch, answer: bool) -> None:
    """Make the meter of "auto" say the same to everything, whatever this machine's speed is."""
    for question in ("wants_encoding", "wants_delta", "wants_base", "wants_copy"):
        monkeypatch.setattr(EncodingMeter, question, lambda *arguments: answer)


def stored_fraction(snapshot: Snapshot) -> float:
    """Which part of the state's bytes a take put."""
    assert snapshot.stats is not None
    return snapshot.stats.stored_nbytes / snapshot.stats.state_nbytes


def a_run(root: Path, steps: int = 6, encoding: str = "smallest") -> list[torch.Tensor]:
    """Weights in training, with a snapshot of each step; the weights of each step."""
    history = [weights()]
    for _ in range(steps - 1):
        history.append(trained(history[-1]))
    for step, tensor in enumerate(history):
        take(root / f"step_{step}", encoding, w=tensor)
    return history


# ------------------------------------------------------------------ what is written


def test_changed_chunks_become_deltas_one_deep(root: Path) -> None:
    """The first take stands alone; what changed after it is against chunks of the first, at every step."""
    history = a_run(root)
    assert forms(root / "step_0") == {Form.ENCODED}
    first = refs(root / "step_0", "s/w")
    for step in range(1, 6):
        for ref, base in zip(refs(root / f"step_{step}", "s/w"), first, strict=True):
            assert ref.form is Form.DELTA
            assert ref.key.endswith(".d")
            assert ref.base == base
            assert ref.stored_nbytes < 0.95 * base.stored_nbytes
    new_process()
    for step, tensor in enumerate(history):
        assert torch.equal(restored(root / f"step_{step}")["w"], tensor)


def test_bases_from_memory_and_from_the_store_give_the_same_bytes(tmp_path: Path) -> None:
    """With and without copies in memory, in one process or in many, the same blobs are put."""

    def run(name: str, budget: str | None, forgetful: bool) -> set[bytes]:
        torch.manual_seed(0)
        new_process()
        if budget is not None:
            os.environ[knobs.BASE_MEMORY] = budget
        try:
            tensor = weights()
            for step in range(4):
                take(tmp_path / name / f"step_{step}", w=tensor)
                tensor = trained(tensor)
                if forgetful:
                    new_process()
        finally:
            os.environ.pop(knobs.BASE_MEMORY, None)
        return {path.read_bytes() for path in blobs(tmp_path / name).values()}

    found = run("memory", None, False)
    assert len(found) == 16
    assert run("no_memory", "0", False) == found
    assert run("little_memory", str(2 * CHUNK_NBYTES), False) == found
    assert run("new_processes", None, True) == found


def test_copies_serve_as_bases_without_reading(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base that memory holds is not read from the store."""
    tensor = weights()
    take(root / "step_0", w=tensor)
    from torchsnapshot.chunks.reader import ChunkReader

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("a base was read")

    with monkeypatch.context() as patch:
        patch.setattr(ChunkReader, "read_into", refuse)
        tensor = trained(tensor)
        take(root / "step_1", w=tensor)
    assert forms(root / "step_1") == {Form.DELTA}
    assert torch.equal(restored(root / "step_1")["w"], tensor)


def test_raw_writes_no_deltas_and_keeps_no_copies(root: Path) -> None:
    """With ``encoding="raw"`` nothing is coded, and no memory is spent on bases."""
    a_run(root, 3, "raw")
    assert forms(root / "step_2") == {Form.RAW}
    assert all(kept.held_nbytes == 0 for _, kept in bases._bases.items())


def test_what_gains_nothing_stands_alone(root: Path) -> None:
    """Chunks that have nothing in common with their predecessors are not written as deltas, and not kept in memory."""
    for step in range(4):
        take(root / f"step_{step}", w=weights())
        assert forms(root / f"step_{step}") == {Form.ENCODED}
    assert sum(kept.held_nbytes for _, kept in bases._bases.items()) <= 4 * CHUNK_NBYTES


def test_a_new_base_begins_when_the_gain_fades(root: Path) -> None:
    """Deltas that grow from step to step end in a new base, and those after it are small again."""
    tensor = weights(1)
    seen = []
    for step in range(24):
        take(root / f"step_{step:02}", w=tensor)
        seen += refs(root / f"step_{step:02}", "s/w")
        tensor = trained(tensor, 3e-4)
    alone = [step for step, ref in enumerate(seen) if ref.form is Form.ENCODED]
    assert alone[0] == 0
    assert 2 <= len(alone) <= 12
    for begin in alone[1:]:
        before, after = seen[begin - 1], seen[begin + 1]
        assert after.base == seen[begin]
        assert before.form is Form.DELTA
        assert after.stored_nbytes < before.stored_nbytes
    # renewing never costs more than it saves: less than if every step stood alone, or all were against the first
    average = sum(ref.stored_nbytes for ref in seen) / len(seen)
    assert average < 0.95 * seen[0].stored_nbytes


@pytest.mark.parametrize("encoding", ["auto", "smallest"])
@pytest.mark.parametrize("chunk_nbytes", [64 << 10, 1 << 20])
def test_untouched_rows_cost_next_to_nothing(
    root: Path, encoding: str, chunk_nbytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where 1 % of an embedding's rows change, at most 3 % of its bytes are written, whatever the chunk size."""
    decide(monkeypatch, True)
    with knobs.override_max_chunk_size_bytes(chunk_nbytes):
        rows = 0.02 * torch.randn(4096, 256)
        take(root / "step_0", encoding, w=rows)
        for step in range(1, 4):
            touched = torch.randperm(4096)[:41]
            rows[touched] = trained(rows[touched])
            snapshot = take(root / f"step_{step}", encoding, w=rows)
            assert stored_fraction(snapshot) <= 0.03
    assert torch.equal(restored(root / "step_3")["w"], rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64])
def test_every_width_comes_back(root: Path, dtype: torch.dtype) -> None:
    """Deltas of elements of 2, 4 and 8 bytes are restored bit for bit."""
    tensor = (100 * torch.randn(4 * NUMEL)).to(dtype)
    for step in range(3):
        take(root / f"step_{step}", w=tensor)
        assert torch.equal(restored(root / f"step_{step}")["w"], tensor)
        tensor = tensor + (tensor * 0.01 * torch.rand(tensor.shape)).to(dtype)
    assert Form.DELTA in forms(root / "step_2")


def test_going_back_and_on(root: Path) -> None:
    """After a restore of any step, deltas are made against what stands there, and all branches come back."""
    history = a_run(root)
    state = StateDict(w=torch.zeros_like(history[0]))
    for step in (4, 0, 2):
        new_process()
        Snapshot(str(root / f"step_{step}")).restore({"s": state})
        assert torch.equal(state["w"], history[step])
        branch = trained(history[step])
        take(root / f"branch_{step}", w=branch)
        assert forms(root / f"branch_{step}") == {Form.DELTA}
        assert {ref.base for ref in refs(root / f"branch_{step}", "s/w")} == set(refs(root / "step_0", "s/w"))
        assert torch.equal(restored(root / f"branch_{step}")["w"], branch)


def test_asynchronous_takes_write_deltas_too(root: Path) -> None:
    """In the background the same happens."""
    tensor = weights()
    for step in range(3):
        Snapshot.async_take(str(root / f"step_{step}"), {"s": StateDict(w=tensor)}, encoding="smallest").wait()
        expected, tensor = tensor, trained(tensor)
    assert forms(root / "step_2") == {Form.DELTA}
    assert torch.equal(restored(root / "step_2")["w"], expected)


# ------------------------------------------------------------------ "auto"


def test_auto_asks_the_meter(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where reading and keeping bases does not pay, "auto" neither keeps copies nor reads, and writes no deltas."""
    decide(monkeypatch, False)
    a_run(root, 3, "auto")
    assert forms(root / "step_2") == {Form.RAW}
    assert all(kept.held_nbytes == 0 for _, kept in bases._bases.items())


def test_auto_reads_no_bases_from_remote_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a remote store a base comes from memory, or, with "smallest" alone, from the store."""
    decide(monkeypatch, True)
    url = f"memory://{os.urandom(8).hex()}/run"
    tensor = weights()
    take(f"{url}/step_0", "auto", w=tensor)
    bases.forget()
    tensor = trained(tensor)
    take(f"{url}/step_1", "auto", w=tensor)
    assert Form.DELTA not in {ref.form for ref in refs(f"{url}/step_1", "s/w")}
    bases.forget()
    tensor = trained(tensor)
    take(f"{url}/step_2", "smallest", w=tensor)
    assert {ref.form for ref in refs(f"{url}/step_2", "s/w")} == {Form.DELTA}
    assert torch.equal(restored(f"{url}/step_2")["w"], tensor)


# ------------------------------------------------------------------ when a base is gone or damaged


@pytest.mark.parametrize("same_process", [True, False])
def test_base_deleted_by_hand_makes_the_next_take_write_anew(root: Path, same_process: bool) -> None:
    """Nothing is built on a base that is not there, even if memory has a copy of it; nor is its delta reused."""
    history = a_run(root, 2)
    for ref in refs(root / "step_0", "s/w")[:2]:
        blobs(root)[ref.key].unlink()
    if not same_process:
        new_process()
    # an unchanged state: what the lost bases carried is written again, the rest is reused
    snapshot = take(root / "step_2", w=history[1])
    assert snapshot.stats is not None
    assert snapshot.stats.num_new_chunks == 2
    assert [ref.form for ref in refs(root / "step_2", "s/w")] == [Form.ENCODED] * 2 + [Form.DELTA] * 2
    changed = trained(history[1])
    take(root / "step_3", w=changed)
    assert torch.equal(restored(root / "step_2")["w"], history[1])
    assert torch.equal(restored(root / "step_3")["w"], changed)


def test_damaged_base_costs_bytes_and_no_take(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A base whose bytes turn out to be damaged is not used: the chunk stands alone, and one line says why."""
    history = a_run(root, 2)
    victim = refs(root / "step_0", "s/w")[0]
    path = blobs(root)[victim.key]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    new_process()
    changed = trained(history[1])
    with caplog.at_level(logging.INFO, logger="torchsnapshot"):
        take(root / "step_2", w=changed)
    assert [record for record in caplog.records if victim.key in record.getMessage()]
    assert [ref.form for ref in refs(root / "step_2", "s/w")] == [Form.ENCODED, *[Form.DELTA] * 3]
    assert torch.equal(restored(root / "step_2")["w"], changed)


def test_delta_that_does_not_come_back_is_not_put(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The first delta of each width is decoded before it is put; one that is wrong is reported, and stored raw."""
    history = a_run(root, 1)
    real_encode = coder.encode

    def encode_wrongly(raw: memoryview, scheme: Any, out: memoryview, scratch: Any, base: Any = None) -> int | None:
        size = real_encode(raw, scheme, out, scratch, base)
        if size is not None and base is not None:
            out[size - 1] ^= 1
        return size

    monkeypatch.setattr(coder, "encode", encode_wrongly)
    changed = trained(history[0])
    with caplog.at_level(logging.ERROR), knobs.override_max_per_rank_io_concurrency(1):
        take(root / "step_1", w=changed)
    assert len(caplog.records) == 1
    assert forms(root / "step_1") == {Form.RAW}
    assert torch.equal(restored(root / "step_1")["w"], changed)


# ------------------------------------------------------------------ what else knows them


def test_gc_keeps_bases_alive(root: Path) -> None:
    """A base lives as long as a snapshot has a delta against it, and goes with the last one."""
    history = a_run(root, 3)
    first = {ref.key for ref in refs(root / "step_0", "s/w")}
    second = {ref.key for ref in refs(root / "step_1", "s/w")}
    Snapshot(str(root / "step_0")).delete()
    Snapshot(str(root / "step_1")).delete()
    collect(str(root))
    assert first <= blobs(root).keys()
    assert not second & blobs(root).keys()
    assert torch.equal(restored(root / "step_2")["w"], history[2])
    Snapshot(str(root / "step_2")).delete()
    collect(str(root), force=True)
    assert not blobs(root)


def test_verify_names_what_a_damaged_base_spoils(root: Path) -> None:
    """Depth "bytes" finds the base and the delta that hangs on it; depth "blobs" finds a missing base."""
    a_run(root, 2)
    snapshot = Snapshot(str(root / "step_1"))
    assert snapshot.verify() == []
    delta = refs(root / "step_1", "s/w")[0]
    assert delta.base is not None
    path = blobs(root)[delta.base.key]
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    assert {problem.key for problem in snapshot.verify(depth="bytes")} == {delta.key, delta.base.key}
    path.unlink()
    assert {problem.key for problem in snapshot.verify(depth="blobs")} == {delta.base.key}


def test_copy_stands_alone(root: Path, tmp_path: Path) -> None:
    """A copy of a snapshot of deltas has no bases to carry along, and holds the same."""
    history = a_run(root, 2)
    copy_snapshot(open_snapshot(str(root / "step_1")), str(tmp_path / "elsewhere" / "step_1"))
    assert forms(tmp_path / "elsewhere" / "step_1") == {Form.ENCODED}
    assert torch.equal(restored(tmp_path / "elsewhere" / "step_1")["w"], history[1])


def test_usage_counts_bases(root: Path) -> None:
    """A snapshot of deltas refers to its bases, and deleting the snapshot of the bases would free nothing of them."""
    a_run(root, 2)
    usage = {
        snapshot.name: snapshot for snapshot in measure_usage(open_snapshot(str(root / "step_1")).repository).snapshots
    }
    sizes = {key: path.stat().st_size for key, path in blobs(root).items()}
    assert usage["step_1"].referenced_nbytes == sum(sizes.values())
    assert usage["step_0"].own_nbytes == 0
    assert usage["step_1"].own_nbytes == sum(size for key, size in sizes.items() if key.endswith(".d"))


def test_unchanged_deltas_are_reused(root: Path) -> None:
    """A take of a state that stands in deltas writes a manifest and nothing else."""
    history = a_run(root, 3)
    before = files(root / ".torchsnapshot" / "blobs")
    for _ in range(2):
        new_process()
        take(root / "step_3", w=history[2])
        assert files(root / ".torchsnapshot" / "blobs") == before


# ------------------------------------------------------------------ a real training run


def text() -> torch.Tensor:
    """Real text: some of Python's own source."""
    path = Path(sysconfig.get_paths()["stdlib"]) / "argparse.py"
    return torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).long()


def test_training_run_comes_back_at_every_step(root: Path, record_property: Any) -> None:
    """Model and AdamW of a real run: deltas make the takes smaller, and every step is restored bit for bit."""
    model = torch.nn.Sequential(
        torch.nn.Embedding(256, 64), torch.nn.Flatten(), torch.nn.Linear(512, 512), torch.nn.GELU(),
        torch.nn.Linear(512, 256),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    source = text()
    app_state = {"model": model, "optimizer": optimizer}
    states: list[dict[str, torch.Tensor]] = []
    fractions: list[float] = []
    for step in range(60):
        starts = torch.randint(len(source) - 9, (64,)).tolist()
        batch = torch.stack([source[start : start + 9] for start in starts])
        loss = functional.cross_entropy(model(batch[:, :-1]), batch[:, -1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 9:
            fractions.append(stored_fraction(Snapshot.take(str(root / f"step_{step}"), app_state, encoding="smallest")))
            moments = {f"{i}/{k}": v.clone() for i, s in optimizer.state_dict()["state"].items() for k, v in s.items()}
            states.append({**{k: v.clone() for k, v in model.state_dict().items()}, **moments})
    record_property("fractions", [round(fraction, 4) for fraction in fractions])
    print("stored bytes of each take as fractions of the state:", *(f"{x:.3f}" for x in fractions), file=sys.stderr)
    assert max(fractions[1:]) < fractions[0]
    assert sum(fractions[1:]) / len(fractions[1:]) < 0.96 * fractions[0]
    for ref in refs(root / "step_19", "model/2.weight"):
        assert ref.base is not None
        assert ref.stored_nbytes < 0.9 * ref.base.stored_nbytes
    for index in (5, 0, 3, 1, 4, 2):
        Snapshot(str(root / f"step_{10 * index + 9}")).restore(app_state)
        moments = {f"{i}/{k}": v for i, s in optimizer.state_dict()["state"].items() for k, v in s.items()}
        found = {**model.state_dict(), **moments}
        assert found.keys() == states[index].keys()
        for name, tensor in found.items():
            assert torch.equal(tensor, states[index][name]), name


def test_reference_of_a_delta_is_hashable_with_its_base(root: Path) -> None:
    """Tables keep references as keys: equal ones are one, whatever read them."""
    a_run(root, 2)
    first, again = refs(root / "step_1", "s/w"), refs(root / "step_1", "s/w")
    assert set(first) == set(again)
    assert all(isinstance(ref, ChunkRef) and ref.base is not None for ref in first)
