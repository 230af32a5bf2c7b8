"""Processes that start in a moment: forked from one that has imported torch and done nothing else.

What lives here: the server that forks, and its client, ``WarmProcess``, which is used like a ``subprocess.Popen``. What
doesn't: which processes a test needs (``launch``).

``import torch`` costs seconds of CPU, so a test of eight ranks is mostly imports. The server imports once. It never
starts a thread, makes no process group and calls nothing of the library: each child begins where a new interpreter is
after its imports, and ends as an interpreter ends. Only the seed of ``hash()`` is the same in all children.

Invariant: a child ends at the latest when its ``WarmProcess`` or the server is gone.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

PRELOADED = (
    "torch", "torch.distributed.tensor.parallel", "torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict",
    # an optimizer imports it at its first step
    "torch._dynamo",
    "hypothesis", "numpy", "pytest", "torchsnapshot",
)  # fmt: skip

IS_SOUND = sys.platform == "linux"
"""Elsewhere libraries of the system may have started threads that a fork loses."""


class WarmProcess:
    """A Python script that runs in a process of its own.

    Args:
        arguments: the script and its arguments.
        environment: all of its variables. ``PYTHONPATH`` and what torch reads on import are those of the server.
        output: the file that gets its stdout and stderr.
        folder: where it runs; None: here.
    """

    def __init__(
        self, arguments: Sequence[str], environment: Mapping[str, str], output: Path, folder: Path | None = None
    ) -> None:
        self.returncode: int | None = None
        self._connection = socket.socket(socket.AF_UNIX)
        with _starting:
            self._connection.connect(_server_address())
        request = [list(arguments), dict(environment), str(output), str(folder or Path.cwd())]
        self._connection.sendall(json.dumps(request).encode() + b"\n")
        self._received = b""
        self.pid = self._next_number()

    def wait(self, timeout: float | None = None) -> int:
        """See ``Popen.wait``."""
        if self.returncode is None:
            self._connection.settimeout(timeout)
            try:
                self.returncode = self._next_number()
            except TimeoutError:
                raise subprocess.TimeoutExpired("warm process", timeout or 0) from None
            self._connection.close()
        return self.returncode

    def kill(self) -> None:
        """See ``Popen.kill``."""
        if self.returncode is None:
            # the server may have told the end, and closed its side, already
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self._connection.sendall(b"kill")

    def _next_number(self) -> int:
        """The server says two things, each a number in a line: the id of the process, and how it has ended."""
        while b"\n" not in self._received:
            received = self._connection.recv(100)
            assert received, "the server of warm processes has ended"
            self._received += received
        line, _, self._received = self._received.partition(b"\n")
        return int(line)


def run_script(*arguments: object, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a Python script in a process of its own until it ends, a warm one where that is sound.

    Args:
        arguments: the script and its arguments.
        folder: where it runs; None: here.

    Returns:
        Its exit status; ``stdout`` holds stderr, too.
    """
    words = [str(each) for each in arguments]
    if not IS_SOUND:
        command = [sys.executable, *words]
        return subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with tempfile.NamedTemporaryFile("r") as output:
        process = WarmProcess(words, os.environ, Path(output.name), folder)
        return subprocess.CompletedProcess(words, process.wait(), output.read())


_starting = threading.Lock()


@functools.cache
def _server_address() -> str:
    """Start the server, at the first call; it ends with this process."""
    folder = tempfile.mkdtemp(prefix="warm-")
    address = f"{folder}/socket"
    tests = Path(__file__).parent
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")]),
    }
    server = subprocess.Popen(
        [sys.executable, __file__, address], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert server.stdin is not None
    assert server.stdout is not None
    atexit.register(_stop, server, folder)
    assert server.stdout.readline() == b"ready\n"
    return address


def _stop(server: subprocess.Popen[bytes], folder: str) -> None:
    assert server.stdin is not None
    server.stdin.close()
    server.wait()
    for file in Path(folder).iterdir():
        file.unlink()
    os.rmdir(folder)


# ------------------------------------------------------------------ in the server


class _Server:
    """Forks a child for each connection, and tells its end there."""

    def __init__(self, address: str) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(address)
        self._listener.listen(64)
        self._ended, wakes = socket.socketpair()
        for end in (self._ended, wakes):
            end.setblocking(False)
        self._wakes = wakes
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)
        self._running: dict[int, socket.socket] = {}
        self._selector = selectors.DefaultSelector()
        for file in (sys.stdin, self._listener, self._ended):
            self._selector.register(file, selectors.EVENT_READ)

    def serve(self) -> list[str] | None:
        """Returns in each child, what it is to run; and None in the server, when nobody needs it any more."""
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is sys.stdin:
                    for pid in self._running:
                        os.kill(pid, signal.SIGKILL)
                    return None
                if key.fileobj is self._listener:
                    arguments = self._accept()
                    if arguments is not None:
                        return arguments
                elif key.fileobj is self._ended:
                    with contextlib.suppress(BlockingIOError):
                        self._ended.recv(4096)
                elif key.data in self._running:
                    # asked to kill it, or nobody is there to ask
                    os.kill(key.data, signal.SIGKILL)
                    self._selector.unregister(key.fileobj)
            self._reap()

    def _accept(self) -> list[str] | None:
        connection, _ = self._listener.accept()
        with connection.makefile("r") as file:
            request = file.readline()
        if not request:
            connection.close()
            return None
        pid = os.fork()
        if pid == 0:
            return self._become(*json.loads(request), connection)
        connection.sendall(f"{pid}\n".encode())
        self._running[pid] = connection
        self._selector.register(connection, selectors.EVENT_READ, pid)
        return None

    def _become(
        self, arguments: list[str], environment: dict[str, str], output: str, folder: str, connection: socket.socket
    ) -> list[str]:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._selector.close()
        for each in (self._listener, self._ended, self._wakes, connection, *self._running.values()):
            each.close()
        with open(os.devnull) as nothing, open(output, "wb") as file:
            os.dup2(nothing.fileno(), 0)
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        return arguments

    def _reap(self) -> None:
        while self._running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            connection = self._running.pop(pid)
            with contextlib.suppress(KeyError):
                self._selector.unregister(connection)
            with contextlib.suppress(BrokenPipeError):
                connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
            connection.close()


def _serve() -> None:
    for module in PRELOADED:
        importlib.import_module(module)
    # what a collection touches, a child has to copy
    gc.collect()
    gc.freeze()
    num_threads = len(os.listdir("/proc/self/task"))
    assert num_threads == 1, f"an import has started {num_threads - 1} threads, which a fork would lose"
    server = _Server(sys.argv[1])
    print("ready", flush=True)
    arguments = server.serve()
    if arguments is not None:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    _serve()
