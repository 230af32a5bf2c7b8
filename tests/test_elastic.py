"""What other numbers of ranks see of a snapshot: what they share, and rules for what one rank had for itself.

The snapshot is taken by two real processes. Who reads it is one process that stands for each rank in turn: restoring
is every rank's own business.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from launch import launch, succeed
from rank_states import content, same, take_private

from torchsnapshot import RNGState, Snapshot, StateDict
from torchsnapshot.errors import AbsentStateError, MismatchError, SnapshotError
from torchsnapshot.ranks.replicas import is_declared
from torchsnapshot.reading.opening import open_snapshot
from torchsnapshot.restoring.options import RestoreOptions
from torchsnapshot.restoring.read_object import read_state_dict
from torchsnapshot.restoring.restore import restore
from torchsnapshot.restoring.stages import tiles_of
from torchsnapshot.state.app_state import check_app_state
from torchsnapshot.state.wrappers import explain


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A snapshot by two ranks."""
    root = str(tmp_path_factory.mktemp("elastic"))
    for outcome in succeed(launch(2, take_private, args=[root])):
        outcome.result()
    return f"{root}/private"


def fresh() -> dict[str, Any]:
    """What a rank has before it restores."""
    return {
        "s": StateDict(t=torch.zeros(900), n=0, mine=torch.zeros(900), word="new"),
        "l": StateDict(l=[torch.zeros(900), torch.zeros(900)]),
        "v": StateDict(epoch=0, rank=-1),
    }


def restored(path: str, keys: str, rank: int, world_size: int, **options: Any) -> dict[str, Any]:
    """What one rank of many has afterwards."""
    state = {key: value for key, value in fresh().items() if key in keys}
    restore(open_snapshot(path), check_app_state(state), RestoreOptions(rank=rank, world_size=world_size, **options))
    return state


def is_of(state: dict[str, Any], rank: int) -> bool:
    """Whether what stands under ``s`` is what that rank had."""
    return same(state["s"]["mine"], content(f"mine {rank}", (900,))) and state["s"]["word"] == f"of {rank}"


def test_as_many_ranks_get_each_its_own(path: str) -> None:
    """On the same number of ranks everything is as it was."""
    for rank in (0, 1):
        state = restored(path, "slv", rank, 2)
        assert is_of(state, rank)
        assert same(state["s"]["t"], content("t", (900,)))
        assert state["v"].data == {"epoch": 3, "rank": rank}
        assert same(state["l"]["l"][1], content(f"mine {rank}", (900,)))


@pytest.mark.parametrize(("rank", "world_size"), [(0, 3), (2, 3), (0, 1)])
def test_without_a_rule_what_one_rank_had_is_an_error(path: str, rank: int, world_size: int) -> None:
    """The error lists what is not the same on all ranks, and nothing else; nothing has changed."""
    state = fresh()
    with pytest.raises(MismatchError, match="missing_rank=") as caught:
        restore(open_snapshot(path), check_app_state(state), RestoreOptions(rank=rank, world_size=world_size))
    assert "l/l/1:" in str(caught.value)
    with pytest.raises(MismatchError, match="v/rank: ranks") as other:
        restored(path, "v", rank, world_size)
    assert "v/epoch" not in str(other.value)
    assert "s/t" not in str(caught.value)
    assert not state["s"]["t"].any()
    with pytest.raises(MismatchError, match=r"(?s)s/mine: ranks [01].*s/word: ranks [01]"):
        restored(path, "s", rank, world_size)


def test_new_ranks_go_without(path: str) -> None:
    """With ``"drop"`` old ranks keep their own, and new ones what they have; only a list cannot spare an element."""
    assert is_of(restored(path, "s", 1, 3, missing_rank="drop"), 1)
    state = restored(path, "sv", 2, 3, missing_rank="drop")
    assert same(state["s"]["t"], content("t", (900,)))
    assert state["s"]["n"] == 7
    assert not state["s"]["mine"].any()
    assert state["s"]["word"] == "new"
    # of plain values only those are left out that differ
    assert state["v"].data == {"epoch": 3, "rank": -1}
    with pytest.raises(MismatchError, match="cannot be dropped from a list"):
        restored(path, "l", 2, 3, missing_rank="drop")


def test_new_ranks_get_what_rank_0_had(path: str) -> None:
    """With ``"rank0"`` new ranks begin as rank 0."""
    assert is_of(restored(path, "slv", 2, 3, missing_rank="rank0"), 0)
    assert is_of(restored(path, "slv", 1, 3, missing_rank="rank0"), 1)


@pytest.mark.parametrize("missing_rank", ["drop", "rank0"])
def test_fewer_ranks_keep_their_own(path: str, missing_rank: str) -> None:
    """What ranks had that are no more is left behind."""
    assert is_of(restored(path, "slv", 0, 1, missing_rank=missing_rank), 0)


@pytest.mark.parametrize(("rank", "seed"), [(0, 0), (1, 1), (2, 0)])
def test_random_state_needs_no_rule(path: str, rank: int, seed: int) -> None:
    """A rank that was there goes on with its own random numbers, a new one begins with rank 0's."""
    before = torch.get_rng_state()
    try:
        restore(open_snapshot(path), {"rng": RNGState()}, RestoreOptions(rank=rank, world_size=3))
        drawn = torch.rand(3)
        assert torch.equal(drawn, torch.rand(3, generator=torch.Generator().manual_seed(seed)))
    finally:
        torch.set_rng_state(before)


def test_rules_concern_what_is_selected(path: str) -> None:
    """With ``paths=`` and ``rename=`` what is not selected needs no rule."""
    state = restored(path, "s", 2, 3, paths=["s/t", "s/n"])
    assert same(state["s"]["t"], content("t", (900,)))
    with pytest.raises(MismatchError, match="s/mine"):
        restored(path, "s", 2, 3, paths=["s/*"])
    assert restored(path, "s", 2, 3, paths=["s/*"], missing_rank="drop")["s"]["word"] == "new"
    assert is_of(restored(path, "s", 2, 3, paths=["s/*"], missing_rank="rank0"), 0)
    assert is_of(restored(path, "s", 1, 2, paths=["s/*"]), 1)

    def swapped(place: str) -> str:
        return {"s/t": "s/mine", "s/mine": "s/t"}.get(place, place)

    state = restored(path, "s", 1, 2, paths=["s/t", "s/mine"], rename=swapped)
    assert same(state["s"]["t"], content("mine 1", (900,)))
    assert same(state["s"]["mine"], content("t", (900,)))


def test_single_values_by_rank(path: str) -> None:
    """Every rank number sees what is shared; what one rank had is there under its own number only."""
    snapshot = Snapshot(path)
    for rank in (0, 1, 5):
        assert same(snapshot.read_object(f"{rank}/s/t"), content("t", (900,)))
        assert snapshot.read_object(f"{rank}/s/n") == 7
    assert snapshot.read_object("1/s/word") == "of 1"
    assert snapshot.read_object("1/v/rank") == 1
    for missing in ("5/s/mine", "5/v/rank", "5/v", "0/only/t", "5/only/t"):
        with pytest.raises(SnapshotError, match="does not exist"):
            snapshot.read_object(missing)
    opened = open_snapshot(path)
    assert read_state_dict(opened, "s", 1, False)["word"] == "of 1"
    assert read_state_dict(opened, "s", 5, False).keys() == {"t", "n"}
    assert snapshot.get_state_dict_for_key("s", replicate_from_rank0=True)["word"] == "of 0"


def test_a_key_that_only_one_rank_had(path: str) -> None:
    """It is restored on that rank; on others it is an error that says so."""
    state = StateDict(t=torch.zeros(900))
    restore(open_snapshot(path), {"only": state}, RestoreOptions(rank=1, world_size=2))
    assert same(state["t"], content("only", (900,)))
    with pytest.raises(AbsentStateError, match="other ranks have it"):
        restore(open_snapshot(path), {"only": state}, RestoreOptions(rank=0, world_size=2))
    with pytest.raises(AbsentStateError, match="The snapshot has: l, only, rng, s, v"):
        Snapshot(path).restore({"never": state})


# ------------------------------------------------------------------ pure rules


@given(st.permutations([2, 3, 2]), st.sets(st.integers(0, 2)), st.integers(0, 11))
def test_stages_are_found_from_one_of_them(sizes: list[int], inner: set[int], place: int) -> None:
    """A mesh over some dimensions of a job's grid shows all stages, in order, whichever dimensions these are."""
    grid = torch.arange(12).reshape(sizes)
    outer = [dim for dim in range(3) if dim not in inner]
    stages = grid.permute(*outer, *sorted(inner)).reshape(
        -1, max(1, int(torch.tensor([sizes[d] for d in inner]).prod()))
    )
    expected = sorted((frozenset(stage.tolist()) for stage in stages), key=min)
    assert tiles_of(next(stage for stage in expected if place in stage), 12) == expected


def test_a_mesh_that_fits_nowhere_shows_no_stages() -> None:
    """Ranks that do not make up a job by being shifted are no stages."""
    assert tiles_of(frozenset({0, 1, 2}), 4) is None
    assert tiles_of(frozenset({0, 3}), 4) is None


@pytest.mark.parametrize(
    ("stored", "here", "cure"),
    [
        ("module.a.weight", "a.weight", lambda path: path.replace("module.", "")),
        ("_orig_mod.module.a.weight", "a.weight", lambda path: path.replace("_orig_mod.", "").replace("module.", "")),
        (
            "a._checkpoint_wrapped_module.weight",
            "a.weight",
            lambda path: path.replace("_checkpoint_wrapped_module.", ""),
        ),
        ("a.weight", "module.a.weight", lambda path: path.replace("m/", "m/module.", 1)),
    ],
)
def test_wrappers_explain_other_names(stored: str, here: str, cure: Callable[[str], str]) -> None:
    """Names that differ by a known wrapper come with a ``rename`` that helps."""
    reason = explain("m", {stored, "bias"}, {here, "bias"})
    assert reason is not None
    text = reason.partition("rename=")[2].partition(", or take")[0]
    rename = eval(text)
    assert rename(f"m/{stored}") == cure(f"m/{stored}") == f"m/{here}"


def test_globs_cover_subtrees_of_values() -> None:
    """A glob for everything below a key is for the key's plain values, too, which are stored as one."""
    assert is_declared("progress", ["progress/**"])
    assert is_declared("model/a.weight", ["model/**"])
    assert not is_declared("progress", ["progress/step"])
    assert not is_declared("model2/a", ["model/**"])


def test_wrappers_explain_nothing_else() -> None:
    """Names that are really missing are not explained away."""
    assert explain("m", {"a.weight"}, {"b.weight"}) is None
    assert explain("m", {"module.a", "b"}, {"a", "c"}) is None
    assert explain("m", {"a", "b"}, {"a"}) is None


def test_what_one_process_took_is_for_every_rank(tmp_path: Path) -> None:
    """One process that takes and two that restore: everything is shared."""
    Snapshot.take(f"{tmp_path}/one", fresh())
    state = fresh()
    restore(open_snapshot(f"{tmp_path}/one"), check_app_state(state), RestoreOptions(rank=1, world_size=2))
    assert state["s"]["word"] == "new"
