"""The front door: what ``import torchsnapshot`` shows is what ``__all__`` says, no more and no less."""

from __future__ import annotations

import subprocess
import sys
import types

import torchsnapshot


def test_all_is_sorted() -> None:
    """``__all__`` is sorted and names nothing twice."""
    assert list(torchsnapshot.__all__) == sorted(set(torchsnapshot.__all__))


def test_all_equals_what_the_package_shows() -> None:
    """Every public name of the package, submodules but ``errors`` aside, is in ``__all__``, and nothing else is."""
    shown = {
        name
        for name, value in vars(torchsnapshot).items()
        if not isinstance(value, types.ModuleType) or name == "errors"
        if not name.startswith("_") or name == "__version__"
    }
    assert shown == set(torchsnapshot.__all__)


def test_every_public_name_has_a_docstring() -> None:
    """Every public class and function says what it is."""
    for name in torchsnapshot.__all__:
        value = getattr(torchsnapshot, name)
        if isinstance(value, type) or callable(value):
            assert value.__doc__, f"{name} has no docstring"


def test_import_is_light() -> None:
    """Importing the package imports no filesystem and no progress bars, which only some need, and no numpy."""
    script = (
        "import sys, torch; before = set(sys.modules); import torchsnapshot\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new & {'s3fs', 'gcsfs', 'boto3', 'botocore', 'aiohttp', 'rich', 'numpy'}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
