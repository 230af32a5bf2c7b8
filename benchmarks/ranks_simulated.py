"""A take of a 1 TB state by 1,000 ranks, in one process: what rank 0 computes, and what every rank sends.

The planning is the library's own: the messages of all rounds, rank 0's decisions, the manifest. Only the tensors are
made up: no rank has memory for its part, and all digests are new, as where every tensor has changed.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import torch
import xxhash

from benchmarks.part import Options, run_part
from benchmarks.report import Line, Result, megabytes, readable, verdict
from torchsnapshot.coordination.messages import unpack
from torchsnapshot.engine.groups import grouped
from torchsnapshot.format.entries import ContainerEntry
from torchsnapshot.geometry import grid
from torchsnapshot.geometry.placements import Placement, Sharding
from torchsnapshot.ranks import agreement, assembly, group_decisions, ownership
from torchsnapshot.ranks.agreement import Duty
from torchsnapshot.ranks.group_decisions import Decisions
from torchsnapshot.ranks.group_messages import FIGURES, pack_exchange, pack_lists, pack_report
from torchsnapshot.state.flatten import ShardedLeaf, TensorLeaf
from torchsnapshot.state.host_views import host_view
from torchsnapshot.state.sharded import ShardedSource
from torchsnapshot.store.envelope import ChunkRef, Head, pack_manifest
from torchsnapshot.taking.plan import GROUP_NBYTES, SMALL_CHUNK_NBYTES, Chunk, Leaf, TakePlan

TAKE_ID = "0" * 24
MAX_RANK_NBYTES = 64 << 10
MAX_MANIFEST_NBYTES = 32 << 20
NUM_COLUMNS = 16_000
CHUNK_NBYTES = 4 << 20
STEPS = ("exchange", "lists", "assemble", "manifest")


@dataclass
class State:
    """A model and an optimizer with two moments, spread along the first dimension of every tensor.

    Args:
        num_ranks: in one mesh.
        num_parameters: each has two moments and a step of its own.
        nbytes: of the whole state, about.
    """

    num_ranks: int
    num_parameters: int
    nbytes: int
    names: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.names = [f"layers.{number}.weight" for number in range(self.num_parameters)]
        rows = self.nbytes // 4 // (3 * self.num_parameters) // NUM_COLUMNS
        self.shape = (max(1, rows // self.num_ranks) * self.num_ranks, NUM_COLUMNS)
        self.sharding = Sharding((self.num_ranks,), tuple(range(self.num_ranks)), (Placement(0),))
        self.regions = self.sharding.regions(self.shape)
        self.step = torch.tensor(7.0)

    def plan(self, rank: int, take: str) -> TakePlan:
        """What one rank has, with digests that nobody else has."""
        # every tensor has the same shape, so all of a rank's parts are described and cut alike
        boxes = self.regions[rank]
        source = ShardedSource("float32", self.shape, self.sharding, rank, boxes, (), "parameter", False)
        pieces = [piece for box in boxes for piece in grid.cut(box, source.cell(CHUNK_NBYTES), 4)]
        leaves: list[Leaf] = [Leaf("model", ContainerEntry("dict", tuple(self.names)))]
        leaves += self._parts("model", source, pieces, take)
        leaves.append(Leaf("optim", ContainerEntry("dict", ("exp_avg", "exp_avg_sq", "step"))))
        for moment in ("exp_avg", "exp_avg_sq"):
            leaves.append(Leaf(f"optim/{moment}", ContainerEntry("dict", tuple(self.names))))
            leaves += self._parts(f"optim/{moment}", source, pieces, take)
        leaves.append(Leaf("optim/step", ContainerEntry("dict", tuple(self.names))))
        node, view = TensorLeaf(self.step, "tensor", False), host_view(self.step)
        leaves += [Leaf(f"optim/step/{name}", node, view, (1,), [], self.step.numpy().tobytes()) for name in self.names]
        own = torch.tensor(rank)
        leaves.append(Leaf("own", ContainerEntry("dict", ("rank",))))
        leaves.append(
            Leaf("own/rank", TensorLeaf(own, "tensor", False), host_view(own), (1,), [], own.numpy().tobytes())
        )
        return TakePlan(leaves, [], [], 0)

    def _parts(self, prefix: str, source: ShardedSource, pieces: Sequence[grid.Piece], take: str) -> Iterator[Leaf]:
        cell = source.cell(CHUNK_NBYTES)
        for name in self.names:
            path = f"{prefix}/{name}"
            chunks = [
                Chunk(path, cast(Any, None), piece, 4, None, digest=digest_at(take, path, piece)) for piece in pieces
            ]
            yield Leaf(path, ShardedLeaf(source), None, cell, chunks)


def digest_at(take: str, path: str, piece: grid.Piece) -> bytes:
    """Made up, but the same whenever it is asked for."""
    return xxhash.xxh3_128_digest(f"{take} {path} {piece.box.offsets}".encode())


def store(plan: TakePlan, rank: int) -> None:
    """Give every chunk a place, as putting it would have."""
    chunks = list(plan.chunks())
    for group in grouped((chunk for chunk in chunks if chunk.nbytes < SMALL_CHUNK_NBYTES), GROUP_NBYTES):
        key, nbytes, offset = f"{os.urandom(16).hex()}-{TAKE_ID}-{rank}", sum(chunk.nbytes for chunk in group), 0
        for chunk in group:
            chunk.ref = ChunkRef(chunk.digest, chunk.nbytes, key, nbytes, offset, chunk.nbytes)
            offset += chunk.nbytes
    for chunk in chunks:
        if chunk.ref is None:
            key = f"{chunk.digest.hex()}-{TAKE_ID}-{rank}"
            chunk.ref = ChunkRef(chunk.digest, chunk.nbytes, key, chunk.nbytes, 0, chunk.nbytes)


def measure(options: Options) -> Result:
    """Measure, and hold it against the target."""
    num_ranks, num_parameters = (8, 5) if options.quick else (1000, 300)
    nbytes = num_ranks << 30
    state = State(num_ranks, num_parameters, nbytes)
    result = Result(facts={"num_ranks": num_ranks, "num_tensors": 3 * num_parameters, "state_nbytes": nbytes})
    group = SimpleNamespace(global_ranks=range(num_ranks), world_size=num_ranks, rank=0)
    group_decisions._known_trees.clear()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # the first take teaches rank 0 the trees; the second one is what a job pays again and again
    for name in ("first take", "later take"):
        _Take(state, Decisions(cast(Any, group), "", cast(Any, None), cast(Any, None)), result, name).run()
    result.facts["peak_rss_nbytes"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    facts = result.facts
    sent, manifest = facts["later take: most bytes of a rank"], facts["manifest_nbytes"]
    first, later = (
        sum(result.median(f"{take}: {step}") for step in STEPS if f"{take}: {step}" in result.series)
        for take in ("first take", "later take")
    )
    what = f"{num_ranks} ranks, {facts['num_regions']} regions, all new"
    first_sent = facts["first take: most bytes of a rank"]
    result.lines += [
        Line(f"{what}: bytes from each rank", "≤ 64 KiB", f"{sent:,}", "", "", verdict(sent <= MAX_RANK_NBYTES)),
        Line(f"{what}: bytes from each rank, first take", "", f"{first_sent:,}", "", "", "shown"),
        Line(f"{what}: manifest", "≤ 32 MiB", megabytes(manifest), "", "", verdict(manifest <= MAX_MANIFEST_NBYTES)),
        Line(f"{what}: rank 0 computes", "", readable(later), "", "", "shown"),
        Line(f"{what}: rank 0 computes, first take", "", readable(first), "", "", "shown"),
        Line(f"{what}: rank 0's memory for it", "", megabytes(facts["peak_rss_nbytes"]), "", "", "shown"),
    ]
    return result


class _Take:
    def __init__(self, state: State, decisions: Decisions, result: Result, name: str) -> None:
        self._state = state
        self._decisions = decisions
        self._result = result
        self._name = name
        self._sent = [0] * state.num_ranks

    @contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self._result.series.setdefault(f"{self._name}: {step}", []).append(time.perf_counter() - begin)

    def _count(self, values: list[bytes]) -> list[bytes]:
        for rank, value in enumerate(values):
            self._sent[rank] += len(value)
        return values

    def run(self) -> None:
        known: set[bytes] = set(self._decisions._trees)
        ranks = range(self._state.num_ranks)
        announcements, sums = [], []
        for rank in ranks:
            plan = self._state.plan(rank, self._name)
            announcements.append(ownership.pack_contents((chunk.digest, chunk.nbytes) for chunk in plan.chunks()))
            told = [leaf for leaf in _leaves(plan) if agreement.may_have_other_holders(leaf)]
            sums.append(agreement.pack_sums(agreement.sum_of(leaf, declared=False) for leaf in told))
        values = self._count([pack_exchange(one, other) for one, other in zip(announcements, sums, strict=True)])
        with self._timed("exchange"):
            answers = self._decisions.exchange(values)
        asked = [unpack(answer)[0] for answer in answers]
        if asked[0][0] == "lists":
            values = self._count(
                [pack_lists(one, other, each[1:]) for one, other, each in zip(announcements, sums, asked, strict=True)]
            )
            with self._timed("lists"):
                answers = self._decisions.lists(values)
        reports = []
        num_regions = 0
        for rank in ranks:
            plan = self._state.plan(rank, self._name)
            store(plan, rank)
            num_regions += sum(1 for _ in plan.chunks())
            duties = {leaf.path: Duty.OWN for leaf in _leaves(plan)}
            told = [leaf for leaf in _leaves(plan) if agreement.may_have_other_holders(leaf)]
            duties |= {
                leaf.path: Duty(number) for leaf, number in zip(told, unpack(answers[rank], 4)[1][1], strict=True)
            }
            report = assembly.report_of(plan, duties, rank)
            numbers = [0] * len(FIGURES)
            reports.append(pack_report(numbers, 0, report, announcements[rank], known))
        facts = self._result.facts
        facts["num_regions"] = num_regions
        self._count(reports)
        with self._timed("assemble"):
            tables, entries, totals, _ = self._decisions.assemble(reports, None)
        head = Head(TAKE_ID, "store", 1, None, self._state.num_ranks, reused_nbytes=0, library="1", **totals)  # type: ignore[arg-type]
        with self._timed("manifest"):
            facts["manifest_nbytes"] = len(pack_manifest(head, tables, entries))
        # rank 0 sends itself nothing
        facts[f"{self._name}: most bytes of a rank"] = max(self._sent[1:])


def _leaves(plan: TakePlan) -> list[Leaf]:
    return [leaf for leaf in plan.leaves if not isinstance(leaf.node, ContainerEntry)]


if __name__ == "__main__":
    run_part("ranks_simulated", measure)
