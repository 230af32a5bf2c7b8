"""Which snapshots a policy keeps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_takes import Time, missing_blobs, new_store, take

from torchsnapshot.store.gc import collect
from torchsnapshot.store.repository import Repository, SnapshotInfo
from torchsnapshot.store.retention import plan_retention, retain, step_number


def store_with(*names: str) -> Repository:
    """A store with these snapshots, committed in this order."""
    time = Time()
    repository = new_store(time)
    for name in names:
        take(repository, name, b"shared", name.encode(), time=time)
    return repository


STEPS = store_with("run/step_500", "best", "run/step_1000", "run/step_1500", "run/step_2000", "run/step_2100")


def kept(**policy: object) -> list[str]:
    """The names that this policy keeps of ``STEPS``."""
    plan = plan_retention(STEPS.list_snapshots(), **policy)  # type: ignore[arg-type]
    return [info.name for info, _ in plan.keep]


@pytest.mark.parametrize(
    ("name", "step"),
    [("step_100", 100), ("run7/step-0042", 42), ("epoch=3-step=70", 70), ("run7/best", None), ("v2/7b/12", 12)],
)
def test_the_step_is_the_last_integer_of_the_last_component(name: str, step: int | None) -> None:
    """Numbers in folders above, or before it, do not count."""
    assert step_number(name) == step


def test_rules_add_up() -> None:
    """A snapshot stays if any rule keeps it."""
    assert kept(last=2) == ["run/step_2000", "run/step_2100"]
    assert kept(every=1000) == ["run/step_1000", "run/step_2000", "run/step_2100"]
    assert kept(keep=["best*"]) == ["best", "run/step_2100"]
    assert kept(keep=["run/*"]) == [f"run/step_{step}" for step in (500, 1000, 1500, 2000, 2100)]
    assert kept(last=1, every=1000, keep=["best"]) == ["best", "run/step_1000", "run/step_2000", "run/step_2100"]
    assert kept(last=99) == [info.name for info in STEPS.list_snapshots()]


def test_each_kept_snapshot_comes_with_its_reasons() -> None:
    """The plan says why."""
    plan = plan_retention(STEPS.list_snapshots(), last=2, every=1000)
    reasons = {info.name: why for info, why in plan.keep}
    assert reasons["run/step_2000"] == ("one of the last 2", "step 2000 is a multiple of 1000")
    assert reasons["run/step_1000"] == ("step 1000 is a multiple of 1000",)


@pytest.mark.parametrize("policy", [{}, {"last": 0}, {"every": 0}, {"last": -1, "every": 5}])
def test_a_policy_that_would_keep_nothing_is_refused(policy: dict[str, int]) -> None:
    """Nobody deletes everything by leaving out a number."""
    with pytest.raises(ValueError, match="at least"):
        plan_retention([], **policy)  # type: ignore[arg-type]


@given(
    st.integers(0, 6),
    st.none() | st.integers(1, 8),
    st.none() | st.integers(1, 3000),
    st.lists(st.sampled_from(["best", "*", "run/*", "nothing"]), max_size=2),
)
def test_a_plan_divides_the_snapshots_and_keeps_the_newest(
    count: int, last: int | None, every: int | None, keep: list[str]
) -> None:
    """Every snapshot is either kept or dropped, in order; the newest is always kept; the last n are."""
    if last is None and every is None and not keep:
        return
    snapshots: list[SnapshotInfo] = STEPS.list_snapshots()[:count]
    plan = plan_retention(snapshots, last=last, every=every, keep=keep)
    held = [info for info, _ in plan.keep]
    assert sorted([*held, *plan.drop], key=snapshots.index) == snapshots
    assert held == sorted(held, key=snapshots.index)
    assert all(reasons for _, reasons in plan.keep)
    if snapshots:
        assert held[-1] == snapshots[-1]
    if last is not None:
        assert held[-min(last, len(held)) :] == snapshots[-last:][-len(held) :]


def test_retain_removes_what_the_plan_drops() -> None:
    """The others stay whole, and gc frees what only the dropped ones held."""
    repository = store_with("step_1", "step_2", "step_3", "step_4")
    take(repository, "step_1", b"shared", b"a second generation")
    assert [info.name for info in retain(repository, last=1, dry_run=True).drop] == ["step_2", "step_3", "step_4"]
    assert len(repository.list_snapshots()) == 4
    retain(repository, last=1, every=4)
    assert [info.name for info in repository.list_snapshots()] == ["step_4", "step_1"]
    report = collect(repository, clock=Time())
    assert report.freed_blobs == 3
    assert missing_blobs(repository) == {}


def test_retain_spares_what_is_committed_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """A re-take of a dropped snapshot that commits after the plan stays."""
    repository = store_with("step_1", "step_2")
    before = repository.list_snapshots()
    newer = take(repository, "step_1", b"newer")
    monkeypatch.setattr(repository, "list_snapshots", lambda _: before)
    plan = retain(repository, last=1)
    assert [info.name for info in plan.drop] == ["step_1"]
    newest = repository.newest_committed("step_1")
    assert newest is not None
    assert newest.manifest == newer.manifest
