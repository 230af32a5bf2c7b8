"""Restoring a part: which stored paths are wanted (``paths``) and where they go (``rename``). Pure.

What doesn't live here: how the selected leaves are laid over the target's state (``live_state``).

Invariant: two stored paths with one place are an error that names both, and so is a glob that matches nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torchsnapshot.errors import MismatchError


class Selection:
    """What ``paths`` and ``rename`` ask for.

    Args:
        paths: globs over stored paths (``*`` crosses ``/``), or None for all. What matches is meant with all below it.
        rename: stored path -> path in the target, or None for no change.
    """

    def __init__(self, paths: Sequence[str] | None, rename: Callable[[str], str] | None) -> None:
        # whoever is not checked by mypy may pass anything
        globs: Any = paths
        is_list = isinstance(globs, (list, tuple, set, frozenset))
        if globs is not None and not (is_list and all(isinstance(glob, str) for glob in globs)):
            raise TypeError(f"paths must be a list of globs, as in ['model/*'], not {globs!r}")
        function: object = rename
        if function is not None and not callable(function):
            raise TypeError(f"rename must be a function from stored path to path in the target, not {function!r}")
        self._paths = paths
        self._rename = rename
        self._matched: set[str] = set()
        self._sources: dict[str, str] = {}

    def target_of(self, path: str) -> str | None:
        """Where a stored leaf goes; None where it is not wanted.

        Raises:
            MismatchError: another stored path goes there too.
            TypeError: ``rename`` returned no path.
        """
        if self._paths is not None:
            matching = [glob for glob in self._paths if _matches(path, glob)]
            if not matching:
                return None
            self._matched.update(matching)
        target = path if self._rename is None else self._rename(path)
        if not isinstance(target, str):
            raise TypeError(f"rename({path!r}) returned {target!r}; it must return a path")
        if self._sources.setdefault(target, path) != path:
            raise MismatchError(f"rename puts both {self._sources[target]!r} and {path!r} at {target!r}")
        return target

    def selects(self, path: str) -> bool:
        """Whether a stored leaf is wanted."""
        return self._paths is None or any(_matches(path, glob) for glob in self._paths)

    def check(self) -> None:
        """Raise ``MismatchError`` for globs that matched nothing: most likely a typing error."""
        unmatched = [glob for glob in self._paths or () if glob not in self._matched]
        if unmatched:
            globs = ", ".join(map(repr, unmatched))
            raise MismatchError(
                f"no stored path matches {globs}; 'torchsnapshot show SNAPSHOT' lists the paths, each after its rank, "
                "which does not belong to them here"
            )


def _matches(path: str, glob: str) -> bool:
    """Whether a glob matches a path, or what stands above it."""
    return fnmatchcase(path, glob) or fnmatchcase(path, f"{glob}/*")
