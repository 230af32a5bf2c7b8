"""What a take may reuse: section "evidence" of the gc protocol, in code.

What lives here: building the index from committed manifests after the take's lease, dropping what a collector has
condemned, and the proof that a blob is really there. What doesn't: the lease and the reading of the condemned sets
(``leases``), the index itself (``index``).

Invariants: a key is reused only if (1) a manifest that has its ``.ok``, or a take of this process that reported
success, names it; (2) no condemned set of step 2 holds it or a base of it; (3) its blob was seen with the stored
size: on a local store by a stat after this take's lease, elsewhere by a listing made after the lease of the take that
filled the index, at most one hour old. Nothing here is trusted across a finished sweep: the index is tagged with the
sweeps that its filling take saw.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

from torchsnapshot.errors import SnapshotError
from torchsnapshot.recent import Recent
from torchsnapshot.store.envelope import ChunkRef, ManifestFile
from torchsnapshot.store.index import Index
from torchsnapshot.store.leases import Evidence
from torchsnapshot.store.repository import ManifestRef, Repository

logger = logging.getLogger(__name__)

MAX_MANIFESTS = 16
MAX_MANIFESTS_NBYTES = 64 << 20
"""How many of the newest manifests, and how many bytes of them, a new process reads to learn what the store holds."""

BATCH_LENGTH = 16
"""How many blobs are looked for at once: a fraction of a millisecond on a local disk."""

LISTING_SECONDS = 3600.0
"""How long a listing of the blobs proves that they are there, on stores where a stat is not cheap."""


@dataclass(slots=True)
class Filled:
    """An index with the evidence behind it, kept by the process between takes.

    ``take_ids``: the takes whose contents it holds, and those that were looked for in vain.
    """

    index: Index
    sweeps: frozenset[str]
    newest: bytes | None
    take_ids: set[str]
    seen: dict[str, int] = field(default_factory=dict)
    seen_at: float = 0.0


_filled: Recent[tuple[str, str], Filled] = Recent()
"""By (ROOT, store id): a ROOT that was copied has the id of the one that it was copied from, and other blobs."""


def forget() -> None:
    """Drop all indices, as a new process would begin."""
    _filled.clear()


class Known:
    """The contents that one take may reuse."""

    def __init__(self, repository: Repository, filled: Filled | None, condemned: frozenset[str]) -> None:
        self._repository = repository
        self._filled = filled
        self._condemned = condemned
        self._present: dict[str, bool] = {}

    @property
    def newest(self) -> bytes | None:
        """The manifest with the greatest commit time among those that were read."""
        return self._filled.newest if self._filled else None

    @property
    def origin(self) -> object:
        """What this knowledge comes from: another object after each finished sweep, None where nothing is known."""
        return self._filled

    def lookup(self, digest: bytes, nbytes: int) -> ChunkRef | None:
        """Where this content is stored, if it may be reused."""
        if self._filled is None:
            return None
        ref = self._filled.index.lookup(digest, nbytes)
        return ref if ref is not None and self._may_reuse(ref) else None

    def may_reuse(self, refs: Iterable[ChunkRef]) -> bool:
        """Whether all of these chunks may be reused.

        Args:
            refs: chunks that a take of this process has committed, and that were known then or put by it; its knowledge
                was of the same ``origin``. Of the chunks of one pack without bases, one is enough.
        """
        if self._filled is None:
            return False
        index = self._filled.index
        return not any(index.is_dropped(ref) or not self._may_reuse(ref) for ref in refs)

    def look_for(self, refs: Iterable[ChunkRef], goes_on: Callable[[], bool] = lambda: True) -> None:
        """See which blobs of these chunks are there, many at once where that is cheaper than one by one.

        Args:
            refs: chunks that may be asked about soon, by other threads at the same time too.
            goes_on: asked before each batch; once it says no, the rest is left to who asks.
        """
        links = (link for ref in refs for link in _links(ref))
        while goes_on():
            batch = list(islice(links, BATCH_LENGTH))
            if not batch:
                return
            wanted = {link.key: link for link in batch if link.key not in self._present}
            for key, nbytes in self._repository.blob_sizes(wanted).items():
                self._present[key] = nbytes == wanted[key].blob_nbytes

    def _may_reuse(self, ref: ChunkRef) -> bool:
        return all(link.key not in self._condemned and self._is_present(link) for link in _links(ref))

    def _is_present(self, ref: ChunkRef) -> bool:
        present = self._present.get(ref.key)
        if present is None:
            if self._repository.backend.is_local:
                nbytes = self._repository.blob_nbytes(ref.key)
            else:
                assert self._filled is not None
                nbytes = self._filled.seen.get(ref.key)
            present = self._present[ref.key] = nbytes == ref.blob_nbytes
        return present

    def learn(self, refs: Iterable[ChunkRef], take_id: str | None = None) -> None:
        """Take in what a take of this process has committed. Called only after its ``.ok`` was put.

        Args:
            refs: what it has put.
            take_id: given where all else that its manifest names was known before.
        """
        if self._filled is None:
            return
        for ref in refs:
            self._filled.index.add(ref)
            self._filled.seen[ref.key] = ref.blob_nbytes
        if take_id is not None:
            self._filled.take_ids.add(take_id)


def _links(ref: ChunkRef) -> Iterator[ChunkRef]:
    """A chunk and its bases."""
    link: ChunkRef | None = ref
    while link is not None:
        yield link
        link = link.base


def known_for_take(
    repository: Repository,
    evidence: Evidence,
    last_take_id: str | None,
    clock: Callable[[], float] = time.monotonic,
) -> Known:
    """Find out what a take may reuse. Called after its lease and its reading of the condemned sets.

    Args:
        repository: the store.
        evidence: what step 2 of the take read.
        last_take_id: the snapshot that this process last took or restored; it counts as one of the newest.
        clock: seconds, monotonic.
    """
    if not evidence.usable:
        logger.info("a condemned set of %s could not be read: this take reuses nothing", repository.url)
        return Known(repository, None, frozenset())
    place = (repository.url, repository.store_id)
    filled = _filled.get(place)
    # a snapshot that was restored may be of another process, or older than what was read
    knows_last = filled is not None and (last_take_id is None or last_take_id in filled.take_ids)
    if filled is None or filled.sweeps != evidence.sweeps or not knows_last:
        filled = _fill(repository, evidence, last_take_id)
        filled.seen_at = float("-inf")
        # only what is new: another take may have put a newer one, from which more was dropped
        _filled.put(place, filled)
    if not repository.backend.is_local and clock() - filled.seen_at > LISTING_SECONDS:
        started = clock()
        filled.seen = dict(repository.list_blobs())
        filled.seen_at = started
    # for good, not only for this take: the set may go while its collector still deletes, and then no later take of this
    # process finds it, though the sweeps are those that the index is tagged with (docs/gc.md, "The argument")
    filled.index.drop(evidence.condemned)
    return Known(repository, filled, evidence.condemned)


def _fill(repository: Repository, evidence: Evidence, last_take_id: str | None) -> Filled:
    """Read the newest committed manifests into a new index."""
    index = Index()
    take_ids = set() if last_take_id is None else {last_take_id}
    newest: bytes | None = None
    newest_ms = -1
    budget = MAX_MANIFESTS_NBYTES
    for number, ref in enumerate(_newest(repository, last_take_id)):
        budget -= ref.nbytes
        if number and (number >= MAX_MANIFESTS or budget < 0):
            break
        try:
            data = repository.read_manifest(ref)
            manifest = ManifestFile(data)
            index.add_envelope(manifest.envelope, repository.read_table)
            take_ids.add(manifest.head.take_id)
            if manifest.head.created_ms > newest_ms:
                newest, newest_ms = data, manifest.head.created_ms
        except SnapshotError as error:
            # a hint that cannot be read costs sharing, not the take; verify and gc report it
            logger.info("manifest %s of %r is not used for sharing: %s", ref.manifest, ref.name, error)
    return Filled(index, evidence.sweeps, newest, take_ids)


def _newest(repository: Repository, last_take_id: str | None) -> list[ManifestRef]:
    """Committed manifests, the one this process knows first, then the newest by the store's clock."""
    refs = [ref for ref in repository.walk().refs if ref.committed]
    refs.sort(key=lambda ref: (ref.manifest.take_id == last_take_id, ref.modified, ref.manifest), reverse=True)
    return refs


# another thread may hold an index's lock when the process forks
os.register_at_fork(after_in_child=forget)
