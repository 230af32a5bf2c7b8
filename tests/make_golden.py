"""Makes a golden store: ``python tests/make_golden.py``, once for each change of the format, never to please a test.

When to run it: when a release writes something that no earlier one wrote (another version or feature of manifests,
entries, chunk tables, codecs, records). It makes ``tests/golden/<name>`` anew, for the name given or else that of the
library's version; the stores of earlier versions stay as they are, and ``test_golden`` reads them all.

``expected.json`` beside the store says what this version saw in it, so that a later one can be compared.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import golden_states
import torch
import torch.distributed as dist
import xxhash
from launch import launch, succeed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from torchsnapshot import Snapshot, StateDict, knobs
from torchsnapshot.maintenance import collect
from torchsnapshot.manifest_view import view_of_manifest
from torchsnapshot.store.envelope import Form, ManifestFile, TableReference, pack_manifest
from torchsnapshot.store.keys import BlobKey
from torchsnapshot.store.leases import writing
from torchsnapshot.store.locate import open_root
from torchsnapshot.store.repository import Repository
from torchsnapshot.version import __version__

GOLDEN = Path(__file__).parent / "golden"
CHUNK_NBYTES = 8192
MAX_NBYTES = 300_000


def take(path: str, state: dict[str, Any], **options: Any) -> None:
    """Take a snapshot of plain dicts."""
    Snapshot.take(path, {key: StateDict(**_text_keys(value)) for key, value in state.items()}, **options)


def _text_keys(value: dict[Any, Any]) -> dict[str, Any]:
    assert all(isinstance(key, str) for key in value)
    return value


def take_on_every_rank(root: str) -> None:
    """What each process of the job does."""
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (golden_states.NUM_RANKS,))
    spread = distribute_tensor(golden_states.sharded(), mesh, [Shard(0)], src_data_rank=None)
    with knobs.override_max_chunk_size_bytes(CHUNK_NBYTES):
        Snapshot.take(
            f"{root}/ranks",
            {"app": StateDict(sharded=spread, **golden_states.of_rank(rank))},
            replicated=["app/common"],
        )


def make(root: Path) -> None:
    """Take every golden snapshot below ``root``."""
    with knobs.override_max_chunk_size_bytes(CHUNK_NBYTES):
        take(
            f"{root}/kinds",
            golden_states.kinds(),
            encoding="raw",
            user_metadata=golden_states.LARGE_USER_METADATA,
        )
        for step in (1, 2, 3):
            take(
                f"{root}/training/step_{step}",
                golden_states.training(step),
                encoding="smallest",
                user_metadata={**golden_states.USER_METADATA, "step": step},
            )
        # another generation of one that was there
        take(f"{root}/training/step_3", golden_states.training(4), encoding="smallest")
        take(f"{root}/quantized", golden_states.quantized())
        take(f"{root}/moments", golden_states.moments(), encoding="smallest")
    succeed(launch(golden_states.NUM_RANKS, take_on_every_rank, args=[str(root)]))
    with_table_blobs(root, "ranks", "tables")
    leave_records(root)


def leave_records(root: Path) -> None:
    """What gc, a removal and a verify leave in the store."""
    with knobs.override_max_chunk_size_bytes(CHUNK_NBYTES):
        take(f"{root}/removed", golden_states.training(4))
    collect(str(root))
    Snapshot(f"{root}/removed").delete()
    absent = BlobKey(bytes(16), "0" * 24, 0)
    Repository.open(open_root(str(root))).mark_damaged([str(absent)])


def with_table_blobs(root: Path, source: str, name: str) -> None:
    """Commit a snapshot once more, with its chunk tables in blobs of their own, as the format allows."""
    repository = Repository.open(open_root(str(root)))
    ref = repository.newest_committed(source)
    assert ref is not None
    manifest = ManifestFile(repository.read_manifest(ref))
    with writing(repository, name) as session:
        references = []
        for table in manifest.envelope.iter_tables(repository.read_table):
            data = table.pack()
            digest = xxhash.xxh3_128_digest(data)
            reference = TableReference(str(BlobKey(digest, session.take_id, 0, ".t")), len(data), digest)
            repository.put_blob(reference.key, data)
            references.append(reference)
        head = replace(manifest.head, take_id=session.take_id, created_ms=session.commit_time_ms())
        session.commit(pack_manifest(head, references, manifest.entries))


def describe(root: Path) -> dict[str, Any]:
    """What this version sees: for each snapshot its figures and the paths of its manifest."""
    return {
        snapshot.name: {
            "state_nbytes": snapshot.head.state_nbytes,
            "world_size": snapshot.head.world_size,
            "num_chunks": snapshot.head.num_chunks,
            "paths": list(view_of_manifest(snapshot._open().manifest)),
        }
        for snapshot in Snapshot.list(str(root))
    }


def forms_in(root: Path) -> set[str]:
    """The ways in which chunks and tables are stored in a store."""
    repository = Repository.open(open_root(str(root)))
    forms = {key.partition(".")[2] or "plain" for key, _ in repository.list_blobs()}
    for snapshot in Snapshot.list(str(root)):
        ref = repository.newest_committed(snapshot.name)
        assert ref is not None
        envelope = ManifestFile(repository.read_manifest(ref)).envelope
        for table in envelope.iter_tables(repository.read_table):
            forms |= {Form(chunk.form).name for chunk in table.iter_refs()}
    return forms


def main() -> None:
    """Make ``tests/golden/<name>``."""
    name = sys.argv[1] if len(sys.argv) > 1 else __version__
    warnings.filterwarnings("ignore", message="torch.quantize|Sparse|ComplexHalf")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "runs")
        make(root)
        for path in sorted(root.rglob("*"), reverse=True):
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        files = [path for path in root.rglob("*") if path.is_file()]
        nbytes = sum(path.stat().st_size for path in files)
        print(f"torch {torch.__version__}: {len(files)} files, {nbytes} bytes, {sorted(forms_in(root))}")
        if nbytes > MAX_NBYTES:
            raise SystemExit(f"more than {MAX_NBYTES} bytes")
        golden = GOLDEN / name
        shutil.rmtree(golden, ignore_errors=True)
        shutil.copytree(root, golden / "runs")
        text = json.dumps({"forms": sorted(forms_in(root)), "snapshots": describe(root)}, indent=1, sort_keys=True)
        (golden / "expected.json").write_text(text + "\n", encoding="utf-8")
        for folder_name, _, names in os.walk(golden):
            for each in names:
                os.chmod(Path(folder_name, each), 0o644)


if __name__ == "__main__":
    # by its name, so that the processes of the job find their function
    importlib.import_module("make_golden").main()
