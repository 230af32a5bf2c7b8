"""What planning a state once has shown about every state that is made like it: the way for the next take.

What lives here: ``Structure``, kept between takes, and the short ways to a plan. What doesn't: planning
itself (``plan``), packing (``section``): what is done here gives the same, only with less work for each tensor; reading
a state into the frame of the last one (``state.skeleton``).

A state has the same structure as another one if it has the same paths in the same order, equal containers, and tensors
of the same class, dtype, shape, strides and device, with the same wrappers. Then the same cells, chunks and table rows
come out; what differs is addresses and content.

There are two ways. ``plan`` takes any nodes, and compares them one by one. ``plan_settled`` takes what was read into
the skeleton of the last state: there each tensor of the host whose bytes are what the last take stored keeps the leaf
that this take left, which is settled: without memory, and with the places of its chunks. The smallest are compared
here; of larger ones it says what is ``expected``, and workers compare it.

Invariant: nothing here keeps a tensor or its memory alive. A settled leaf is used only while this process's knowledge
of the store is what it was when the take committed that left it (``Known.origin``), and after a look whether all blobs
that such leaves name may be reused.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count, repeat
from typing import Any

from torchsnapshot.chunks.reader import digest_of
from torchsnapshot.format.entries import ContainerEntry
from torchsnapshot.pauses import collector_paused
from torchsnapshot.recent import Recent
from torchsnapshot.state.flatten import Node, OnOpaque
from torchsnapshot.state.live_digests import Look
from torchsnapshot.state.skeleton import Reading, Skeleton
from torchsnapshot.store.envelope import ChunkRef
from torchsnapshot.store.known import Known
from torchsnapshot.taking.expected import Expected, ExpectedChunk, ExpectedLeaf
from torchsnapshot.taking.history import place_of
from torchsnapshot.taking.plan import (
    Chunk,
    Leaf,
    Previous,
    TakePlan,
    plan_of_leaves,
)
from torchsnapshot.taking.section import Packer
from torchsnapshot.taking.signatures import signature_of
from torchsnapshot.taking.templates import Columns, Template

_RAW = operator.attrgetter("raw")


@dataclass(frozen=True, slots=True)
class _Settled:
    """What a committed take has left: its leaves, a chunk of every blob that they name, and what it knew of these."""

    take_id: str
    origin: object
    leaves: list[Leaf]
    samples: list[ChunkRef]


class Structure:
    """What one plan has shown. Any thread may use it.

    Args:
        paths: of the leaves, in their order.
        templates: of the leaves.
        sizes: the sizes of chunks that were planned with.
        plan: the plan.
    """

    def __init__(self, paths: list[str], templates: list[Template], sizes: tuple[int, int], plan: TakePlan) -> None:
        self._paths = paths
        self._templates = templates
        self._sizes = sizes
        self._chunked_nbytes = plan.chunked_nbytes
        self._num_groups = len(plan.groups)
        self._skeleton: Skeleton | None = None
        self._columns: Columns | None = None
        self._settled: _Settled | None = None
        packer = Packer()
        self.pack = packer.pack
        self.pack_body = packer.pack_body

    @classmethod
    @collector_paused()
    def of(cls, plan: TakePlan, chunk_nbytes: int, small_nbytes: int) -> Structure | None:
        """The structure of a state that was planned so; None where it has leaves of kinds that are always planned anew.

        Args:
            plan: made of the state by ``plan_take``.
            chunk_nbytes: as ``plan_take`` was given it.
            small_nbytes: as ``plan_take`` was given it.
        """
        groups = {id(chunk): number for number, group in enumerate(plan.groups) for chunk in group}
        templates = []
        for leaf in plan.leaves:
            signature = signature_of(leaf.node)
            if signature is None:
                return None
            view = None if leaf.view is None else leaf.view.bare()
            pieces = tuple([chunk.piece for chunk in leaf.chunks])
            packs = tuple([groups.get(id(chunk)) for chunk in leaf.chunks])
            templates.append(Template(signature, view, leaf.cell, pieces, packs, leaf.inline is not None))
        return cls([leaf.path for leaf in plan.leaves], templates, (chunk_nbytes, small_nbytes), plan)

    @property
    def skeleton(self) -> Skeleton | None:
        """What the next state is to be read into."""
        return self._skeleton

    @skeleton.setter
    def skeleton(self, skeleton: Skeleton) -> None:
        self._settled = None
        self._columns = Columns(skeleton, self._templates)
        self._skeleton = skeleton

    @collector_paused()
    def plan(
        self, nodes: Mapping[str, Node], previous: Previous, chunk_nbytes: int, small_nbytes: int
    ) -> TakePlan | None:
        """What ``plan_take`` would give; None where the state has another structure."""
        if (chunk_nbytes, small_nbytes) != self._sizes or list(nodes) != self._paths:
            return None
        leaves = []
        for (path, node), template in zip(nodes.items(), self._templates, strict=True):
            if signature_of(node) != template.signature:
                return None
            needs_place = not (template.is_inline or isinstance(node, ContainerEntry))
            leaf = template.leaf(path, node, previous.at(path) if needs_place else None)
            if leaf is None:
                return None
            leaves.append(leaf)
        return plan_of_leaves(leaves, small_nbytes)

    @collector_paused()
    def plan_settled(
        self, reading: Reading, take_id: str | None, known: Known, look: Look, sizes: tuple[int, int]
    ) -> tuple[TakePlan, Expected] | None:
        """The plan of a state that was read into the skeleton: leaves where nothing has changed are settled ones.

        Args:
            reading: the state.
            take_id: the snapshot that this process last took or restored.
            known: what this take may reuse.
            look: what is known of memory.
            sizes: of chunks and of small chunks, as ``plan_take`` is given them.

        Returns:
            The plan, and what is to be looked at before its settled leaves may be relied on. None where the state must
            be planned in another way.
        """
        settled, columns = self._settled, self._columns
        if settled is None or columns is None or reading.skeleton is not self._skeleton or sizes != self._sizes:
            return None
        if take_id != settled.take_id or known.origin is not settled.origin or not known.may_reuse(settled.samples):
            return None
        if any(signature_of(node) != self._templates[number].signature for number, node in reading.others):
            return None
        leaves = list(settled.leaves)
        if not _take_inline(reading, columns, leaves):
            return None
        changed = _take_hashed(reading, columns, leaves)
        expected = self._expected(reading, columns, leaves, look)
        if changed is None or expected is None:
            return None
        numbers = reading.skeleton.numbers
        # of leaves that changed last time most chunks will differ: they are copied first and hashed then
        moving = [column for column, chunks in zip(columns.expected, expected, strict=True) if chunks is None]
        fresh = dict(reading.others)
        fresh.update((numbers[column], reading.leaf(column)) for column in (*changed, *moving, *columns.others))
        for number, node in fresh.items():
            leaf = self._fresh(number, node, settled.leaves[number])
            if leaf is None:
                return None
            leaves[number] = leaf
        for column in changed:
            # that it differs from what was there needs no other look
            leaves[numbers[column]].chunks[0].changed_last_time = True
        inline_nbytes = columns.inline_nbytes + sum(len(leaves[number].inline or b"") for number in fresh)
        still = {number: each for number, each in zip(columns.expected_numbers, expected, strict=True) if each}
        return self._plan_of(leaves, sorted(fresh), still, inline_nbytes)

    def _expected(
        self, reading: Reading, columns: Columns, leaves: list[Leaf], look: Look
    ) -> list[list[ExpectedChunk] | None] | None:
        """The chunks of larger tensors whose bytes are likely to be what the last take stored; None in place of others.

        In ``leaves``, what changed last time and has not been written since becomes a settled leaf again.

        Returns:
            None where their memory cannot be read.
        """
        buffers = columns.expected_buffers
        addresses = buffers.addresses(reading.memory)
        if addresses is None:
            return None
        extents = list(zip(addresses, columns.expected_sizes, strict=True))
        digests = look.digests(extents)
        found: list[list[ExpectedChunk] | None] = []
        end = 0
        for column, number in zip(columns.expected, columns.expected_numbers, strict=True):
            last = leaves[number]
            begin, end = end, end + len(last.chunks)
            are_unwritten = [
                digest is not None and digest == chunk.previous
                for digest, chunk in zip(digests[begin:end], last.chunks, strict=True)
            ]
            if any(chunk.changed_last_time for chunk in last.chunks):
                if not all(are_unwritten):
                    found.append(None)
                    continue
                # what has changed last time has not changed this time
                leaves[number] = last.settled(last.view)
            renew = partial(self._renewed, reading, column, number, last)
            leaf = ExpectedLeaf(leaves, number, reading.memory.storages[column], renew)
            mine = map(buffers.at, range(begin, end), addresses[begin:end])
            refs = [chunk.ref for chunk in last.chunks if chunk.ref is not None]
            found.append(list(map(ExpectedChunk, repeat(leaf), count(), extents[begin:end], mine, refs, are_unwritten)))
        return found

    def _renewed(self, reading: Reading, column: int, number: int, last: Leaf) -> Leaf:
        """What takes the place of a settled leaf that turns out to be another one now."""
        leaf = self._fresh(number, reading.held_leaf(column), last)
        if leaf is None:
            raise AssertionError(f"{last.path} was cut otherwise by the very take that has left it")
        return leaf

    def _fresh(self, number: int, node: Node, last: Leaf) -> Leaf | None:
        """One leaf that is not settled, planned after its template."""
        template = self._templates[number]
        return template.leaf(last.path, node, place_of(last) if template.pieces else None)

    def _plan_of(
        self, leaves: list[Leaf], fresh: Sequence[int], still: Mapping[int, list[ExpectedChunk]], inline_nbytes: int
    ) -> tuple[TakePlan, Expected]:
        """The plan of these leaves.

        Args:
            leaves: all of them.
            fresh: the numbers of those that are not settled, in their order.
            still: the chunks of those of which the same bytes are expected, by their numbers, in their order.
            inline_nbytes: of all leaves.
        """
        large: list[Chunk] = []
        expected = Expected()
        groups: list[list[Chunk | ExpectedChunk]] = [[] for _ in range(self._num_groups)]
        for number in sorted((*fresh, *still)):
            chunks: Sequence[Chunk | ExpectedChunk] = still.get(number, leaves[number].chunks)
            for chunk, group in zip(chunks, self._templates[number].groups, strict=True):
                if isinstance(chunk, ExpectedChunk) and chunk.is_unwritten:
                    expected.unwritten.append(chunk)
                elif group is not None:
                    groups[group].append(chunk)
                elif isinstance(chunk, Chunk):
                    large.append(chunk)
                else:
                    expected.large.append(chunk)
        work = []
        for members in filter(None, groups):
            planned = [chunk for chunk in members if isinstance(chunk, Chunk)]
            if len(planned) == len(members):
                work.append(planned)
            else:
                expected.groups.append(members)
        state_nbytes = self._chunked_nbytes + inline_nbytes
        plan = TakePlan(leaves, large, work, state_nbytes, self._chunked_nbytes, self._sizes[1])
        return plan, expected

    @collector_paused()
    def settle(self, plan: TakePlan, take_id: str, known: Known) -> list[Leaf] | None:
        """Take in what a take of this structure has committed.

        Args:
            plan: the take's, all chunks stored.
            take_id: the take's id.
            known: what the take might reuse.

        Returns:
            The leaves, all settled; None where they aren't kept.
        """
        columns, last = self._columns, self._settled
        if columns is None or known.origin is None:
            return None
        before = plan.leaves if last is None else last.leaves
        leaves = [
            _settled(leaf, old, template)
            for leaf, old, template in zip(plan.leaves, before, self._templates, strict=True)
        ]
        # another take, begun later, may have committed since this one was planned: then these are not its leaves
        if last is not None and all(map(operator.is_, leaves, last.leaves)):
            samples = last.samples
        else:
            # of what is reused without a look at each of their blobs
            refs = [leaves[number].chunks[0].ref for number in columns.hashed_numbers]
            samples = list({ref.key: ref for ref in refs if ref is not None}.values())
        self._settled = _Settled(take_id, known.origin, leaves, samples)
        return leaves


def _settled(leaf: Leaf, last: Leaf, template: Template) -> Leaf:
    """What a leaf leaves; ``last`` is what the take before has left of it, if that is settled."""
    if leaf.is_settled:
        return leaf
    if last.is_settled and not leaf.chunks and leaf.view is None:
        # of a value that stands in the manifest nothing is left
        return last
    return leaf.settled(template.view)


def _take_hashed(reading: Reading, columns: Columns, leaves: list[Leaf]) -> list[int] | None:
    """Compare the chunks of small tensors with the last take: the columns of those that differ.

    Returns:
        None where their memory cannot be read.
    """
    buffers = columns.hashed_buffers.over(reading.memory)
    if buffers is None:
        return None
    changed = []
    for column, number, digest in zip(columns.hashed, columns.hashed_numbers, map(digest_of, buffers), strict=True):
        leaf = leaves[number]
        chunk = leaf.chunks[0]
        if digest != chunk.previous:
            changed.append(column)
        elif chunk.changed_last_time:
            leaves[number] = leaf.settled(leaf.view)
    return changed


def _take_inline(reading: Reading, columns: Columns, leaves: list[Leaf]) -> bool:
    """Put the content of small tensors into the leaves, where it has changed."""
    buffers = columns.inline_buffers.over(reading.memory)
    if buffers is None:
        return False
    numbers = reading.skeleton.numbers
    for column, data in zip(columns.inline, map(_RAW, buffers), strict=True):
        number = numbers[column]
        leaf = leaves[number]
        if data != leaf.inline:
            leaves[number] = Leaf(leaf.path, leaf.node, leaf.view, leaf.cell, [], data, is_settled=True)
    return True


_structures: Recent[str, Structure] = Recent()


def read(states: Mapping[str, Any], on_opaque: OnOpaque) -> Reading | None:
    """Read a state into the skeleton of one that this process has taken; None where none of them fits.

    Args:
        states: what the objects' ``state_dict`` returned, by key.
        on_opaque: told of each value that is pickled.
    """
    seen: list[Skeleton] = []
    for _, known in reversed(_structures.items()):
        skeleton = known.skeleton
        if skeleton is None or any(skeleton is each for each in seen):
            continue
        reading = skeleton.read(states, on_opaque)
        if reading is not None:
            return reading
        seen.append(skeleton)
    return None


def recall(store_id: str) -> Structure | None:
    """The structure of the state that this process last took into the store."""
    return _structures.get(store_id)


def remember(store_id: str, structure: Structure | None) -> None:
    """Keep the structure of a state for its next take."""
    if structure is None:
        _structures.pop(store_id)
    else:
        _structures.put(store_id, structure)


def forget() -> None:
    """Drop all memory, as a new process would begin."""
    _structures.clear()
