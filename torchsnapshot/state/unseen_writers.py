"""What may write to this process's memory without the kernel's seeing it: devices that were given memory earlier.

What lives here: whether there may be any. What doesn't: what follows from that (``live_digests``).

An accelerator writes into memory that was pinned for it, a network card with RDMA into memory that was registered with
it. Which memory that is, nobody can be asked; what counts is whether torch uses the one or the machine has the other.
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

_INFINIBAND = Path("/sys/class/infiniband")
_ACCELERATORS = ("cuda", "xpu", "mtia", "hpu", "npu")


def may_exist() -> bool:
    """Whether some memory may be written to unseen."""
    return _has_rdma() or _uses_accelerator()


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
