"""Small chunks that keep a mostly dead pack alive move to a new one, so that gc can free the old one.

What lives here: which chunks of a finished take move, and the move itself: read them from the store, put them
together. What doesn't: packs of new chunks (``take_jobs``), how bytes are stored and proved (``chunks.writer``,
``chunks.reader``).

Invariants: what a take commits refers to no pack of which less than one part in ``PACK_LIVE_SHARE`` is live for it,
unless the state is exactly that of the snapshot before: then nothing moves, whatever its packs look like. What moves
is read from the store and proved there, as live memory may have changed since it was staged. A move that fails costs
space, not the take: the chunks stay where they are.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from torchsnapshot import knobs
from torchsnapshot.chunks.reader import ChunkReader
from torchsnapshot.chunks.writer import ChunkWriter
from torchsnapshot.engine.groups import grouped
from torchsnapshot.engine.pipeline import submit
from torchsnapshot.geometry.grid import Box, Piece
from torchsnapshot.pauses import collector_paused
from torchsnapshot.reading.read_jobs import Counters, Share, Sink, Wanted, read_jobs
from torchsnapshot.reading.reads import BytesMemory
from torchsnapshot.stats import Stats
from torchsnapshot.store.envelope import ChunkRef
from torchsnapshot.store.repository import Repository
from torchsnapshot.taking.plan import GROUP_NBYTES, Chunk, Leaf, TakePlan

logger = logging.getLogger(__name__)

PACK_LIVE_SHARE = 4
"""A small chunk is written again when less than one part in this many of its pack is live for the take."""


@collector_paused()
def lonely_chunks(plan: TakePlan) -> list[Chunk]:
    """The chunks of a finished plan whose packs are hardly used by it. Settled leaves among them become the plan's own.

    A plan that found everything as the last take left it has none: then nothing moves.
    """
    if plan.is_settled:
        return []
    packs: dict[str, list[tuple[int, int, ChunkRef]]] = {}
    for number, leaf in enumerate(plan.leaves):
        for index, chunk in enumerate(leaf.chunks):
            ref = chunk.ref
            if ref is not None and chunk.nbytes < plan.small_nbytes and ref.stored_nbytes < ref.blob_nbytes:
                packs.setdefault(ref.key, []).append((number, index, ref))
    lonely: list[Chunk] = []
    for members in packs.values():
        live_nbytes = sum({ref.offset: ref.stored_nbytes for _, _, ref in members}.values())
        if live_nbytes * PACK_LIVE_SHARE < members[0][2].blob_nbytes:
            lonely.extend(_own(plan, number).chunks[index] for number, index, _ in members)
    return lonely


def _own(plan: TakePlan, number: int) -> Leaf:
    """A leaf of the plan, its own copy where other takes share it."""
    leaf = plan.leaves[number]
    if leaf.is_settled:
        chunks = [replace(chunk) for chunk in leaf.chunks]
        leaf = plan.leaves[number] = replace(leaf, chunks=chunks, is_settled=False)
    return leaf


def move(chunks: Sequence[Chunk], repository: Repository, writer: ChunkWriter) -> None:
    """Put these chunks together in new packs; each gets its new place.

    Args:
        chunks: small chunks that a take under a lease has found in the store.
        repository: the store.
        writer: the take's.
    """
    once = list({(chunk.ref.digest, chunk.nbytes): chunk for chunk in chunks if chunk.ref is not None}.values())
    moved: dict[tuple[bytes, int], ChunkRef] = {}
    try:
        for group in grouped(once, GROUP_NBYTES):
            for ref in _move_group(group, repository, writer):
                moved[ref.digest, ref.nbytes] = ref
    except RuntimeError as error:
        # errors of this library among them
        logger.warning("small chunks stay in packs that are hardly used in %s: %s", repository.url, error)
    for chunk in chunks:
        if chunk.ref is not None:
            chunk.ref = moved.get((chunk.ref.digest, chunk.nbytes), chunk.ref)


def _move_group(group: Sequence[Chunk], repository: Repository, writer: ChunkWriter) -> list[ChunkRef]:
    memory = BytesMemory(sum(chunk.nbytes for chunk in group))
    wanted: list[tuple[ChunkRef, Wanted]] = []
    members: list[tuple[bytes, memoryview, int]] = []
    offset = 0
    for chunk in group:
        assert chunk.ref is not None
        piece = Piece(Box((offset,), (chunk.nbytes,)), offset, chunk.nbytes)
        wanted.append((chunk.ref, [(Sink(chunk.path, memory), Share.whole(piece))]))
        members.append((chunk.ref.digest, memoryview(memory.data)[offset : offset + chunk.nbytes], chunk.width))
        offset += chunk.nbytes
    submit(
        read_jobs(wanted, ChunkReader(repository), Counters(Stats())),
        num_workers=knobs.get_num_workers(repository.backend.concurrency),
        budget=knobs.get_memory_budget_bytes(),
    ).wait()
    return writer.put_pack(members)
