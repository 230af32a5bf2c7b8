"""Whether this system tells which memory was written, for tests of what follows from that."""

from __future__ import annotations

import pytest

from torchsnapshot.engine.page_watch import PageWatch


def _is_possible() -> bool:
    try:
        PageWatch().close()
    except OSError:
        return False
    return True


needs_page_watch = pytest.mark.skipif(not _is_possible(), reason="the kernel does not tell which memory was written")
