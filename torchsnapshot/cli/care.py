"""The commands that check, delete or copy: verify, gc, retain, rm, copy. Each parses, calls and prints."""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict

from torchsnapshot.cli.options import Commands, add_command, positive, seconds, storage_options
from torchsnapshot.cli.output import (
    nothing_below,
    plural,
    print_error,
    print_json,
    print_table,
    printable,
    progress_bar,
    readable_nbytes,
)
from torchsnapshot.copy import copy_snapshot
from torchsnapshot.errors import SnapshotError, SnapshotNotFoundError
from torchsnapshot.reading.opening import open_below, open_snapshot
from torchsnapshot.store.backend import StorageOptions
from torchsnapshot.store.gc import DEFAULT_WAIT_SECONDS, collect
from torchsnapshot.store.gcplan import GCReport
from torchsnapshot.store.locate import find_root, open_root
from torchsnapshot.store.repository import ManifestRef, Repository
from torchsnapshot.store.retention import RetentionPlan, retain
from torchsnapshot.verify import DEPTHS, verify_path


def add_commands(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add verify, gc, retain, rm and copy."""
    parser = add_command(commands, "verify", "check a snapshot, or all snapshots of a root", run_verify)
    parser.add_argument("path", help="a snapshot, or a folder or URL that holds snapshots")
    parser.add_argument(
        "--depth",
        choices=DEPTHS,
        default="bytes",
        help="manifests: readable; blobs: each is there with its size; bytes: each has its digest (default)",
    )

    parser = add_command(commands, "gc", "free what no snapshot needs any more", run_gc)
    parser.add_argument("root", help="a folder or URL that holds snapshots")
    parser.add_argument("--dry-run", action="store_true", help="say what would be freed, change nothing")
    parser.add_argument(
        "--wait",
        type=seconds,
        default=DEFAULT_WAIT_SECONDS,
        metavar="SECONDS",
        help="how long to wait for takes that run meanwhile, before giving up (default: %(default)s)",
    )
    parser.add_argument(
        "--force", action="store_true", help="go on although folders that held snapshots are gone (an unmounted disk?)"
    )

    parser = add_command(commands, "retain", "delete snapshots by policy; gc then frees their space", run_retain)
    parser.add_argument("root", help="a folder or URL that holds snapshots; one run's folder, where runs share a store")
    parser.add_argument("--last", type=positive, metavar="N", help="keep the N newest")
    parser.add_argument("--every", type=positive, metavar="STEPS", help="keep those whose step is a multiple of STEPS")
    parser.add_argument("--keep", action="append", default=[], metavar="GLOB", help="keep names that match; repeatable")
    parser.add_argument("--dry-run", action="store_true", help="say what would be deleted, change nothing")
    parser.set_defaults(fail=parser.error)

    parser = add_command(commands, "rm", "delete snapshots; gc then frees their space", run_rm)
    parser.add_argument("path", nargs="+", help="a snapshot")

    parser = add_command(commands, "copy", "copy a snapshot with all that it needs to another root", run_copy)
    parser.add_argument("source", help="a snapshot")
    parser.add_argument("destination", help="where the copy will be: its path, not the folder that holds it")
    parser.add_argument(
        "--to-storage-options",
        type=storage_options,
        metavar="JSON",
        help="as --storage-options, for the destination (default: the same)",
    )


def run_verify(options: argparse.Namespace) -> int:
    """``torchsnapshot verify PATH``."""
    with progress_bar() as progress:
        result = verify_path(options.path, options.depth, options.storage_options, progress)
    if options.json:
        print_json({"path": options.path, "depth": options.depth, **asdict(result)})
    else:
        for problem in result.problems:
            print(printable(f"{problem.name or '.'}: {problem.kind}: {problem.message}"))
        checked, found = plural(len(result.names), "snapshot"), plural(len(result.problems), "problem")
        print(f"{checked} checked to the {options.depth}: {found}")
    return 1 if result.problems else 0


def run_gc(options: argparse.Namespace) -> int:
    """``torchsnapshot gc ROOT``; what stops it is an error like any other."""
    repository = Repository.open(open_root(options.root, options.storage_options))
    with progress_bar() as progress:
        report = collect(repository, dry_run=options.dry_run, wait=options.wait, force=options.force, progress=progress)
    if options.json:
        print_json({"root": repository.url, **asdict(report)})
    else:
        _print_report(report)
    return 1 if report.failed else 0


def _print_report(report: GCReport) -> None:
    keep, free = ("would keep", "would free") if report.dry_run else ("kept", "freed")
    print(f"{keep} {plural(report.kept_blobs, 'blob')}, {readable_nbytes(report.kept_nbytes)}")
    print(f"{free} {plural(report.freed_blobs, 'blob')}, {readable_nbytes(report.freed_nbytes)}")
    for name in report.uncommitted:
        print(printable(f"kept for a take that was never committed; delete it if nobody needs it: {name}"))
    for name in report.superseded:
        print(printable(f"kept for an older generation of a snapshot; taking that path again removes it: {name}"))
    for name in report.upstream:
        print(printable(f"left alone, a snapshot of the old torchsnapshot: {name or '.'}"))
    for name in report.foreign:
        print(printable(f"left alone, not ours: {name}"))
    for lease in report.called_dead:
        print(printable(f"called dead: {lease}"))
    for key, reason in report.failed.items():
        print_error(f"could not delete {key}: {reason}")


def run_retain(options: argparse.Namespace) -> int:
    """``torchsnapshot retain ROOT``."""
    if options.last is None and options.every is None and not options.keep:
        options.fail("say what to keep: --last, --every or --keep")
    repository, below = open_below(options.root, options.storage_options)
    plan = retain(
        repository, below=below, last=options.last, every=options.every, keep=options.keep, dry_run=options.dry_run
    )
    if below and not plan.keep and not plan.drop:
        raise SnapshotNotFoundError(nothing_below(options.root, repository))
    if options.json:
        print_json(_plan_as_json(repository, plan, options.dry_run))
        return 0
    rows = [(info.name or ".", "keep", ", ".join(reasons)) for info, reasons in plan.keep]
    rows += [(info.name or ".", "would delete" if options.dry_run else "deleted", "") for info in plan.drop]
    print_table(("snapshot", "", "because"), rows)
    if plan.drop and not options.dry_run:
        gc_root = repository.url if below else options.root
        print(f"{plural(len(plan.drop), 'snapshot')} deleted; free the space with: torchsnapshot gc {gc_root}")
    return 0


def _plan_as_json(repository: Repository, plan: RetentionPlan, dry_run: bool) -> dict[str, object]:
    return {
        "root": repository.url,
        "dry_run": dry_run,
        "keep": [{"name": info.name, "reasons": list(reasons)} for info, reasons in plan.keep],
        "drop": [info.name for info in plan.drop],
    }


def run_rm(options: argparse.Namespace) -> int:
    """``torchsnapshot rm PATH ...``: one that cannot be deleted does not stop the others."""
    removed, failed = [], {}
    for path in options.path:
        try:
            refs = _remove(path, options.storage_options)
        except (SnapshotError, ValueError, OSError) as error:
            if options.debug:
                raise
            failed[path] = str(error)
            print_error(str(error))
            continue
        removed.append({"path": path, "manifests": [str(ref.manifest) for ref in refs]})
        if not options.json:
            print(f"deleted {printable(path)}")
    if options.json:
        print_json({"deleted": removed, "failed": failed})
    return 1 if failed else 0


def _remove(path: str, storage: StorageOptions | None) -> list[ManifestRef]:
    link = path.rstrip("/")
    if os.path.islink(link):
        raise ValueError(f"{path} is a link to {os.path.realpath(link)}: name that, or remove the link alone with rm")
    place = find_root(path, storage)
    if place is None:
        raise SnapshotNotFoundError(f"{path}: no snapshot is here; neither this folder nor one above it holds a store")
    repository = Repository.open(place.backend)
    try:
        return repository.delete_snapshot(place.name)
    except SnapshotNotFoundError as error:
        raise SnapshotNotFoundError(
            f"{path}: no snapshot is here; what is there: torchsnapshot ls {repository.url}"
        ) from error


def run_copy(options: argparse.Namespace) -> int:
    """``torchsnapshot copy SOURCE DESTINATION``."""
    source = open_snapshot(options.source, options.storage_options)
    to = options.to_storage_options if options.to_storage_options is not None else options.storage_options
    with progress_bar() as progress:
        stats = copy_snapshot(source, options.destination, to, progress=progress)
    if options.json:
        print_json({"source": options.source, "destination": options.destination, "stats": asdict(stats)})
    else:
        print(
            f"copied {readable_nbytes(stats.state_nbytes)}: {readable_nbytes(stats.stored_nbytes)} written,"
            f" {readable_nbytes(stats.reused_nbytes)} were there already"
        )
    return 0
