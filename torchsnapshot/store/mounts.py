"""Which filesystem a local path lies on: some need other rules than a local disk.

Read from ``/proc/self/mountinfo``; where there is none the type is ``""``, and a local disk is assumed.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from enum import Enum


class Coherence(Enum):
    """How soon one client of a filesystem sees what another has done."""

    LOCAL = "local"
    CACHED = "cached"  # a network filesystem: after up to a minute
    BUCKET = "bucket"  # a bucket dressed up as folders: no atomic rename, no fsync, cached listings


@dataclass(frozen=True, slots=True)
class Mount:
    """What a path lies on: ``type`` is the kernel's name, ``"ext4"`` or ``"fuse.s3fs"``."""

    coherence: Coherence
    type: str


_CACHED = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "ceph", "lustre", "beegfs", "gpfs", "glusterfs", "fuse.glusterfs", "9p"}
    | {"afs", "gfs2", "ocfs2", "orangefs", "wekafs", "fuse.sshfs", "fuse.juicefs", "fuse.ceph-fuse", "fuse.ceph"}
    | {"panfs", "virtiofs", "quobyte", "fuse.quobyte", "fuse.lizardfs", "fuse.mfs", "fuse.moosefs"}
)
_BUCKET = frozenset(
    {"fuse.s3fs", "fuse.gcsfuse", "fuse.goofys", "fuse.geesefs", "fuse.mountpoint-s3", "fuse.rclone", "fuse.blobfuse"}
    | {"fuse.blobfuse2", "fuse.s3ql", "fuse.tigrisfs", "fuse.ossfs", "fuse.cosfs"}
)
_ESCAPE = re.compile(r"\\([0-7]{3})")


def find_mount(path: str) -> Mount:
    """The mount of ``path``, or of its nearest ancestor that exists."""
    kind = _filesystem_type(path)
    if kind in _BUCKET:
        return Mount(Coherence.BUCKET, kind)
    return Mount(Coherence.CACHED if kind in _CACHED else Coherence.LOCAL, kind)


def device_of(path: str) -> int:
    """The device number of ``path``, or of its nearest ancestor that exists."""
    while True:
        try:
            return os.stat(path).st_dev
        except OSError:
            parent = os.path.dirname(path)
            if parent == path:
                raise
            path = parent


def _filesystem_type(path: str) -> str:
    device = device_of(path)
    wanted = f"{os.major(device)}:{os.minor(device)}"
    real = os.path.realpath(path)
    best, best_length = "", -1
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
            for line in lines:
                fields, _, tail = line.partition(" - ")
                parts = fields.split(" ")
                if len(parts) < 5 or not tail:
                    continue
                mount_point = _ESCAPE.sub(lambda match: chr(int(match[1], 8)), parts[4])
                below = mount_point == "/" or real == mount_point or real.startswith(mount_point + "/")
                # The device decides between mounts stacked on one point. btrfs gives subvolumes devices of their own
                # that mountinfo doesn't show: a match by path alone is the second choice.
                length = len(mount_point) + (1 << 20 if parts[2] == wanted else 0)
                if below and length >= best_length:
                    best, best_length = tail.split(" ", 1)[0], length
    except OSError:
        return ""
    return best
