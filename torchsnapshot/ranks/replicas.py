"""Which paths the ranks of a job are said to hold alike: by globs, and because they belong to a replicating module.

What doesn't live here: finding out what ranks hold alike without being told (``agreement``: by digests).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch.nn.parallel import DistributedDataParallel

from torchsnapshot.format.entries import escape
from torchsnapshot.stateful import Stateful


def declared_globs(globs: Sequence[str] | None, statefuls: Mapping[str, Stateful]) -> list[str]:
    """The globs of one rank: those that the caller gave, and one for each ``DistributedDataParallel`` module.

    Parameters and buffers that such a module was told to ignore are not replicated, so then it has one glob for each of
    the others.
    """
    found = list(globs or ())
    if "**" in found:
        return ["**"]
    for key, stateful in statefuls.items():
        if not isinstance(stateful, DistributedDataParallel):
            continue
        ignored = set(getattr(stateful, "parameters_to_ignore", ()))
        if not ignored:
            found.append(f"{escape(key)}/**")
            continue
        names = [name for name, _ in stateful.module.named_parameters()]
        names += [name for name, _ in stateful.module.named_buffers()]
        found += [f"{escape(key)}/module.{name}" for name in names if name not in ignored]
    return found


def agreed_globs(globs: Iterable[Sequence[str]]) -> list[str]:
    """The globs that every rank gave, in the order of the first."""
    first, *others = globs
    return [glob for glob in first if all(glob in other for other in others)]


def is_declared(path: str, globs: Sequence[str]) -> bool:
    """Whether a path is said to be replicated; ``*`` and ``**`` both cross ``/``.

    A leaf that is a whole subtree of plain values is, too, where all below it are.
    """
    return any(fnmatchcase(path, glob) or fnmatchcase(f"{path}/", glob) for glob in globs)
