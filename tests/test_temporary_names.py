"""Names of temporary files: one for each put, whoever makes it."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

from torchsnapshot.store.keys import BlobKey, new_id
from torchsnapshot.store.temporary_names import temporary_name


def test_names_begin_with_their_take_and_differ() -> None:
    """A collector tells by the name whose file it is; threads never draw the same one."""
    take_id = new_id()
    key = str(BlobKey(os.urandom(16), take_id, 0))
    with ThreadPoolExecutor(4) as pool:
        names = list(pool.map(temporary_name, [key] * 1000))
    assert len(set(names)) == 1000
    assert all(name.startswith(f"{take_id}-") for name in names)
    assert temporary_name(".torchsnapshot/config").startswith(f"anon-{os.getpid()}-")


def test_forks_draw_other_names() -> None:
    """A child that goes on counting where its parent was draws none of the parent's names."""
    key = str(BlobKey(os.urandom(16), new_id(), 0))
    reader, writer = os.pipe()
    if not os.fork():
        os.write(writer, "\n".join(temporary_name(key) for _ in range(5)).encode())
        os._exit(0)
    os.wait()
    theirs = os.read(reader, 10_000).decode().split("\n")
    assert len({*theirs, *(temporary_name(key) for _ in range(5))}) == 10
