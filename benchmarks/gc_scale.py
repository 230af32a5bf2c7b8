"""The collector's plan over 1,000,000 chunk references, and a listing of 1,000 snapshots, in synthetic stores.

The stores are written by the library's own code, except that nothing waits for the disk. Each measurement runs in a
fresh process, so that its memory is its own.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.part import REPOSITORY, Options, run_part, take_turns, timed
from benchmarks.report import Line, Result, readable, verdict
from torchsnapshot import Snapshot
from torchsnapshot.store.envelope import ChunkRef, ChunkTableBuilder, Head, pack_manifest
from torchsnapshot.store.gc import plan_gc
from torchsnapshot.store.keys import OK_SUFFIX, BlobKey, ManifestName, blob_object, new_id
from torchsnapshot.store.local import LocalBackend
from torchsnapshot.store.repository import Repository
from torchsnapshot.store.walk import manifest_folder

CHUNK_NBYTES = 4 << 20
GARBAGE_BLOBS = 1000
"""How many blobs nothing refers to."""

PLAN_SECONDS, PLAN_NBYTES, LIST_SECONDS = 30.0, 1 << 30, 2.0


class Store:
    """A store of snapshots that never were: every blob is an empty file.

    Args:
        root: an empty folder.
        num_chunks: in each snapshot.
        num_new: how many of them each snapshot brings; it shares the others with the one before.
    """

    def __init__(self, root: Path, num_chunks: int, num_new: int) -> None:
        self._root = root
        self._num_new = num_new
        self.repository = Repository.create_or_open(LocalBackend(str(root), durable=False))
        for first in range(256):
            (root / ".torchsnapshot" / "blobs" / f"{first:02x}").mkdir(parents=True)
        self._chunks = self._new_chunks(num_chunks)
        self.num_blobs = num_chunks

    def add_snapshot(self, step: int) -> None:
        """Replace the oldest chunks by new ones, unless it is the first, and commit."""
        take_id = new_id()
        if step:
            self._chunks = [*self._chunks[self._num_new :], *self._new_chunks(self._num_new)]
            self.num_blobs += self._num_new
        builder = ChunkTableBuilder()
        builder.add(self._chunks)
        nbytes = len(self._chunks) * CHUNK_NBYTES
        head = Head(
            take_id=take_id,
            store_id=self.repository.store_id,
            created_ms=1_700_000_000_000 + step,
            parent=None,
            world_size=1,
            state_nbytes=nbytes,
            new_nbytes=self._num_new * CHUNK_NBYTES,
            reused_nbytes=nbytes - self._num_new * CHUNK_NBYTES,
            stored_nbytes=self._num_new * CHUNK_NBYTES,
            num_chunks=len(self._chunks),
            num_new_chunks=self._num_new,
            num_blobs=self._num_new,
            library="benchmark",
        )
        manifest = f"{manifest_folder(f'run/step_{step:06d}')}/{ManifestName(1, take_id)}"
        self.repository.backend.put(manifest, pack_manifest(head, [builder.build()], b""))
        self.repository.backend.put(manifest + OK_SUFFIX, b"")

    def add_garbage(self) -> None:
        """Blobs that nothing refers to."""
        self._new_chunks(GARBAGE_BLOBS)
        self.num_blobs += GARBAGE_BLOBS

    def _new_chunks(self, count: int) -> list[ChunkRef]:
        take_id = new_id()
        keys = [BlobKey(os.urandom(16), take_id, 0) for _ in range(count)]
        for key in keys:
            os.close(os.open(self._root / blob_object(str(key)), os.O_CREAT | os.O_WRONLY))
        return [ChunkRef(key.digest, CHUNK_NBYTES, str(key), CHUNK_NBYTES, 0, CHUNK_NBYTES) for key in keys]


def measure(options: Options) -> Result:
    """Measure, and hold it against the targets."""
    num_chunks, num_snapshots, num_listed = (50, 4, 10) if options.quick else (5000, 200, 1000)
    gc_root, list_root = options.folder / "gc", options.folder / "list"
    store = Store(gc_root, num_chunks, num_new=max(1, num_chunks // 10))
    for step in range(num_snapshots):
        store.add_snapshot(step)
    store.add_garbage()
    short = Store(list_root, num_chunks=20, num_new=1)
    for step in range(num_listed):
        short.add_snapshot(step)
    result = Result(facts={"references": num_chunks * num_snapshots, "blobs": store.num_blobs, "listed": num_listed})
    answers: dict[str, dict[str, Any]] = {}
    turns = {"gc plan": partial(_ask, "plan", gc_root, answers), "ls": partial(_ask, "ls", list_root, answers)}
    turns["torchsnapshot ls"] = partial(_command_line, list_root)
    take_turns(turns, result, min(options.rounds, 5))
    plan = answers["plan"]
    if plan["condemned"] != GARBAGE_BLOBS or answers["ls"]["snapshots"] != num_listed:
        raise AssertionError("the plan or the listing is wrong")
    result.facts["plan_peak_nbytes"] = plan["peak_nbytes"]
    seconds, ls = result.median("gc plan"), result.median("ls")
    references = f"{result.facts['references']:,} references, {num_snapshots} snapshots, {store.num_blobs:,} blobs"
    result.lines = [
        Line(
            f"gc plan: {references}",
            f"≤ {PLAN_SECONDS:.0f} s",
            readable(seconds),
            "",
            "",
            verdict(seconds <= PLAN_SECONDS),
        ),
        Line(
            "gc plan: memory of its process",
            f"≤ {PLAN_NBYTES >> 30} GiB",
            f"{plan['peak_nbytes'] / (1 << 20):.0f} MiB",
            "",
            "",
            verdict(plan["peak_nbytes"] <= PLAN_NBYTES),
        ),
        Line(
            f"ls of {num_listed:,} snapshots",
            f"≤ {LIST_SECONDS:.0f} s",
            f"{readable(ls)} ({readable(result.median('torchsnapshot ls'))} as a command)",
            "",
            "",
            verdict(ls <= LIST_SECONDS),
        ),
    ]
    return result


def _ask(what: str, root: Path, answers: dict[str, dict[str, Any]]) -> float:
    """Run ``_answer`` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.gc_scale", f"--{what}", str(root)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    answers[what] = json.loads(done.stdout)
    seconds: float = answers[what]["seconds"]
    return seconds


def _command_line(root: Path) -> float:
    command = [sys.executable, "-W", "ignore", "-m", "torchsnapshot", "ls", str(root)]
    return timed(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=REPOSITORY))


def _answer(what: str, root: str) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def plan() -> None:
        found["condemned"] = len(plan_gc(Repository.open(LocalBackend(root))).condemned)

    def ls() -> None:
        snapshots = Snapshot.list(root)
        found["snapshots"] = len([snapshot.head for snapshot in snapshots])

    found["seconds"] = timed({"plan": plan, "ls": ls}[what])
    found["peak_nbytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return found


def _main(arguments: Sequence[str]) -> None:
    if len(arguments) == 2 and arguments[0] in ("--plan", "--ls"):
        print(json.dumps(_answer(arguments[0][2:], arguments[1])))
    else:
        run_part("gc_scale", measure)


if __name__ == "__main__":
    _main(sys.argv[1:])
