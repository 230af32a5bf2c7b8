"""Runs functions of a test module in several real processes, started as torchrun starts them.

``launch(4, f, g)`` starts 4 processes, forms a gloo group, runs ``f()`` and then ``g()`` in each, and returns what
each of them returned or raised. The functions must stand at the top of an importable module (``tests`` is on the path).

Where it's sound, the processes are forked from one that has imported torch (``warm``): the import costs seconds of CPU
for each. With ``fresh=True`` they are new interpreters.
"""

from __future__ import annotations

import faulthandler
import importlib
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from warm import IS_SOUND, WarmProcess

TIMEOUT_SECONDS = 240.0
"""After so long every process prints its stacks and ends: a hang, not a slow machine."""

GRACE_SECONDS = 20.0
"""Then whatever is still there is killed."""

_TESTS = Path(__file__).parent


@dataclass
class Raised:
    """An exception that a function raised in another process."""

    type_name: str
    message: str
    traceback: str
    failures: dict[int, str] = field(default_factory=dict)
    """Of a ``RankError``."""
    cause: str = ""
    """The type of ``__cause__``."""


@dataclass
class Outcome:
    """What became of one process."""

    rank: int
    exit_code: int
    results: list[Any]
    """For each function that ended: what it returned, or a ``Raised``."""
    output: str

    def __str__(self) -> str:
        raised = [result.traceback for result in self.results if isinstance(result, Raised)]
        return "\n".join([f"rank {self.rank} ended with {self.exit_code}:", *raised, self.output])

    def result(self, position: int = 0) -> Any:
        """What the function at this position returned; fails if it raised or was not reached."""
        assert position < len(self.results), str(self)
        result = self.results[position]
        assert not isinstance(result, Raised), f"rank {self.rank}:\n{result.traceback}\n{self.output}"
        return result

    def raised(self, position: int = 0) -> Raised:
        """What the function at this position raised."""
        assert position < len(self.results), str(self)
        result = self.results[position]
        assert isinstance(result, Raised), f"rank {self.rank} returned {result!r}\n{self.output}"
        return result


def launch(
    num_ranks: int,
    *functions: Callable[..., Any],
    args: Sequence[Any] = (),
    backend: str | None = "gloo",
    agent_store: bool = True,
    environment: Mapping[str, str] | None = None,
    timeout: float = TIMEOUT_SECONDS,
    fresh: bool = False,
) -> list[Outcome]:
    """Run functions in ``num_ranks`` processes; returns when all have ended.

    Args:
        num_ranks: the world size; all ranks are on one host.
        functions: run one after the other in each process; what one raises does not keep the next from running.
        args: given to each of the functions.
        backend: the default process group is formed with it, and destroyed at the end; None forms none.
        agent_store: the store is in this process, as it is in torchrun's agent; else rank 0 holds it.
        environment: more variables.
        timeout: seconds after which every process prints its stacks and ends.
        fresh: the processes are new interpreters, not forks of a warm one.
    """
    options = Options(backend, agent_store, environment, timeout, fresh)
    with started(num_ranks, functions, args, options) as ranks:
        try:
            deadline = time.monotonic() + timeout + GRACE_SECONDS
            for process in ranks.processes:
                process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            pass  # told by the exit code and the output of those that are killed now
        return ranks.outcomes()


@dataclass(frozen=True)
class Options:
    """How processes are started: see ``launch``."""

    backend: str | None = "gloo"
    agent_store: bool = True
    environment: Mapping[str, str] | None = None
    timeout: float = TIMEOUT_SECONDS
    fresh: bool = False


@dataclass
class Ranks:
    """The processes of a launch."""

    job: Path
    processes: list[subprocess.Popen[bytes] | WarmProcess] = field(default_factory=list)

    def outcomes(self) -> list[Outcome]:
        """What became of them; those that have not ended are killed."""
        self.kill()
        return [_outcome(rank, process.wait(), self.job) for rank, process in enumerate(self.processes)]

    def kill(self) -> None:
        """End those that have not ended."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()


@contextmanager
def started(
    num_ranks: int, functions: Sequence[Callable[..., Any]], args: Sequence[Any], options: Options
) -> Iterator[Ranks]:
    """Start processes that run the functions; whichever has not ended when the context does is killed."""
    with tempfile.TemporaryDirectory(prefix="launch-") as folder:
        ranks = Ranks(Path(folder) / "job")
        named = [(function.__module__.rpartition(".")[2], function.__qualname__) for function in functions]
        ranks.job.write_bytes(pickle.dumps((named, list(args), options.backend, options.timeout)))
        # while it's referred to, the store serves
        _store, port = _agent_store() if options.agent_store else (None, _free_port())
        try:
            for rank in range(num_ranks):
                ranks.processes.append(_start(rank, num_ranks, port, ranks.job, options))
            yield ranks
        finally:
            ranks.kill()


def succeed(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The same outcomes, after seeing that every process ended by itself and well."""
    # of every rank: what one of them waits for in vain is known to another
    assert all(outcome.exit_code == 0 for outcome in outcomes), "\n\n".join(map(str, outcomes))
    return list(outcomes)


T = TypeVar("T")


def side_by_side(*calls: Callable[[], T]) -> list[T]:
    """What each of the calls returns, all at the same time: launches that mostly wait for silence wait together."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [each.result() for each in [pool.submit(call) for call in calls]]


def _agent_store() -> tuple[object, int]:
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return store, store.port


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _start(rank: int, num_ranks: int, port: int, job: Path, options: Options) -> subprocess.Popen[bytes] | WarmProcess:
    variables = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(_TESTS), str(_TESTS.parent), os.environ.get("PYTHONPATH", "")]),
    }
    if options.agent_store:
        variables |= {
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RUN_ID": "launch",
            "TORCHELASTIC_RESTART_COUNT": "0",
        }
    variables |= options.environment or {}
    arguments, output = [__file__, str(job), str(rank)], Path(f"{job}.output.{rank}")
    if IS_SOUND and not options.fresh:
        return WarmProcess(arguments, variables, output)
    with output.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, *arguments], env=variables, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
        )


def _outcome(rank: int, exit_code: int, job: Path) -> Outcome:
    results = []
    while (path := Path(f"{job}.result.{rank}.{len(results)}")).exists():
        results.append(pickle.loads(path.read_bytes()))
    output = Path(f"{job}.output.{rank}").read_text(errors="replace")
    return Outcome(rank, exit_code, results, output)


# ------------------------------------------------------------------ in the other process


def _work(job: Path, rank: int) -> None:
    named, args, backend, timeout = pickle.loads(job.read_bytes())
    # should the parent be gone, nobody else ends this process
    faulthandler.dump_traceback_later(timeout, exit=True)
    functions = [getattr(importlib.import_module(module), name) for module, name in named]
    import torch.distributed as dist

    if backend is not None:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    for position, function in enumerate(functions):
        result = result_of(function, args)
        unfinished = Path(f"{job}.unfinished.{rank}")
        unfinished.write_bytes(pickle.dumps(result))
        unfinished.rename(f"{job}.result.{rank}.{position}")
    if dist.is_initialized():
        dist.destroy_process_group()


def result_of(function: Callable[..., Any], args: Sequence[Any]) -> Any:
    """What a function returns, or a ``Raised``."""
    try:
        return function(*args)
    except Exception as error:
        return Raised(
            type(error).__name__,
            str(error),
            traceback.format_exc(),
            dict(getattr(error, "failures", {})),
            "" if error.__cause__ is None else type(error.__cause__).__name__,
        )


if __name__ == "__main__":
    # a function's results are unpickled elsewhere: its classes must not be __main__'s
    importlib.import_module("launch")._work(Path(sys.argv[1]), int(sys.argv[2]))
