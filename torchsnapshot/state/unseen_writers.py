"""What may write to this process's memory without its page tables' telling: whoever was given the memory earlier.

What lives here: whether there may be any. What doesn't: what follows from that (``live_digests``).

An accelerator writes into memory that was pinned for it, a network card with RDMA into memory that was registered with
it, the kernel itself into buffers that were registered with an io_uring (io_uring_register(2)). Which memory that is,
nobody can be asked; what counts is whether torch uses the first, whether the machine has the second, and whether the
kernel counts any memory as pinned for long (``VmPin`` in proc_pid_status(5)). It does not count what is pinned for one
read past the page cache (``O_DIRECT``): none may be under way into the state while it is taken.
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

_STATUS = Path("/proc/self/status")
_INFINIBAND = Path("/sys/class/infiniband")
_ACCELERATORS = ("cuda", "xpu", "mtia", "hpu", "npu")


def may_exist() -> bool:
    """Whether some memory may be written to unseen."""
    return _has_rdma() or _uses_accelerator() or _has_pinned_memory()


@cache
def _has_rdma() -> bool:
    return _INFINIBAND.is_dir() and any(_INFINIBAND.iterdir())


def _uses_accelerator() -> bool:
    """Whether a device of one of torch's kinds may have been given memory; without an import of torch's."""
    torch = sys.modules.get("torch")
    for name in _ACCELERATORS:
        backend = getattr(torch, name, None)
        is_initialized = getattr(backend, "is_initialized", None)
        if backend is not None and (is_initialized is None or is_initialized()):
            return True
    return False


def _has_pinned_memory() -> bool:
    try:
        _, _, rest = _STATUS.read_bytes().partition(b"VmPin:")
    except OSError:
        return True
    # "VmPin:         0 kB"
    return rest.split(maxsplit=1)[:1] != [b"0"]
