"""What ranks hold comes back, whatever has become of their number and of their meshes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import rank_states
import torch
from launch import Outcome, launch, succeed

from torchsnapshot import Snapshot, StateDict
from torchsnapshot.errors import MismatchError
from torchsnapshot.tricks import ModelState


def test_replicas_are_written_once(tmp_path: Path) -> None:
    """What ranks hold alike costs bytes once, declared or not; where declared replicas differ, that is an error."""
    root = str(tmp_path / "ranks")
    outcomes = succeed(
        launch(
            4,
            rank_states.take_ddp,
            rank_states.undeclared_replicas,
            rank_states.unequal_replicas,
            rank_states.unequal_holders,
            args=[root],
        )
    )
    model = rank_states.Net("ddp", 3000)
    optimizer = torch.optim.AdamW(model.parameters())
    rank_states.train(model, optimizer, 2)
    alone = Snapshot.take(f"{tmp_path}/alone/ddp", {"model": model, "optim": optimizer})
    assert alone.stats is not None
    head_nbytes = {outcome.result()[0] for outcome in outcomes}
    assert head_nbytes == {alone.stats.new_nbytes + 4 * 5000 * 4}
    each = [outcome.result()[1] for outcome in outcomes]
    assert sum(each) == alone.stats.new_nbytes + 4 * 5000 * 4
    assert max(each) < 1.5 * min(each)
    assert all(outcome.result()[2] == [] for outcome in outcomes)
    check_undeclared(outcomes)
    for outcome in outcomes:
        assert outcome.result(2).startswith("RankError")
        assert re.search("s/other: ranks (2 and [013]|[013] and 2) are replicas", outcome.result(2))
        assert "s/same" not in outcome.result(2)
        assert outcome.result(3).startswith("RankError")
        assert re.search("s/x/t: ranks (3 and 1|1 and 3) hold the same part", outcome.result(3))


def check_undeclared(outcomes: list[Outcome]) -> None:
    """Hold what the manifest shows against what the old torchsnapshot shows."""
    for outcome in outcomes:
        nbytes, shown = outcome.result(1)
        assert nbytes == 4 * (70_000 + 9000)
        assert "0/s/t:True" in shown
        assert "0/s/n:True" in shown
        assert "0/s/nested/u:True" in shown
        assert "0/s/nested/l/1:True" in shown
        assert not {"1/s/t:True", "3/s/n:True", "2/s/nested/u:True"} & set(shown)
        assert {f"{rank}/s/mine:False" for rank in range(4)} <= set(shown)
        assert {f"{rank}/s/word:False" for rank in range(4)} <= set(shown)
        assert {f"{rank}/s/nested:" for rank in range(4)} <= set(shown)


def test_sharded_models_resume_anywhere(tmp_path: Path) -> None:
    """Models and optimizers under FSDP2, HSDP and tensor parallelism come back bit by bit on any number of ranks."""
    root = str(tmp_path)
    functions = (rank_states.take_nets, rank_states.wrapped_names, rank_states.restore_nets)
    for outcome in succeed(launch(4, *functions, args=[root])):
        assert outcome.result() == []
        assert "MismatchError" in outcome.result(1)
        assert "module." in outcome.result(1)
        assert "rename=" in outcome.result(1)
        assert outcome.result(2) == []
    for outcome in succeed(launch(2, rank_states.restore_nets, args=[root])):
        assert outcome.result() == []


def test_pipelines_are_cut_anew(tmp_path: Path) -> None:
    """Stages that hold other tensors under the same names stay apart; with ModelState any number of stages goes."""
    root = str(tmp_path)
    functions = (rank_states.take_pipeline, rank_states.restore_pipeline, rank_states.take_tensor_parallel)
    for outcome in succeed(launch(4, *functions, args=[root])):
        assert outcome.result() == []
        assert outcome.result(1) == []
        outcome.result(2)
    for outcome in succeed(launch(2, rank_states.restore_pipeline, args=[root])):
        assert outcome.result() == []
    for kind in ("adamw", "sgd"):
        model = rank_states.Stage(range(4), "other")
        optimizer = rank_states.optimizer_of(model, kind)
        Snapshot(f"{root}/pp-{kind}").restore({"train": ModelState(model, optimizer)})
        assert rank_states.check_stage(model, optimizer, range(4), kind) == []
    bare = rank_states.Stage(range(4), "other")
    with pytest.raises(MismatchError, match="ModelState"):
        Snapshot(f"{root}/pp-bare").restore({"model": bare})
    Snapshot(f"{root}/pp-plain").restore({"model": bare})
    whole = rank_states.Stage(range(4), "pp")
    rank_states.stepped(whole, "adamw")
    assert rank_states.differences(bare.state_dict(), whole.state_dict()) == []
    # two meshes with the same tensors are replicas, not stages
    net, expected = rank_states.Net("other"), rank_states.Net("tp")
    optimizer = torch.optim.AdamW(net.parameters())
    Snapshot(f"{root}/tp").restore({"model": net, "optim": optimizer})
    reference = rank_states.stepped(expected, "adamw")
    assert rank_states.differences(net.state_dict(), expected.state_dict()) == []
    assert rank_states.differences(optimizer.state_dict(), reference.state_dict()) == []


def test_other_ways_to_give_state(tmp_path: Path) -> None:
    """FSDP1's full state dicts, torch's own ``get_state_dict``, and tensors that only some ranks have."""
    root = str(tmp_path)
    functions = (rank_states.fully_sharded_1, rank_states.state_dicts_of_torch, rank_states.sub_meshes)
    for outcome in succeed(launch(4, *functions, args=[root])):
        for position in range(len(functions)):
            assert outcome.result(position) == []
    for outcome in succeed(launch(2, rank_states.restore_sub_meshes, args=[root])):
        assert outcome.result() == []
    everything: StateDict = StateDict()
    Snapshot(f"{root}/sub").restore({"s": everything})
    for name, _ in rank_states.SUB_MESHES:
        assert rank_states.same(everything[name], rank_states.content(name, (21, 5)))
