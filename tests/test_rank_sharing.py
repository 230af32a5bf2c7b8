"""Ranks that are said to hold the same hash for one another: each its share, and a sample of what the others hash."""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from launch import Outcome, launch, succeed
from rank_states import Net, content, here, is_whole, same, spread, train, values_of
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from torchsnapshot import Snapshot, StateDict
from torchsnapshot.errors import RankError
from torchsnapshot.format.entries import ShardedTensorEntry, spans_of
from torchsnapshot.ranks.sharing import SAMPLE_TAKES
from torchsnapshot.reading.opening import open_snapshot
from torchsnapshot.taking import history

CHUNK_NBYTES = 16 << 10

IN_PACKS = {"TORCHSNAPSHOT_MAX_CHUNK_SIZE_BYTES_OVERRIDE": str(CHUNK_NBYTES)}
ONE_BY_ONE = {**IN_PACKS, "TORCHSNAPSHOT_DISABLE_BATCHING": "1"}

State = dict[str, Any]


def replicas(name: str, num_rows: int = 512) -> StateDict:
    """Two tensors that every rank holds, a small one and a value."""
    return StateDict(
        big=content(f"{name} big", (num_rows, 256)), other=content(f"{name} other", (64, 256)), small=torch.ones(3), n=1
    )


def taken(path: str, state: State, **options: Any) -> int:
    """Take, on the default group; bytes that this rank has hashed."""
    snapshot = Snapshot.take(path, state, replicated=["s/**"], **options)
    assert snapshot.stats is not None
    return snapshot.stats.hashed_nbytes


def nbytes_of(state: Mapping[str, Any]) -> int:
    """The bytes of a state's larger tensors, as they are on this rank."""
    tensors = [value.to_local() if isinstance(value, DTensor) else value for value in state.values()]
    return sum(each.nbytes for each in tensors if isinstance(each, torch.Tensor) and each.nbytes > 256)


def at_most(total: int, num_ranks: int) -> float:
    """The bytes that a rank may hash of what so many share; runs and chunks do not come out even."""
    return total / num_ranks * 1.125 + CHUNK_NBYTES


def error_of(function: Callable[[], Any]) -> str:
    """What a function raises, or that it doesn't."""
    try:
        function()
    except RankError as error:
        return f"RankError: {error}"
    return "no error"


def restored(path: str) -> StateDict:
    """What a snapshot brings back on this rank, into nothing."""
    state: StateDict = StateDict()
    Snapshot(path).restore({"s": state})
    return state


def is_restored(path: str, state: Mapping[str, Any]) -> bool:
    """Whether a snapshot brings the state back, and is in order."""
    target = restored(path)
    equal = [
        same(target[name], value) if isinstance(value, torch.Tensor) else target[name] == value
        for name, value in state.items()
    ]
    return all(equal) and target.keys() == state.keys() and not Snapshot(path).verify()


# ------------------------------------------------------------------ scenarios, each run by all ranks


def bytes_hashed(root: str) -> dict[str, Any]:
    """A first take, one without changes, one where the half of a tensor has changed, and both kinds of no sample."""
    state = replicas("bytes")
    seen: dict[str, Any] = {"state": nbytes_of(state)}
    seen["first"] = taken(f"{root}/bytes-0", {"s": state})
    seen["same"] = taken(f"{root}/bytes-1", {"s": state}, verify_replicas="off")
    state["big"][100:356].add_(1)
    state["n"] = 2
    seen["changed"] = taken(f"{root}/bytes-2", {"s": state})
    seen["changed new"] = Snapshot(f"{root}/bytes-2").head.new_nbytes
    seen["sample"] = seen["changed"]
    for number in range(3, 2 + SAMPLE_TAKES):
        state["n"] = number
        seen["sample"] += taken(f"{root}/bytes-{number}", {"s": state})
    seen["full"] = taken(f"{root}/bytes-full", {"s": state}, verify_replicas="full")
    seen["again"] = taken(f"{root}/bytes-off", {"s": state}, verify_replicas="off")
    state["n"] = 2
    seen["restored"] = is_restored(f"{root}/bytes-2", state)
    return seen


def silent_divergence(root: str) -> dict[str, str]:
    """One element of one rank changes silently, before the first take and after it; each way to look for that."""
    rank, world_size = here()
    seen = {}
    state = replicas("divergence", 480)
    state["big"][7, 7] += int(rank == 1)
    seen["first"] = error_of(lambda: taken(f"{root}/unequal-first", {"s": state}))
    state["big"][7, 7] -= int(rank == 1)
    taken(f"{root}/equal", {"s": state})
    state["big"][7, 7] += int(rank == world_size - 1)
    seen["off"] = error_of(lambda: taken(f"{root}/unequal-off", {"s": state}, verify_replicas="off"))
    value = restored(f"{root}/unequal-off")["big"]
    values = [torch.empty_like(value) for _ in range(world_size)]
    dist.all_gather(values, value)
    seen["one value"] = str(all(same(each, value) for each in values))
    expected = content("divergence big", (480, 256))
    seen["off by"] = str(int((value - expected).abs().sum()))
    seen["full"] = error_of(lambda: taken(f"{root}/unequal-full", {"s": state}, verify_replicas="full"))
    for number in range(SAMPLE_TAKES):
        seen["sample"] = error_of(lambda: taken(f"{root}/unequal-sample-{number}", {"s": state}))  # noqa: B023
        if seen["sample"] != "no error":
            break
    state["n"] = rank
    seen["value"] = error_of(lambda: taken(f"{root}/unequal-value", {"s": state}, verify_replicas="off"))
    return seen


def ways_out(root: str) -> dict[str, list[int]]:
    """What keeps ranks from sharing costs one full take on every rank; then they share again."""
    rank, _ = here()
    state = replicas("ways out", 300)
    seen: dict[str, list[int]] = {}

    def look(name: str, state: StateDict, **options: Any) -> None:
        path = f"{root}/out {name}"
        hashed = [taken(path, {"s": state}, **options)]
        assert is_restored(path, state), name
        hashed += [taken(f"{path} {number}", {"s": state}, verify_replicas="off") for number in range(2)]
        assert is_restored(f"{path} 1", state), name
        seen[name] = [nbytes_of(state), *hashed]

    look("first", state)
    if rank == 1:
        history.forget()
    look("a rank forgets", state)
    state["big"] = state["big"].double()
    look("other dtype", state)
    state["more"] = content("more", (100, 256))
    look("more", state)
    extra = StateDict(state | ({"of one rank": content("one", (100, 256))} if rank == 1 else {}))
    look("one rank has more", extra)
    Snapshot(f"{root}/out first").restore({"s": replicas("other", 300)})
    look("after a restore", state)
    Snapshot.take(f"{root}/out undeclared", {"s": state})
    look("after a take without globs", state)
    return seen


def options_differ(root: str) -> list[str]:
    """What rank 0 logs where another rank gives another value, and that its own counts."""
    rank, _ = here()
    logged: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("torchsnapshot").addHandler(handler)
    state = replicas("options")
    taken(f"{root}/options-0", {"s": state})
    verify = "off" if rank == 0 else "full"
    assert taken(f"{root}/options-1", {"s": state}, verify_replicas=verify) < nbytes_of(state)
    logging.getLogger("torchsnapshot").removeHandler(handler)
    return [text for text in logged if "verify_replicas" in text]


def ddp_training(root: str) -> list[str]:
    """A DDP job that takes after each step, in turn in the foreground and in the background; what is wrong."""
    model = torch.nn.parallel.DistributedDataParallel(Net("sharing", 300))
    optimizer = torch.optim.AdamW(model.parameters())
    wrong, before, hashed = [], {}, []
    pending = []
    state = {"model": model, "optim": optimizer}
    for step in range(5):
        train(model, optimizer, 1, start=step)
        before[step] = values_of({key: each.state_dict() for key, each in state.items()})
        if step % 2:
            handle = Snapshot.async_take(f"{root}/ddp-{step}", state, replicated=["optim/**"])
            pending.append(handle)
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            hashed.append(handle.stats.hashed_nbytes)
        else:
            taken_ = Snapshot.take(f"{root}/ddp-{step}", state, replicated=["optim/**"])
            assert taken_.stats is not None
            hashed.append(taken_.stats.hashed_nbytes)
        optimizer.zero_grad()
    for handle in pending:
        handle.wait()
    if not max(hashed[1:]) < 0.75 * hashed[0]:
        wrong.append(f"hashed {hashed}")
    other = torch.nn.parallel.DistributedDataParallel(Net("other", 300))
    fresh = torch.optim.AdamW(other.parameters(), lr=9.0)
    for step in range(5):
        Snapshot(f"{root}/ddp-{step}").restore({"model": other, "optim": fresh})
        after = values_of({"model": other.state_dict(), "optim": fresh.state_dict()})
        wrong += [f"{step} {path}" for path in before[step] if not _equal(before[step][path], after.get(path))]
        wrong += [f"{step} {problem}" for problem in Snapshot(f"{root}/ddp-{step}").verify()]
    return wrong


def _equal(one: Any, other: Any) -> bool:
    return same(one, other) if isinstance(one, torch.Tensor) else bool(one == other)


def changed_in_flight(root: str) -> bool:
    """Tensors change as soon as an asynchronous take has returned, on the ranks that hash them and on all others."""
    state = replicas("in flight")
    taken(f"{root}/flight-0", {"s": state})
    kept = []
    pending = []
    for number in range(1, 4):
        state["big"][number * 50 :].add_(1)
        kept.append(StateDict({name: value.clone() if name != "n" else 1 for name, value in state.items()}))
        pending.append(
            Snapshot.async_take(f"{root}/flight-{number}", {"s": state}, replicated=["s/**"], busy="overlap")
        )
        state["big"].zero_()
    for handle in pending:
        handle.wait()
    return all(is_restored(f"{root}/flight-{number}", kept[number - 1]) for number in range(1, 4))


def spread_replicas(root: str) -> dict[str, Any]:
    """Tensors that a mesh replicates in one dimension and shards in the other, or replicates only."""
    rank, world_size = here()
    mesh = DeviceMesh("cpu", torch.arange(world_size).reshape(2, -1), _init_backend=False)
    full = {"a": content("spread a", (256, 256)), "b": content("spread b", (64, 256)), "c": content("c", (90, 256))}

    def made() -> StateDict:
        state = StateDict({name: spread(full[name], mesh, [Replicate(), Shard(0)]) for name in ("a", "b")})
        state["c"] = spread(full["c"], mesh, [Replicate(), Replicate()])
        return state

    state = made()
    seen: dict[str, Any] = {"state": nbytes_of(state)}
    seen["first"] = taken_undeclared(f"{root}/spread-0", state)
    seen["off"] = taken_undeclared(f"{root}/spread-1", state, verify_replicas="off")
    for name in full:
        full[name][3:70] += 1
    state = made()
    seen["changed"] = taken_undeclared(f"{root}/spread-2", state)
    target = made()
    for tensor in target.values():
        tensor.to_local().zero_()
    Snapshot(f"{root}/spread-2").restore({"s": target})
    seen["restored"] = all(is_whole(target[name], full[name]) for name in full)
    whole: dict[str, Any] = Snapshot(f"{root}/spread-2").get_state_dict_for_key("s")
    seen["whole"] = all(same(whole[name], full[name]) for name in full)
    seen["problems"] = [str(problem) for problem in Snapshot(f"{root}/spread-2").verify()]
    if rank == world_size - 1:
        state["a"].to_local()[-1, -1] += 1
    seen["unequal"] = "no error"
    for number in range(SAMPLE_TAKES):
        if seen["unequal"] == "no error":
            path = f"{root}/spread-unequal-{number}"
            seen["unequal"] = error_of(lambda: taken_undeclared(path, state))  # noqa: B023
    return seen


def taken_undeclared(path: str, state: StateDict, **options: Any) -> int:
    """Take without globs; bytes that this rank has hashed."""
    snapshot = Snapshot.take(path, {"s": state}, **options)
    assert snapshot.stats is not None
    return snapshot.stats.hashed_nbytes


def contents_of(path: str) -> dict[str, Any]:
    """Every entry of every rank, with the digests of its chunks instead of where they are."""
    manifest = open_snapshot(path).manifest
    found: dict[str, Any] = {}
    for rank in manifest.ranks:
        for name, entry in manifest.entries_of(rank).items():
            digests = [digest for span in spans_of(entry) for digest in manifest.digests(span)]
            kind = (entry.shape, entry.dtype, entry.cell) if isinstance(entry, ShardedTensorEntry) else ()
            inline = getattr(entry, "inline", None), getattr(entry, "data", None)
            found[f"{rank}/{name}"] = type(entry).__name__, kind, inline, digests
    return found


def same_as_in_full(root: str) -> list[str]:
    """States that change at random, each taken twice: shared, and in full into a store of its own; what differs."""
    rank, world_size = here()
    lots, wrong = random.Random(f"lots {world_size}"), []
    mesh = DeviceMesh("cpu", torch.arange(world_size).reshape(2, -1), _init_backend=False)
    tensors: dict[str, torch.Tensor] = {}
    for number in range(14):
        for _ in range(lots.randint(1, 3)):
            name = lots.choice("abcdef")
            act = lots.choice(["make", "change", "change", "change", "drop", "tie"])
            if act == "make" or name not in tensors:
                shape = lots.choice([(200, 64), (3, 5000), (40,), (9000,), (64, 64)])
                tensors[name] = content(f"{number} {name}", shape, lots.choice([torch.float32, torch.int16]))
            elif act == "change":
                tensors[name] = tensors[name].clone()
                tensors[name].view(-1)[lots.randrange(tensors[name].numel()) :] += 1
            elif act == "drop":
                del tensors[name]
            else:
                tensors["tied"] = tensors[name]
        state = StateDict(tensors)
        state["mine"] = content(f"mine {rank} {number // 3}", (5000,))
        state["undeclared"] = content(f"undeclared {number // 2}", (5000,))
        if tensors and number % 5 > 1:
            state["mesh"] = spread(content(f"mesh {number // 4}", (64, 100)), mesh, [Replicate(), Shard(0)])
        globs = [f"s/{name}" for name in [*"abcdef", "tied"]]
        for kind in ("sample", "full"):
            Snapshot.take(f"{root} {kind}/{number}", {"s": state}, replicated=globs, verify_replicas=kind)  # type: ignore[arg-type]
        paths = [f"{root} {kind}/{number}" for kind in ("sample", "full")]
        heads = [Snapshot(path).head for path in paths]
        for field in ("state_nbytes", "num_chunks", "new_nbytes", "num_new_chunks"):
            if getattr(heads[0], field) != getattr(heads[1], field):
                wrong.append(f"{number} {field}: {[getattr(head, field) for head in heads]}")
        one, other = (contents_of(path) for path in paths)
        wrong += [f"{number} {path}" for path in one.keys() | other.keys() if one.get(path) != other.get(path)]
        wrong += [f"{number} {problem}" for problem in Snapshot(paths[0]).verify()]
    return wrong


# ------------------------------------------------------------------ what they show


def check_bytes(outcomes: list[Outcome]) -> None:
    """Hold the bytes that ranks have hashed against what they should hash."""
    num_ranks = len(outcomes)
    every = [outcome.result(0) for outcome in outcomes]
    total = every[0]["state"]
    share, slack = total / num_ranks, at_most(total, num_ranks) - total / num_ranks
    for seen in every:
        assert seen["first"] == seen["full"] == total
        for name in ("same", "again"):
            assert abs(seen[name] - share) <= slack
        # SAMPLE_TAKES takes: a share in each, and all that the others hash once
        assert abs(seen["sample"] - (SAMPLE_TAKES * share + total - share)) <= SAMPLE_TAKES * slack
        assert seen["restored"]
        assert 256 * 1024 <= seen["changed new"] <= 256 * 1024 + 2 * CHUNK_NBYTES
    assert sum(seen["same"] for seen in every) == total


def check_divergence(seen: dict[str, str], num_ranks: int) -> None:
    """Found at the first take, by "full" at once, by the sample within its bound, and not at all where it is off."""
    for name, culprit in (("first", 1), ("full", num_ranks - 1), ("sample", num_ranks - 1)):
        found = re.search(r"s/big: ranks (\d) and (\d) are replicas, but their contents differ", seen[name])
        assert found is not None, (name, seen[name])
        assert str(culprit) in found.groups()
        assert "s/other" not in seen[name]
    assert seen["off"] == "no error"
    assert seen["one value"] == "True"
    assert seen["off by"] in ("0", "1")
    assert "s/n: ranks" in seen["value"]


def test_two_ranks_share_hashing(tmp_path: Path) -> None:
    """Each rank hashes its half and a sample; what keeps them from that costs one take; what differs is found."""
    functions = (bytes_hashed, silent_divergence, ways_out, options_differ, ddp_training)
    outcomes = succeed(launch(2, *functions, args=[str(tmp_path / "root")], environment=IN_PACKS))
    check_bytes(outcomes)
    for outcome in outcomes:
        check_divergence(outcome.result(1), 2)
        for name, (total, first, second, third) in outcome.result(2).items():
            assert first == total, name
            # a leaf that one rank has alone is nobody else's to hash
            alone = 100 * 256 * 4 if name == "one rank has more" and outcome.rank == 1 else 0
            assert max(second, third) <= at_most(total - alone, 2) + alone, name
        assert bool(outcome.result(3)) == (outcome.rank == 0)
        assert outcome.result(4) == []


def test_four_ranks_share_hashing(tmp_path: Path) -> None:
    """The same for more ranks, for meshes that replicate, and beside training; what is stored is what "full" stores."""
    functions = (bytes_hashed, silent_divergence, changed_in_flight, spread_replicas, same_as_in_full)
    outcomes = succeed(launch(4, *functions, args=[str(tmp_path / "root")], environment=ONE_BY_ONE))
    check_bytes(outcomes)
    for outcome in outcomes:
        check_divergence(outcome.result(1), 4)
        assert outcome.result(2)
        seen = outcome.result(3)
        assert seen["first"] == seen["state"]
        assert seen["off"] <= at_most(seen["state"], 2) + CHUNK_NBYTES
        assert seen["off"] <= seen["changed"] < seen["state"]
        assert seen["restored"]
        assert seen["whole"]
        assert seen["problems"] == []
        assert re.search(r"s/a: ranks \d and \d hold the same part", seen["unequal"]), seen["unequal"]
        assert outcome.result(4) == []
