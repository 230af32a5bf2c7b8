"""Which pages of this process's memory were written since somebody last asked: what the kernel says.

What lives here: the system calls. What doesn't: what is concluded from the answers (``live_digests``).

Linux has this since 6.7 (arm64: 6.10): pages are protected against writing by userfaultfd(2) in its asynchronous mode,
in which the kernel itself lets the first write to a page through and notes it, and the ioctl ``PAGEMAP_SCAN`` tells
which pages were written and protects them again, in one step under the page table's lock
(Documentation/admin-guide/mm/pagemap.rst). A question about 1 GB of 4 KiB pages costs a third of a millisecond; the
first write to a page after that costs its writer about a microsecond more. Neither needs a privilege.

What is watched becomes a mapping of its own. A process may have only so many (65,530 by default), and where they are
used up it gets no more memory; so watching ends far from there.

A write is seen whoever does it through this process's page tables: its threads, system calls that fill memory, a
debugger. It is not seen through other page tables: memory that is shared with other processes is therefore refused, and
so are files that are mapped. Nor is it where pages were handed to a device or to the kernel earlier, which goes on
writing: that counts as written when they are handed over, and not when it happens. A direct read is of that kind until
it has ended. Who asks must know that there is nothing like it.

Invariant: mapped memory that is not watched any more, as it was moved there or mapped anew, raises; it never counts as
unwritten. Addresses at which nothing is mapped do: the answer is of use only for memory that is known to be there.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import platform
import struct
import sys
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from typing import TypeVar

PAGE_NBYTES = mmap.PAGESIZE

_USERFAULTFD = {"x86_64": 323, "aarch64": 282}
"""The number of the system call, by machine: asm/unistd.h."""

# linux/userfaultfd.h
_UFFD_USER_MODE_ONLY = 1
_UFFD_API = 0xAA
_UFFD_FEATURE_WP_ASYNC = 1 << 15
_UFFDIO_API = 0xC018AA3F
_UFFDIO_REGISTER = 0xC020AA00
_UFFDIO_REGISTER_MODE_WP = 2

# linux/fs.h
_PAGEMAP_SCAN = 0xC0606610
_PM_SCAN_WP_MATCHING = 1
_PM_SCAN_CHECK_WPASYNC = 2
_PAGE_IS_WRITTEN = 2

_SCAN = struct.Struct("12Q")
"""``struct pm_scan_arg``: size, flags, start, end, walk_end, vec, vec_len, max_pages, and four masks of categories."""
_WALK_END = 4
_REGION_WORDS = 3
"""``struct page_region``: start, end, categories."""
_MAX_REGIONS = 1024

_SHARE_OF_MAPPINGS = 2
"""Watching brings the mappings of a process to no more than one in so many of those that it may have."""

_Item = TypeVar("_Item")

Range = tuple[int, int]
"""Addresses: the first byte, and one behind the last."""


def pages_of(start: int, end: int) -> Range:
    """The whole pages around a range that is not empty."""
    return start - start % PAGE_NBYTES, -(-end // PAGE_NBYTES) * PAGE_NBYTES


def touching(items: Iterable[_Item], range_of: Callable[[_Item], Range]) -> list[tuple[Range, list[_Item]]]:
    """Items gathered into groups with no gap between their ranges, each group with the range that it covers.

    Args:
        items: in the order of their ranges.
        range_of: says where an item lies.
    """
    groups: list[tuple[Range, list[_Item]]] = []
    for item in items:
        start, end = range_of(item)
        if groups and start <= groups[-1][0][1]:
            (first, last), members = groups[-1]
            groups[-1] = (first, max(last, end)), members
        else:
            groups.append(((start, end), []))
        groups[-1][1].append(item)
    return groups


class PageWatch:
    """Watches memory of this process. Not thread-safe; of no use in a fork.

    Raises:
        OSError: this system cannot do it, or does not let this process do it.
    """

    def __init__(self) -> None:
        self._handles: list[int] = []
        self._regions = array("Q", bytes(8 * _REGION_WORDS * _MAX_REGIONS))
        number = _USERFAULTFD.get(platform.machine())
        if number is None or sys.platform != "linux":
            raise OSError(errno.ENOSYS, "watching memory is possible on Linux only, on x86_64 and aarch64")
        try:
            # faults in user mode are all that an ordinary process may ask for; the kernel resolves these itself anyway
            self._watch = self._opened(_userfaultfd(number, os.O_CLOEXEC | os.O_NONBLOCK | _UFFD_USER_MODE_ONLY))
            fcntl.ioctl(self._watch, _UFFDIO_API, struct.pack("3Q", _UFFD_API, _UFFD_FEATURE_WP_ASYNC, 0))
            self._pagemap = self._opened(os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC))
        except BaseException:
            self.close()
            raise

    def _opened(self, handle: int) -> int:
        self._handles.append(handle)
        return handle

    def close(self) -> None:
        """Watch nothing any more. In a fork this only closes what it has inherited."""
        while self._handles:
            os.close(self._handles.pop())

    def add(self, ranges: Sequence[Range]) -> list[bool]:
        """Begin to watch; every page counts as written at first.

        Args:
            ranges: whole pages, in any order; watching one again changes nothing.

        Returns:
            For each, whether it is watched. Memory that this process does not have to itself is not; nor are the
            smallest ranges where they are so many that the process might run out of mappings.
        """
        private, num_mappings = _private_memory()
        # a range is cut out of its mapping: then there is one before it and one behind it
        room = max(0, _max_mappings() // _SHARE_OF_MAPPINGS - num_mappings) // 2
        groups = touching(sorted(each for each in ranges if _is_inside(each, private)), _itself)
        groups.sort(key=lambda group: group[0][1] - group[0][0], reverse=True)
        watched: list[Range] = []
        for whole, parts in groups[:room]:
            watched += [whole] if self._register(*whole) else [part for part in parts if self._register(*part)]
        watched.sort()
        return [_is_inside(each, watched) for each in ranges]

    def _register(self, start: int, end: int) -> bool:
        try:
            fcntl.ioctl(
                self._watch, _UFFDIO_REGISTER, struct.pack("4Q", start, end - start, _UFFDIO_REGISTER_MODE_WP, 0)
            )
        except OSError:
            # memory of a driver; or watched by somebody else, such as a debugger
            return False
        return True

    def written(self, start: int, end: int) -> list[Range]:
        """What of a watched range was written since the last call for it; from now on, that is watched for anew.

        Args:
            start: of a page.
            end: behind a page.

        Returns:
            Ranges of whole pages, in order.

        Raises:
            OSError: some of it is not watched any more. What was written before is then lost to the next call.
        """
        found: list[Range] = []
        while start < end:
            num_regions, stopped = self._scan(start, end)
            words = num_regions * _REGION_WORDS
            found += zip(self._regions[0:words:_REGION_WORDS], self._regions[1:words:_REGION_WORDS], strict=True)
            # it stops early where there are more regions than fit
            if not start < stopped <= end:
                raise OSError(errno.EIO, "PAGEMAP_SCAN gave no sensible answer")
            start = stopped
        return found

    def _scan(self, start: int, end: int) -> tuple[int, int]:
        """How many written regions were found, and where the kernel has stopped."""
        address, _ = self._regions.buffer_info()
        flags = _PM_SCAN_WP_MATCHING | _PM_SCAN_CHECK_WPASYNC
        limits = 0, address, _MAX_REGIONS, 0
        # inverted, all of these, any of these, and what is told of them
        categories = 0, _PAGE_IS_WRITTEN, 0, _PAGE_IS_WRITTEN
        question = bytearray(_SCAN.pack(_SCAN.size, flags, start, end, *limits, *categories))
        return fcntl.ioctl(self._pagemap, _PAGEMAP_SCAN, question), _SCAN.unpack(question)[_WALK_END]


def _userfaultfd(number: int, flags: int) -> int:
    handle = int(ctypes.CDLL(None, use_errno=True).syscall(number, flags))
    if handle < 0:
        reason = ctypes.get_errno()
        raise OSError(reason, f"userfaultfd: {os.strerror(reason)}")
    return handle


def _private_memory() -> tuple[list[Range], int]:
    """Where this process has memory to itself, anonymous and writable, neighbours joined; how many mappings it has.

    See proc_pid_maps(5).
    """
    found: list[Range] = []
    num_mappings = 0
    # as bytes: the kernel escapes no control character but the newline, and text would be split at others
    with open("/proc/self/maps", "rb") as lines:
        for line in lines:
            num_mappings += 1
            addresses, permissions, _, _, inode, *_ = line.split(maxsplit=5)
            if permissions[:2] == b"rw" and permissions[3:4] == b"p" and inode == b"0":
                start, end = (int(text, 16) for text in addresses.split(b"-"))
                found.append((start, end))
    return [whole for whole, _ in touching(found, _itself)], num_mappings


def _max_mappings() -> int:
    """How many mappings a process may have: proc_sys_vm(5)."""
    with open("/proc/sys/vm/max_map_count", encoding="ascii") as file:
        return int(file.read())


def _itself(each: Range) -> Range:
    return each


def _is_inside(wanted: Range, ranges: Sequence[Range]) -> bool:
    """Whether one of some ranges, in order, has all of it."""
    index = bisect_right(ranges, wanted[0], key=itemgetter(0)) - 1
    return index >= 0 and wanted[1] <= ranges[index][1]
