"""The commands that only look: ls, show, diff, du. Each parses, calls and prints, nothing else."""

from __future__ import annotations

import argparse
import fnmatch
from dataclasses import asdict, replace
from typing import Any

from torchsnapshot.cli.options import Commands, add_command
from torchsnapshot.cli.output import (
    iso_time,
    nothing_below,
    plural,
    print_error,
    print_json,
    print_table,
    printable,
    progress_bar,
    readable_nbytes,
    readable_time,
    shown,
)
from torchsnapshot.diff import compare, is_user_metadata
from torchsnapshot.errors import SnapshotNotFoundError
from torchsnapshot.format.entries import (
    ContainerEntry,
    Entry,
    OpaqueEntry,
    ShardedTensorEntry,
    StoredManifest,
    TensorEntry,
    ValueEntry,
    spans_of,
)
from torchsnapshot.reading.opening import list_below, open_below, open_snapshot, user_metadata_beside_head
from torchsnapshot.state import values
from torchsnapshot.store.envelope import ChunkRef, Head
from torchsnapshot.store.usage import measure_usage

_VALUE_WIDTH = 48
"""Characters of a value that ``show`` prints."""


def add_commands(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add ls, show, diff and du."""
    parser = add_command(commands, "ls", "list the snapshots of a root, oldest first", run_ls)
    parser.add_argument("root", help="a folder or URL that holds snapshots")

    parser = add_command(commands, "show", "show what a snapshot holds: every path with type, shape and size", run_show)
    parser.add_argument("path", help="a snapshot")
    parser.add_argument("pattern", nargs="*", help="only paths that match one of these globs, as in '0/model/*'")
    parser.add_argument("--digests", action="store_true", help="list every chunk with its digest and its blob")

    parser = add_command(
        commands, "diff", "show which paths differ between two snapshots, in chunks and bytes", run_diff
    )
    parser.add_argument("before", help="a snapshot")
    parser.add_argument("after", help="a snapshot, of the same store or another")
    parser.add_argument("--exit-code", action="store_true", help="exit with 1 if anything differs")

    parser = add_command(commands, "du", "show how much space each snapshot takes, alone and shared", run_du)
    parser.add_argument("root", help="a folder or URL that holds snapshots")


def run_ls(options: argparse.Namespace) -> int:
    """``torchsnapshot ls ROOT``."""
    repository, found = list_below(options.root, options.storage_options)
    snapshots = [info for _, info in found]
    if not snapshots and open_below(options.root, options.storage_options)[1]:
        raise SnapshotNotFoundError(nothing_below(options.root, repository))
    if options.json:
        print_json({"root": repository.url, "snapshots": [{"name": s.name, **_head(s.head)} for s in snapshots]})
        return 0
    if not snapshots:
        print_error(f"no snapshots in {repository.url}")
        return 0
    rows = [
        (
            info.name or ".",
            readable_time(info.head.created_ms),
            readable_nbytes(info.head.state_nbytes),
            readable_nbytes(info.head.new_nbytes),
            readable_nbytes(info.head.stored_nbytes),
            f"{info.head.num_new_chunks:,}/{info.head.num_chunks:,}",
        )
        for info in snapshots
    ]
    print_table(("snapshot", "taken", ">state", ">new", ">stored", ">new chunks"), rows)
    return 0


def _head(head: Head) -> dict[str, Any]:
    """A head as JSON shows it."""
    return {**asdict(head), "created": iso_time(head.created_ms)}


def run_show(options: argparse.Namespace) -> int:
    """``torchsnapshot show PATH [GLOB ...]``."""
    opened = open_snapshot(options.path, options.storage_options)
    manifest = opened.manifest
    beside = user_metadata_beside_head(manifest)
    head = replace(manifest.head, user_metadata=beside) if beside else manifest.head
    entries = {
        path: entry
        for path, entry in manifest.entries.items()
        if not is_user_metadata(path)
        and (not options.pattern or any(fnmatch.fnmatchcase(path, pattern) for pattern in options.pattern))
    }
    if options.pattern and not entries:
        raise SnapshotNotFoundError(
            f"{options.path}: no path matches {', '.join(map(repr, options.pattern))}; paths begin with a rank, as in "
            "'0/model/*'"
        )
    if options.json:
        shown = {path: _describe(manifest, entry, options.digests) for path, entry in entries.items()}
        print_json({"path": options.path, "name": opened.name, "head": _head(head), "entries": shown})
        return 0
    _print_head(options.path, head)
    rows: list[tuple[str, str, str, str]] = []
    for path, entry in entries.items():
        if isinstance(entry, ContainerEntry):
            continue
        rows.append((path, _kind(entry), _shape_or_value(entry), readable_nbytes(entry.nbytes)))
        if options.digests:
            rows += [
                ("  " + ref.digest.hex(), "chunk", ref.key, readable_nbytes(ref.nbytes))
                for ref in _refs(manifest, entry)
            ]
    print_table(("path", "type", "shape or value", ">size"), rows)
    return 0


def _print_head(path: str, head: Head) -> None:
    taken = f"taken {readable_time(head.created_ms)} by torchsnapshot {head.library}"
    print(f"{printable(path)}: {taken}, take {head.take_id}")
    print(
        f"state {readable_nbytes(head.state_nbytes)} in {plural(head.num_chunks, 'chunk')};"
        f" new {readable_nbytes(head.new_nbytes)}, stored as {readable_nbytes(head.stored_nbytes)}"
        f" in {plural(head.num_blobs, 'blob')}"
    )
    for key, value in head.user_metadata.items():
        print(printable(f"{key}: {value if isinstance(value, str) else shown(value)}"))
    print()


def _refs(manifest: StoredManifest, entry: Entry) -> list[ChunkRef]:
    return [ref for span in spans_of(entry) for ref in manifest.refs(span)]


def _kind(entry: Entry) -> str:
    if isinstance(entry, (TensorEntry, ShardedTensorEntry)):
        return entry.dtype
    if isinstance(entry, OpaqueEntry):
        return "pickle"
    return entry.kind if isinstance(entry, ContainerEntry) else "value"


def _shape_or_value(entry: Entry) -> str:
    if isinstance(entry, (TensorEntry, ShardedTensorEntry)):
        return "x".join(map(str, entry.shape)) or "scalar"
    if isinstance(entry, OpaqueEntry):
        return entry.type_name
    if isinstance(entry, ContainerEntry) or entry.data is None:
        return ""
    text = shown(_decoded(entry))
    return text if len(text) <= _VALUE_WIDTH else text[: _VALUE_WIDTH - 3] + "..."


def _decoded(entry: ValueEntry) -> object:
    return None if entry.data is None else values.decode(entry.data)


def _describe(manifest: StoredManifest, entry: Entry, digests: bool) -> dict[str, Any]:
    """An entry as JSON shows it."""
    if isinstance(entry, ContainerEntry):
        return {"kind": entry.kind, "keys": list(entry.keys)}
    described: dict[str, Any] = {
        "kind": "tensor" if isinstance(entry, (TensorEntry, ShardedTensorEntry)) else _kind(entry),
        "nbytes": entry.nbytes,
    }
    if isinstance(entry, (TensorEntry, ShardedTensorEntry)):
        described |= {"dtype": entry.dtype, "shape": list(entry.shape), "requires_grad": entry.requires_grad}
    elif isinstance(entry, OpaqueEntry):
        described["type_name"] = entry.type_name
    elif entry.data is not None:
        described["value"] = shown(_decoded(entry))
    if digests:
        described["chunks"] = [
            {
                "digest": ref.digest.hex(),
                "nbytes": ref.nbytes,
                "blob": ref.key,
                "offset": ref.offset,
                "form": ref.form.name,
            }
            for ref in _refs(manifest, entry)
        ]
    return described


def run_diff(options: argparse.Namespace) -> int:
    """``torchsnapshot diff BEFORE AFTER``."""
    before = open_snapshot(options.before, options.storage_options).manifest
    after = open_snapshot(options.after, options.storage_options).manifest
    differences = list(compare(before, after))
    new_nbytes = sum(difference.new_nbytes for difference in differences)
    if options.json:
        print_json({"differences": [asdict(difference) for difference in differences], "new_nbytes": new_nbytes})
    else:
        rows = [
            (
                difference.path,
                difference.change,
                f"{difference.num_new_chunks:,}/{difference.num_chunks:,}" if difference.num_chunks else "",
                readable_nbytes(difference.new_nbytes),
                difference.detail,
            )
            for difference in differences
        ]
        if rows:
            print_table(("path", "change", ">chunks", ">bytes", "detail"), rows)
        print(f"{len(rows):,} of {plural(_leaves(after), 'path')} differ, {readable_nbytes(new_nbytes)}")
    return 1 if differences and options.exit_code else 0


def _leaves(manifest: StoredManifest) -> int:
    return sum(
        not isinstance(entry, ContainerEntry) and not is_user_metadata(path) for path, entry in manifest.entries.items()
    )


def run_du(options: argparse.Namespace) -> int:
    """``torchsnapshot du ROOT``."""
    repository, below = open_below(options.root, options.storage_options)
    with progress_bar() as progress:
        usage = measure_usage(repository, progress)
    if below:
        shown = [each for each in usage.snapshots if f"{each.name}/".startswith(f"{below}/")]
        if not shown:
            raise SnapshotNotFoundError(nothing_below(options.root, repository))
        usage = replace(usage, snapshots=tuple(shown))
    if options.json:
        print_json({"root": repository.url, **asdict(usage)})
        return 0
    rows = [
        (
            snapshot.name or ".",
            readable_nbytes(snapshot.state_nbytes),
            readable_nbytes(snapshot.referenced_nbytes),
            readable_nbytes(snapshot.own_nbytes),
        )
        for snapshot in usage.snapshots
    ]
    print_table(("snapshot", ">state", ">on disk", ">its own"), rows)
    print(
        f"{plural(usage.num_blobs, 'blob')}, {readable_nbytes(usage.nbytes)};"
        f" gc would free {plural(usage.unreferenced_blobs, 'blob')}, {readable_nbytes(usage.unreferenced_nbytes)}"
    )
    return 0
