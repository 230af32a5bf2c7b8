"""Settings from the environment: what they mean, what is refused, and that overrides put back what they found."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from torchsnapshot import knobs
from torchsnapshot import machine as figures

MIB = 1 << 20

OVERRIDES: list[tuple[Callable[..., AbstractContextManager[None]], str, Callable[[], object], int]] = [
    (knobs.override_max_chunk_size_bytes, knobs.CHUNK_SIZE, knobs.get_max_chunk_size_bytes, 4096),
    (knobs.override_max_shard_size_bytes, knobs.SHARD_SIZE, knobs.get_max_shard_size_bytes, 4096),
    (knobs.override_slab_size_threshold_bytes, knobs.SLAB_SIZE, knobs.get_slab_size_threshold_bytes, 4096),
    (knobs.override_max_per_rank_io_concurrency, knobs.IO_CONCURRENCY, knobs.get_max_per_rank_io_concurrency, 3),
    (knobs.override_is_batching_disabled, knobs.DISABLE_BATCHING, knobs.is_batching_disabled, True),
]
override_cases = pytest.mark.parametrize(
    ("override", "variable", "getter", "value"), OVERRIDES, ids=[case[1] for case in OVERRIDES]
)

NUMBERS: list[tuple[str, Callable[[], object]]] = [
    *((variable, getter) for _, variable, getter, value in OVERRIDES if value is not True),
    (knobs.MEMORY_BUDGET, knobs.get_memory_budget_bytes),
    (knobs.NUM_THREADS, knobs.get_num_threads),
    (knobs.LOCAL_WORLD_SIZE, knobs.get_num_threads),
]
SWITCHES: list[tuple[str, Callable[[], bool], bool]] = [
    (knobs.DISABLE_BATCHING, knobs.is_batching_disabled, False),
    (knobs.ELASTICITY_AT_ROOT_ONLY, knobs.is_sharded_tensor_elasticity_enabled_at_root_only, False),
    (knobs.ALLOW_PICKLE, knobs.is_pickle_allowed, False),
    (knobs.DURABLE, knobs.is_durable, True),
]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees a setting of the machine it runs on."""
    for variable in [*os.environ]:
        if variable.startswith("TORCHSNAPSHOT_") or variable == knobs.LOCAL_WORLD_SIZE:
            monkeypatch.delenv(variable)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], None]:
    """A machine whose ``/proc`` and ``/sys`` hold the given files, with 8 cores."""
    monkeypatch.setattr(figures, "_SYSTEM_ROOT", tmp_path)
    figures._granted_cores.cache_clear()
    figures._find_control_groups.cache_clear()
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)

    def write(files: dict[str, str]) -> None:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return write


@override_cases
def test_override_sets_the_environment_and_the_getter_sees_it(
    override: Callable[..., AbstractContextManager[None]], variable: str, getter: Callable[[], object], value: int
) -> None:
    """Inside the block the variable holds the value as text and the getter returns it; after it, it is gone."""
    with override(value):
        assert os.environ[variable] == str(value)
        assert getter() == value
    assert variable not in os.environ


@override_cases
def test_override_is_undone_when_the_block_raises(
    override: Callable[..., AbstractContextManager[None]],
    variable: str,
    getter: Callable[[], object],
    value: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An exception in the block leaves the variable as it was found, set or not."""

    def fail() -> None:
        with override(value):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert variable not in os.environ
    monkeypatch.setenv(variable, "1")
    with pytest.raises(KeyError):
        fail()
    assert os.environ[variable] == "1"


def test_overrides_nest() -> None:
    """The inner override hides the outer one and gives it back."""
    with knobs.override_max_chunk_size_bytes(100):
        with knobs.override_max_chunk_size_bytes(7):
            assert knobs.get_chunk_size_bytes() == 7
        assert knobs.get_chunk_size_bytes() == 100


@pytest.mark.parametrize(("variable", "getter"), NUMBERS)
@pytest.mark.parametrize("text", ["0", "-1", "4 MiB", "1.5", "true"])
def test_bad_number_is_refused_by_name(
    variable: str, getter: Callable[[], object], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A value that is no positive whole number raises, naming the variable, the value and what is allowed."""
    monkeypatch.setenv(variable, text)
    with pytest.raises(ValueError, match=f"{variable}='{text}': allowed is a whole number of at least 1"):
        getter()


@pytest.mark.parametrize(("variable", "getter", "default"), SWITCHES)
def test_switches(variable: str, getter: Callable[[], bool], default: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A switch knows the usual words in any case, has its default when unset or empty, and refuses all else."""
    assert getter() is default
    monkeypatch.setenv(variable, " ")
    assert getter() is default
    for text, value in {"1": True, "True": True, "on": True, "0": False, "FALSE": False, "no": False}.items():
        monkeypatch.setenv(variable, text)
        assert getter() is value
    monkeypatch.setenv(variable, "maybe")
    with pytest.raises(ValueError, match=f"{variable}='maybe': allowed is one of 1, true"):
        getter()


def test_defaults() -> None:
    """Without any variable the documented defaults hold."""
    assert knobs.get_chunk_size_bytes() == 4 * MIB
    assert knobs.get_memory_budget_bytes() == 256 * MIB
    assert knobs.get_max_per_rank_io_concurrency() == 16
    assert knobs.get_slab_size_threshold_bytes() == 64 * MIB
    assert knobs.get_store_url() is None


def test_chunk_size_comes_from_the_store_unless_overridden() -> None:
    """The default given by the caller counts while no override is set."""
    assert knobs.get_chunk_size_bytes(MIB) == MIB
    with knobs.override_max_chunk_size_bytes(123):
        assert knobs.get_chunk_size_bytes(MIB) == 123


def test_sizes_of_the_old_torchsnapshot_are_harmless() -> None:
    """Its defaults, given as overrides, are cut down to what a blob can hold."""
    with knobs.override_max_chunk_size_bytes(512 * MIB), knobs.override_slab_size_threshold_bytes(128 * MIB):
        assert knobs.get_chunk_size_bytes() == 32 * MIB
        assert knobs.get_slab_size_threshold_bytes() == 64 * MIB


def test_store_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """TORCHSNAPSHOT_STORE names a store."""
    monkeypatch.setenv(knobs.STORE, "s3://bucket/root")
    assert knobs.get_store_url() == "s3://bucket/root"


def test_threads_without_any_limit(machine: Callable[[dict[str, str]], None]) -> None:
    """Every core of the affinity is used where no control group says otherwise."""
    machine({})
    assert knobs.get_num_threads() == 8


@pytest.mark.parametrize(
    ("files", "threads"),
    [
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/cpu.max": "max 100000",
                "sys/fs/cgroup/a/cpu.max": "300000 100000",
            },
            3,
        ),
        ({"proc/self/cgroup": "0::/not/mounted\n", "sys/fs/cgroup/cpu.max": "150000 100000"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "10000 100000"}, 1),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/job\n3:memory:/job\n",
                "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "250000",
                "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            2,
        ),
    ],
    ids=["v2-parent", "v2-root", "less-than-one", "v1"],
)
def test_threads_follow_the_control_group(
    machine: Callable[[dict[str, str]], None], files: dict[str, str], threads: int
) -> None:
    """The tightest cpu limit of the process's control group and those above it counts, at least 1."""
    machine(files)
    assert knobs.get_num_threads() == threads


def test_threads_are_shared_by_the_ranks_of_a_machine(
    machine: Callable[[dict[str, str]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """LOCAL_WORLD_SIZE divides the cores, at least one thread is left, and an explicit number wins over everything."""
    machine({})
    monkeypatch.setenv(knobs.LOCAL_WORLD_SIZE, "4")
    assert knobs.get_num_threads() == 2
    monkeypatch.setenv(knobs.LOCAL_WORLD_SIZE, "100")
    assert knobs.get_num_threads() == 1
    monkeypatch.setenv(knobs.NUM_THREADS, "5")
    assert knobs.get_num_threads() == 5


def test_io_concurrency_limits_threads(machine: Callable[[dict[str, str]], None]) -> None:
    """Somebody who limits requests in flight gets no more worker threads than that."""
    machine({})
    with knobs.override_max_per_rank_io_concurrency(2):
        assert knobs.get_num_threads() == 2
    with knobs.override_max_per_rank_io_concurrency(100):
        assert knobs.get_num_threads() == 8


MEMINFO = {"proc/meminfo": f"MemTotal: 99999999 kB\nMemAvailable: {8 << 20} kB\n"}


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 8 << 30),
        (
            {
                "proc/self/cgroup": "0::/job\n",
                "sys/fs/cgroup/job/memory.max": str(4 << 30),
                "sys/fs/cgroup/job/memory.current": str(3 << 30),
                "sys/fs/cgroup/job/memory.stat": f"anon 1\ninactive_file {1 << 30}\n",
            },
            2 << 30,
        ),
        (
            {
                "proc/self/cgroup": "0::/job\n",
                "sys/fs/cgroup/job/memory.max": "max",
                "sys/fs/cgroup/job/memory.current": "5",
            },
            8 << 30,
        ),
        (
            {
                "proc/self/cgroup": "7:memory:/job\n",
                "sys/fs/cgroup/memory/job/memory.limit_in_bytes": str(2 << 30),
                "sys/fs/cgroup/memory/job/memory.usage_in_bytes": str(3 << 30),
            },
            0,
        ),
    ],
    ids=["machine", "v2", "v2-unlimited", "v1-exceeded"],
)
def test_free_memory(machine: Callable[[dict[str, str]], None], files: dict[str, str], free: int) -> None:
    """Free memory is the least of the machine's and the control group's, whose page cache counts as free."""
    machine(MEMINFO | files)
    assert figures.free_memory_nbytes() == free


def test_staging_budget(machine: Callable[[dict[str, str]], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """An asynchronous take may hold its state, up to this rank's share of a quarter of the free memory."""
    machine(MEMINFO)
    assert knobs.get_staging_budget_bytes(1 << 30) == 1 << 30
    assert knobs.get_staging_budget_bytes(5 << 30) == 2 << 30
    assert knobs.get_staging_budget_bytes(0) == 1
    monkeypatch.setenv(knobs.LOCAL_WORLD_SIZE, "4")
    assert knobs.get_staging_budget_bytes(5 << 30) == 1 << 29
    monkeypatch.setenv(knobs.LOCAL_WORLD_SIZE, "10000")
    assert knobs.get_staging_budget_bytes(5 << 30) == 64 * MIB
    monkeypatch.setenv(knobs.MEMORY_BUDGET, "1000")
    assert knobs.get_staging_budget_bytes(5 << 30) == 1000


def test_base_memory(machine: Callable[[dict[str, str]], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of bases may take this rank's share of an eighth of what would be free without them; 0 forbids them."""
    machine(MEMINFO)
    assert knobs.get_base_memory_bytes() == 1 << 30
    assert knobs.get_base_memory_bytes(8 << 30) == 2 << 30
    monkeypatch.setenv(knobs.LOCAL_WORLD_SIZE, "4")
    assert knobs.get_base_memory_bytes() == 1 << 28
    for text, nbytes in {"0": 0, "12345": 12345}.items():
        monkeypatch.setenv(knobs.BASE_MEMORY, text)
        assert knobs.get_base_memory_bytes() == nbytes
    monkeypatch.setenv(knobs.BASE_MEMORY, "-1")
    with pytest.raises(ValueError, match=f"{knobs.BASE_MEMORY}='-1': allowed is a whole number of at least 0"):
        knobs.get_base_memory_bytes()


def test_this_machine_has_cores_and_memory() -> None:
    """The readings of the real machine are positive."""
    assert figures.available_cores() >= 1
    assert figures.free_memory_nbytes() > 0


def test_workers_of_a_run(machine: Callable[[dict[str, str]], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks of a machine share the requests that a store wants; an explicit limit takes the share's place."""
    machine({})
    assert knobs.get_num_workers(16) == 16
    assert knobs.get_num_workers(4) == knobs.get_num_threads() == 8
    monkeypatch.setenv(knobs.LOCAL_WORLD_SIZE, "4")
    assert knobs.get_num_workers(16) == 4
    monkeypatch.setenv(knobs.LOCAL_WORLD_SIZE, "100")
    assert knobs.get_num_workers(16) == 1
    with knobs.override_max_per_rank_io_concurrency(3):
        assert knobs.get_num_workers(16) == 3


def test_memory_of_a_run_is_shared_by_the_ranks_of_a_machine(
    machine: Callable[[dict[str, str]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A synchronous run takes 256 MiB, less where the ranks together would take too much of the free memory."""
    machine(MEMINFO)
    assert knobs.get_memory_budget_bytes() == 256 * MIB
    monkeypatch.setenv(knobs.LOCAL_WORLD_SIZE, "16")
    assert knobs.get_memory_budget_bytes() == 128 * MIB
    monkeypatch.setenv(knobs.LOCAL_WORLD_SIZE, "1000")
    assert knobs.get_memory_budget_bytes() == 64 * MIB
