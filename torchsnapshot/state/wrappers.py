"""Names that differ only by what wrappers put into them, and what to do about it. Pure.

What doesn't live here: looking whether names differ at all (``restoring.restore``).
"""

from __future__ import annotations

from collections.abc import Collection

WRAPPERS = {
    "module": "DistributedDataParallel",
    "_orig_mod": "torch.compile",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "_fsdp_wrapped_module": "FullyShardedDataParallel",
}
"""What wrappers put into the names of parameters, as components."""


def explain(key: str, stored: Collection[str], wanted: Collection[str]) -> str | None:
    """Say that names differ by wrappers only, and how to restore all the same.

    Args:
        key: of the application's state, escaped.
        stored: names in the snapshot.
        wanted: names in the target.

    Returns:
        None where that is not what is wrong.
    """
    missing = sorted(name for name in wanted if name not in stored)
    by_bare = {_bare(name): name for name in stored if name not in wanted}
    if not missing or any(_bare(name) not in by_bare for name in missing):
        return None
    here, there = missing[0], by_bare[_bare(missing[0])]
    differing = set(here.split(".")) ^ set(there.split("."))
    found = [f"'{each}.' ({WRAPPERS[each]})" for each in WRAPPERS if each in differing]
    if not found:
        return None
    return (
        f"{key}: its names differ from those in the snapshot only by {' and '.join(found)}: {there!r} is stored, "
        f"{here!r} is here. {_cure(key, here, there)}, or take and restore with tricks.ModelState(model), whose names "
        "have none of them"
    )


def _cure(key: str, here: str, there: str) -> str:
    bare = _bare(here)
    if here == bare:
        inside = [each for each in there.split(".") if each in WRAPPERS and each not in here.split(".")]
        replaced = "".join(f".replace('{each}.', '')" for each in dict.fromkeys(inside))
        return f"Pass rename=lambda path: path{replaced}"
    if here.endswith(bare) and there == bare:
        return f"Pass rename=lambda path: path.replace('{key}/', '{key}/{here[: -len(bare)]}', 1)"
    return "Restore into the model without its wrappers"


def _bare(name: str) -> str:
    return ".".join(each for each in name.split(".") if each not in WRAPPERS)
