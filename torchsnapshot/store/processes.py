"""Which process an object of the protocol belongs to, and whether that process is no more.

What lives here: the identity of a process and the test for its end. What doesn't: what follows from it (``liveness``).
Invariant: a process is called gone only by evidence of this very host, boot and pid namespace; in doubt it lives.
"""

from __future__ import annotations

import errno
import os
import socket
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Process:
    """A process, distinguishable from every other one that ever ran.

    ``boot_id`` and ``pid_namespace`` are empty where the system has none (not Linux): then nobody can call it gone.
    ``start_time`` is in clock ticks since boot, 0 where unknown.
    """

    host: str
    boot_id: str
    pid_namespace: str
    pid: int
    start_time: int

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def current_process() -> Process:
    """The calling process."""
    pid = os.getpid()
    return Process(socket.gethostname(), _boot_id(), _pid_namespace(), pid, _start_time(pid) or 0)


def is_gone(process: Process) -> bool:
    """Whether the process has certainly ended: same host, boot and pid namespace, and no such process any more."""
    here = current_process()
    same = (here.host, here.boot_id, here.pid_namespace) == (process.host, process.boot_id, process.pid_namespace)
    if not same or not here.boot_id or not here.pid_namespace:
        return False
    try:
        os.kill(process.pid, 0)
    except ProcessLookupError:
        return True
    except OSError as error:
        if error.errno != errno.EPERM:
            return False
        # it exists and belongs to somebody else: the start time decides below
    start_time = _start_time(process.pid)
    if start_time is None or not process.start_time:
        return False
    return start_time != process.start_time or _is_zombie(process.pid)


def _boot_id() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except (OSError, ValueError):
        return ""


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _stat_fields(pid: int) -> list[bytes]:
    """The fields of ``/proc/<pid>/stat`` from the state on; the name before them may hold any byte."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()
    except OSError:
        return []


def _start_time(pid: int) -> int | None:
    fields = _stat_fields(pid)
    return int(fields[19]) if len(fields) > 19 and fields[19].isdigit() else None


def _is_zombie(pid: int) -> bool:
    """Whether the process has ended and only waits for its parent; one whose other threads still run does not count."""
    fields = _stat_fields(pid)
    try:
        return bool(fields) and fields[0] == b"Z" and len(os.listdir(f"/proc/{pid}/task")) == 1
    except OSError:
        return False
