"""Arguments that make no sense, to every public function: an error that names the argument, and nothing changed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from torchsnapshot import Snapshot, collect, retain

TAKE: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"app_state": None}, TypeError, "app_state must be a dict of objects by key"),
    ({"app_state": torch.nn.Linear(2, 2)}, TypeError, "app_state must be a dict of objects by key"),
    ({"app_state": {"m": torch.nn.Linear}}, TypeError, "Expected Stateful in app_state for key m"),
    ({"app_state": {"m": 3}}, TypeError, "put the value into a dict"),
    ({"app_state": {1: {}}}, TypeError, "str keys in app_state"),
    ({"user_metadata": {"a": torch.zeros(2)}}, TypeError, "user_metadata: torch.Tensor at 'a'"),
    ({"user_metadata": [1]}, TypeError, "user_metadata must be a dict"),
    ({"replicated": "*"}, TypeError, "replicated must be a list"),
    ({"replicated": 5}, TypeError, "replicated must be a list"),
    ({"replicated": [1]}, TypeError, "replicated must be a list"),
    ({"_custom_tensor_prepare_func": 5}, TypeError, "_custom_tensor_prepare_func must be a function"),
    ({"encoding": "zip"}, ValueError, "encoding='zip'"),
    ({"busy": "no"}, ValueError, "busy='no'"),
    ({"verify_replicas": "no"}, ValueError, "verify_replicas='no'"),
    ({"storage_options": 5}, TypeError, "storage_options must be a dict"),
    ({"store": 5}, TypeError, "a path must be a str"),
    ({"path": 5}, TypeError, "a path must be a str"),
    ({"path": "~/step_1"}, ValueError, "'~' means the home folder only to a shell"),
]

RESTORE: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"app_state": None}, TypeError, "app_state must be a dict of objects by key"),
    ({"paths": "model/*"}, TypeError, "paths must be a list of globs"),
    ({"paths": [1]}, TypeError, "paths must be a list of globs"),
    ({"rename": {"a": "b"}}, TypeError, "rename must be a function"),
    ({"allow_pickle": "no"}, TypeError, "allow_pickle must be True, False or None"),
    ({"device": "nowhere"}, ValueError, "device='nowhere' cannot be used"),
    ({"missing_rank": "x"}, ValueError, "missing_rank='x'"),
]

OTHERS: list[tuple[str, Callable[[Snapshot, str], object], type[Exception], str]] = [
    ("read no path", lambda snapshot, _: snapshot.read_object(None), TypeError, "path must be a str"),  # type: ignore[arg-type]
    (
        "read with a negative budget",
        lambda snapshot, _: snapshot.read_object("0/model/w", memory_budget_bytes=-1),
        ValueError,
        "memory_budget_bytes must be a positive number",
    ),
    ("no key", lambda snapshot, _: snapshot.get_state_dict_for_key(None), TypeError, "key must be a str"),  # type: ignore[arg-type]
    ("no such depth", lambda snapshot, _: snapshot.verify("deep"), ValueError, "depth='deep'"),  # type: ignore[arg-type]
    ("one pattern", lambda _, root: retain(root, keep="best"), TypeError, "keep must be a list of patterns"),
    ("last as text", lambda _, root: retain(root, last="1"), TypeError, "last must be an int"),  # type: ignore[arg-type]
    ("every half step", lambda _, root: retain(root, every=1.5), TypeError, "every must be an int"),  # type: ignore[arg-type]
    ("keep none", lambda _, root: retain(root, last=0), ValueError, "last must be at least 1"),
    ("endless wait", lambda _, root: collect(root, wait=float("nan")), ValueError, "wait must be a number of seconds"),
    ("wait as text", lambda _, root: collect(root, wait="5"), ValueError, "wait must be a number"),  # type: ignore[arg-type]
]


@pytest.fixture(scope="module")
def taken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Snapshot, str]:
    """A snapshot and its ROOT."""
    root = str(tmp_path_factory.mktemp("runs"))
    return Snapshot.take(f"{root}/step_1", {"model": {"w": torch.arange(4.0), "n": 3}}, store=root), root


def files_below(root: str) -> list[str]:
    """Every file of the store and its snapshots."""
    return sorted(str(path) for path in Path(root).rglob("*") if path.is_file())


@pytest.mark.parametrize("take", [Snapshot.take, Snapshot.async_take])
@pytest.mark.parametrize(("wrong", "kind", "message"), TAKE)
def test_take(
    taken: tuple[Snapshot, str], take: Callable[..., Any], wrong: dict[str, Any], kind: type[Exception], message: str
) -> None:
    """A take refuses the argument before anything is written, and the error names it."""
    before = files_below(taken[1])
    arguments: dict[str, Any] = {"path": f"{taken[1]}/step_2", "app_state": {"model": {"w": torch.zeros(4)}}, **wrong}
    with pytest.raises(kind, match=re.escape(message)):
        take(**arguments)
    assert files_below(taken[1]) == before


@pytest.mark.parametrize(("wrong", "kind", "message"), RESTORE)
def test_restore(taken: tuple[Snapshot, str], wrong: dict[str, Any], kind: type[Exception], message: str) -> None:
    """A restore refuses the argument before the target changes, and the error names it."""
    target = {"w": torch.zeros(4), "n": 0}
    with pytest.raises(kind, match=re.escape(message)):
        taken[0].restore(**{"app_state": {"model": target}, **wrong})
    assert not target["w"].any()
    assert target["n"] == 0


@pytest.mark.parametrize(("call", "kind", "message"), [each[1:] for each in OTHERS], ids=[each[0] for each in OTHERS])
def test_others(
    taken: tuple[Snapshot, str], call: Callable[[Snapshot, str], object], kind: type[Exception], message: str
) -> None:
    """Every other function refuses the argument, and deletes nothing."""
    before = files_below(taken[1])
    with pytest.raises(kind, match=re.escape(message)):
        call(*taken)
    assert files_below(taken[1]) == before
