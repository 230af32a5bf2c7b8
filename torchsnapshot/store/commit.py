"""The commit of a take: its manifest, the look for a dead mark, its ``.ok``, and then the older generations.

What lives here: the order of these steps and what each failure means. What doesn't: the lease (``leases``), and what
stands in a manifest.

The order, on which the proof in docs/gc.md rests: every blob is durable (the caller's word) → look for the dead mark,
only so as not to write in vain → list the snapshot's manifests → put ours under the next generation → look for the
dead mark again → put ``.ok``: the take is a success → signpost → remove the manifests that the listing showed.
"""

from __future__ import annotations

import logging

from torchsnapshot.errors import (
    CommitUnknownError,
    FormatError,
    LeaseLostError,
    ReadOnlyError,
    StoreFullError,
)
from torchsnapshot.store.clock import Clock
from torchsnapshot.store.keys import OK_SUFFIX, SIGNPOST, ManifestName
from torchsnapshot.store.liveness import is_marked_dead
from torchsnapshot.store.repository import Repository
from torchsnapshot.store.walk import SIGNPOST_BYTES, ManifestRef, manifest_folder, manifests_in

logger = logging.getLogger(__name__)

_MAX_GENERATION = 10**15 - 1


class Requests:
    """The writes of one take that must not outlive its lease.

    ``unanswered`` is set when the outcome of a write is unknown: the request may still be under way, so the lease must
    stay. On a local store no write outlives the call that made it.
    """

    def __init__(self, repository: Repository) -> None:
        self._backend = repository.backend
        self.unanswered = False

    def put(self, key: str, data: bytes) -> None:
        """``Backend.put``, remembered."""
        try:
            self._backend.put(key, data)
        except BaseException:
            self.unanswered |= not self._backend.is_local
            raise


def commit_manifest(
    repository: Repository, name: str, take_id: str, manifest: bytes, requests: Requests, clock: Clock
) -> ManifestRef:
    """Commit a take whose blobs are all durable. See the module's docstring for the order.

    Raises:
        LeaseLostError: somebody called the take dead; nothing was committed.
        CommitUnknownError: the store gave no clear answer; the manifest may or may not be committed.
        StoreError: nothing was committed.
    """
    backend = repository.backend
    if is_marked_dead(backend, take_id):
        raise _lease_lost(name, take_id)
    older = manifests_in(name, backend.list_folder(manifest_folder(name)).objects)
    highest = max((found.generation for found in [*(ref.manifest for ref in older.refs), *older.lone_oks]), default=0)
    if highest >= _MAX_GENERATION:
        raise FormatError(
            f"snapshot {name!r} in {repository.url} has a manifest of generation {highest}: no number follows"
        )
    ref = ManifestRef(name, ManifestName(highest + 1, take_id), len(manifest), clock.now(), True)
    try:
        requests.put(ref.object, manifest)
    except Exception:
        # without its .ok it is no commit, and whatever of it has landed is only in the way
        _discard(repository, ref)
        raise
    _check_alive_after(repository, ref)
    _put_ok(repository, ref, requests)
    _tidy(repository, ref, older.refs)
    return ref


def _lease_lost(name: str, take_id: str) -> LeaseLostError:
    return LeaseLostError(
        f"a collector called the take {take_id} of {name or 'ROOT'!r} dead (its heartbeat was not seen for an hour, or "
        "its process was thought to be gone): nothing was committed, take the snapshot again"
    )


def _check_alive_after(repository: Repository, ref: ManifestRef) -> None:
    """The check that decides: a collector that called this take dead before now may not have seen its manifest."""
    take_id = ref.manifest.take_id
    try:
        dead = is_marked_dead(repository.backend, take_id)
    except Exception as error:
        raise _unknown(repository, ref, "whether the take was called dead", error) from error
    if not dead:
        return
    _discard(repository, ref)
    raise _lease_lost(ref.name, take_id)


def _put_ok(repository: Repository, ref: ManifestRef, requests: Requests) -> None:
    key = ref.object + OK_SUFFIX
    try:
        requests.put(key, b"")
    except Exception as error:
        if repository.backend.is_local:
            if isinstance(error, (StoreFullError, ReadOnlyError)):
                # a local store has refused it before anything was written: the manifest goes too
                _discard(repository, ref)
                raise
            # seen or not, it may be lost with the next power failure: what failed may have been its fsync
            raise _unknown(repository, ref, "whether it is committed for good", error) from error
        try:
            repository.backend.stat(key)
        except Exception:
            raise _unknown(repository, ref, "whether it is committed", error) from error
        # the answer was lost, the .ok was not
        logger.info("the answer to the commit of %r in %s was lost, but it is there", ref.name, repository.url)


def _discard(repository: Repository, ref: ManifestRef) -> None:
    """Remove our own manifest. If that fails, it stays an uncommitted one: no reader opens it, gc reports it."""
    try:
        repository.delete_manifest_files([ref])
    except Exception as error:
        logger.warning("could not remove the uncommitted manifest %s in %s: %s", ref.object, repository.url, error)


def _unknown(repository: Repository, ref: ManifestRef, what: str, error: Exception) -> CommitUnknownError:
    return CommitUnknownError(
        f"the store {repository.url} gave no clear answer {what}: snapshot {ref.name or 'ROOT'!r}, take "
        f"{ref.manifest.take_id} ({type(error).__name__}: {error}). Look again when the store can be reached: if "
        f"{ref.object}{OK_SUFFIX} is there, the snapshot is committed"
    )


def _tidy(repository: Repository, ref: ManifestRef, older: list[ManifestRef]) -> None:
    """What follows a success; none of it can make the take a failure."""
    signpost = f"{ref.name}/{SIGNPOST}" if ref.name else SIGNPOST
    try:
        repository.backend.put(signpost, SIGNPOST_BYTES)
    except Exception as error:
        logger.warning(
            "snapshot %r is committed, but its signpost %s could not be written: %s", ref.name, signpost, error
        )
    try:
        repository.delete_manifest_files(older)
    except Exception as error:
        logger.warning("snapshot %r is committed, but an older generation could not be removed: %s", ref.name, error)
