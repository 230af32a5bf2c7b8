"""Server processes of the tests: S3 (moto), GCS (tests/gcs_server.py), and a proxy in this process that breaks things.

Each is a context manager: it takes a free port of the loopback interface, waits until the server accepts connections,
and ends it on the way out.
"""

from __future__ import annotations

import http.client
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

TESTS = Path(__file__).parent


class ServerDiedError(RuntimeError):
    """A server process ended before it accepted connections; carries what it printed."""


@contextmanager
def moto_server() -> Iterator[str]:
    """An S3 service in a process of its own; yields its URL."""
    with _server(lambda port: [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]) as url:
        yield url


@contextmanager
def gcs_server() -> Iterator[str]:
    """A GCS service in a process of its own; yields its URL."""
    with _server(lambda port: [sys.executable, str(TESTS / "gcs_server.py"), str(port)]) as url:
        yield url


@contextmanager
def _server(command: Callable[[int], list[str]]) -> Iterator[str]:
    """Start ``command(port)`` on a free port; another process may take the port first, so a few are tried."""
    for attempt in range(5):
        port = free_port()
        process = subprocess.Popen(
            command(port),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONWARNINGS": "ignore"},
        )
        try:
            try:
                _drain_until_ready(process, port)
            except ServerDiedError:
                if attempt == 4:
                    raise
                continue
            yield f"http://127.0.0.1:{port}"
            return
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait()
            assert process.stderr is not None
            process.stderr.close()


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _drain_until_ready(process: subprocess.Popen[bytes], port: int) -> None:
    """Return when the port accepts connections; from then on a thread throws away what the server logs."""
    assert process.stderr is not None
    logged = b""
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            break
        except OSError:
            if process.poll() is not None:
                logged += process.stderr.read()
                raise ServerDiedError(logged.decode(errors="replace")) from None
            # wait for it to say something, at most a moment
            if select.select([process.stderr], [], [], 0.05)[0]:
                logged += os.read(process.stderr.fileno(), 1 << 16)
    number = os.dup(process.stderr.fileno())

    def drain() -> None:
        with os.fdopen(number, "rb", buffering=0) as pipe:
            while pipe.read(1 << 16):
                pass

    threading.Thread(target=drain, daemon=True).start()


@dataclass
class Fault:
    """What the proxy does instead of, or after, forwarding a request.

    ``status`` with ``body``: answer this. ``drop``: close the connection without an answer. ``forward_first``: let the
    server handle the request all the same (the answer is lost). ``cut``: give the server's answer, but close the
    connection in the middle of its body.
    """

    status: int = 503
    body: bytes = b""
    drop: bool = False
    forward_first: bool = False
    cut: bool = False


@dataclass
class FaultProxy:
    """Forwards to a server; ``decide(method, path)`` may return a fault for a request. Records what it has seen.

    ``authorizations`` are the requests' headers of that name, ``num_connections`` those that were ever made to it.
    """

    target: str
    decide: Callable[[str, str], Fault | None] = lambda method, path: None
    seen: list[tuple[str, str]] = field(default_factory=list)
    authorizations: set[str] = field(default_factory=set)
    num_connections: int = 0
    url: str = ""

    def fail_next(self, count: int, fault: Fault, *, method: str = "", contains: str = "") -> None:
        """Let the next ``count`` requests that match fail."""
        remaining = [count]
        lock = threading.Lock()

        def decide(request_method: str, path: str) -> Fault | None:
            with lock:
                if remaining[0] and method in ("", request_method) and contains in path:
                    remaining[0] -= 1
                    return fault
            return None

        self.decide = decide


@contextmanager
def fault_proxy(target: str) -> Iterator[FaultProxy]:
    """A proxy to ``target`` (a URL) that injects faults."""
    proxy = FaultProxy(target)
    address = target.removeprefix("http://")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            proxy.num_connections += 1
            super().setup()

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            proxy.seen.append((self.command, self.path))
            proxy.authorizations.add(self.headers.get("Authorization") or "")
            fault = proxy.decide(self.command, self.path)
            if fault is None or fault.forward_first or fault.cut:
                connection = http.client.HTTPConnection(address)
                connection.request(self.command, self.path, body, dict(self.headers.items()))
                answer = connection.getresponse()
                content = answer.read()
                connection.close()
                status, headers = answer.status, answer.getheaders()
            if fault is not None and not fault.cut:
                if fault.drop:
                    self.close_connection = True
                    return
                status, content, headers = fault.status, fault.body, [("Content-Type", "application/xml")]
            self.send_response(status)
            for name, value in headers:
                if name.lower() not in ("connection", "transfer-encoding", "content-length", "date", "server"):
                    self.send_header(name, value)
            length = dict(headers).get("Content-Length") if self.command == "HEAD" else None
            self.send_header("Content-Length", length or str(len(content)))
            self.end_headers()
            if fault is not None and fault.cut:
                self.wfile.write(content[: len(content) // 2])
                self.close_connection = True
            elif self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        proxy.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield proxy
        finally:
            server.shutdown()
            thread.join()
