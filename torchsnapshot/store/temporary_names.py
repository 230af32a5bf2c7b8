"""Names of temporary files: what a put writes to before the object gets its own name.

What doesn't live here: where they lie (``local``), and which of them are debris (``housekeeping``).

Invariant: no two puts have the same name, whichever process or thread makes them.
"""

from __future__ import annotations

import itertools
import os

from torchsnapshot.store.keys import OK_SUFFIX, parse_blob_key, parse_manifest_name

ANONYMOUS = "anon-"
"""How the name of a temporary file begins that belongs to no take."""

_counter = itertools.count()
_token = os.urandom(8).hex()
"""This process's own. Drawn once: each draw would give up Python's lock, in the middle of every put."""


def temporary_name(key: str) -> str:
    """A new name for the object ``key``, which begins with the take that it belongs to."""
    name = key.rpartition("/")[2]
    owner = parse_blob_key(name) or parse_manifest_name(name.removesuffix(OK_SUFFIX))
    label = owner.take_id if owner is not None else f"{ANONYMOUS}{os.getpid()}"
    return f"{label}-{next(_counter)}-{_token}"


def _renew_token() -> None:
    global _token
    _token = os.urandom(8).hex()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_token)
