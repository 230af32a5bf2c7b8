"""A stub of S3: in memory, one thread a connection, nothing checked. ``python -m benchmarks.s3_stub``.

It speaks what a take, a restore and a plain client ask for: PUT (with ``If-None-Match``), GET (with ``Range``), HEAD,
DELETE, bulk delete, ListObjectsV2. Objects live in memory that is reused, because memory that is touched first is
slow. It prints its port, and ends when its standard input does. ``POST /?wipe`` forgets every object.
"""

from __future__ import annotations

import re
import socket
import sys
import threading
import urllib.parse
from dataclasses import dataclass, field
from email.utils import formatdate
from http import HTTPStatus
from xml.sax.saxutils import escape

_HEADER_NBYTES = 64 << 10
_SIZE_CLASS = 1 << 20


@dataclass(slots=True)
class Stored:
    """One object. ``memory`` may be larger than its content."""

    memory: bytearray
    nbytes: int
    headers: dict[str, str]
    modified: str


@dataclass(slots=True)
class Bucket:
    """Every object by its path, and memory that waits to be used again."""

    objects: dict[str, Stored] = field(default_factory=dict)
    free: dict[int, list[bytearray]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def memory(self, nbytes: int) -> bytearray:
        """Memory for an object of ``nbytes`` bytes."""
        size = max(-(-nbytes // _SIZE_CLASS) * _SIZE_CLASS, _SIZE_CLASS) if nbytes > 4096 else 4096
        with self.lock:
            free = self.free.get(size)
            if free:
                return free.pop()
        return bytearray(size)

    def put(self, path: str, stored: Stored | None) -> None:
        """Store an object, or with None forget it."""
        with self.lock:
            old = self.objects.pop(path, None)
            if old is not None:
                self.free.setdefault(len(old.memory), []).append(old.memory)
            if stored is not None:
                self.objects[path] = stored

    def wipe(self) -> None:
        """Forget every object, and keep the memory."""
        for path in list(self.objects):
            self.put(path, None)


class Connection:
    """Answers the requests of one connection."""

    def __init__(self, bucket: Bucket, peer: socket.socket) -> None:
        self._bucket = bucket
        self._socket = peer
        self._buffer = bytearray(_HEADER_NBYTES)
        self._filled = 0

    def serve(self) -> None:
        """Answer until the client hangs up."""
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            while self._serve_one():
                pass
        except (ConnectionError, TimeoutError):
            pass
        finally:
            self._socket.close()

    def _serve_one(self) -> bool:
        head = self._read_head()
        if head is None:
            return False
        request, *lines = head.split("\r\n")
        method, target, _ = request.split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if headers.get("expect", "").lower() == "100-continue":
            self._socket.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        nbytes = int(headers.get("content-length", "0"))
        body = self._read_body(nbytes)
        path, _, query = target.partition("?")
        path = urllib.parse.unquote(path)
        if method == "PUT":
            self._put(path, headers, body, nbytes)
        elif method == "GET" and "list-type=2" in query:
            self._list(path.strip("/"), dict(urllib.parse.parse_qsl(query)))
        elif method in ("GET", "HEAD"):
            self._get(path, headers, send_body=method == "GET")
        elif method == "DELETE":
            self._bucket.put(path, None)
            self._answer(HTTPStatus.NO_CONTENT)
        elif "wipe" in query:
            self._bucket.wipe()
            self._answer(HTTPStatus.OK)
        elif "delete" in query:
            for key in re.findall(rb"<Key>(.*?)</Key>", bytes(memoryview(body)[:nbytes])):
                self._bucket.put(f"{path.rstrip('/')}/{key.decode()}", None)
            self._answer(HTTPStatus.OK, b"<DeleteResult></DeleteResult>")
        else:
            self._answer(HTTPStatus.NOT_IMPLEMENTED)
        return True

    def _read_head(self) -> str | None:
        while True:
            end = self._buffer.find(b"\r\n\r\n", 0, self._filled)
            if end >= 0:
                head = self._buffer[:end].decode()
                rest = self._filled - end - 4
                self._buffer[:rest] = self._buffer[end + 4 : self._filled]
                self._filled = rest
                return head
            count = self._socket.recv_into(memoryview(self._buffer)[self._filled :])
            if not count:
                return None
            self._filled += count

    def _read_body(self, nbytes: int) -> bytearray:
        body = self._bucket.memory(nbytes)
        early = min(self._filled, nbytes)
        body[:early] = self._buffer[:early]
        self._buffer[: self._filled - early] = self._buffer[early : self._filled]
        self._filled -= early
        view, done = memoryview(body), early
        while done < nbytes:
            count = self._socket.recv_into(view[done:nbytes])
            if not count:
                raise ConnectionError("the client hung up in the middle of a body")
            done += count
        return body

    def _put(self, path: str, headers: dict[str, str], body: bytearray, nbytes: int) -> None:
        if "aws-chunked" in headers.get("content-encoding", ""):
            self._answer(HTTPStatus.NOT_IMPLEMENTED)
        elif headers.get("if-none-match") == "*" and path in self._bucket.objects:
            self._answer(HTTPStatus.PRECONDITION_FAILED, b"<Error><Code>PreconditionFailed</Code></Error>")
        else:
            kept = {name: value for name, value in headers.items() if name.startswith("x-amz-meta-")}
            self._bucket.put(path, Stored(body, nbytes, kept, formatdate(usegmt=True)))
            self._answer(HTTPStatus.OK, headers={"ETag": '"0"'})

    def _get(self, path: str, headers: dict[str, str], *, send_body: bool) -> None:
        stored = self._bucket.objects.get(path)
        if stored is None:
            self._answer(HTTPStatus.NOT_FOUND, b"<Error><Code>NoSuchKey</Code></Error>" if send_body else b"")
            return
        first, last, status = 0, stored.nbytes - 1, HTTPStatus.OK
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", headers.get("range", ""))
        more = {"ETag": '"0"', "Last-Modified": stored.modified, **stored.headers}
        if found:
            first, last = int(found[1]), min(int(found[2] or last), last)
            if first >= stored.nbytes:
                self._answer(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, b"<Error><Code>InvalidRange</Code></Error>")
                return
            status, more["Content-Range"] = HTTPStatus.PARTIAL_CONTENT, f"bytes {first}-{last}/{stored.nbytes}"
        content = memoryview(stored.memory)[first : last + 1]
        self._answer(status, content, more, send_body=send_body)

    def _list(self, bucket: str, query: dict[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        folders: set[str] = set()
        items: list[str] = []
        for path, stored in sorted(self._bucket.objects.items()):
            key = path.removeprefix(f"/{bucket}/")
            if not key.startswith(prefix) or key == path:
                continue
            if delimiter and delimiter in key[len(prefix) :]:
                folders.add(prefix + key[len(prefix) :].partition(delimiter)[0] + delimiter)
                continue
            items.append(
                f"<Contents><Key>{escape(key)}</Key><Size>{stored.nbytes}</Size><ETag>0</ETag>"
                "<LastModified>2024-01-01T00:00:00.000Z</LastModified></Contents>"
            )
        common = "".join(f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>" for name in folders)
        body = f"<ListBucketResult><IsTruncated>false</IsTruncated>{''.join(items)}{common}</ListBucketResult>"
        self._answer(HTTPStatus.OK, body.encode())

    def _answer(
        self,
        status: HTTPStatus,
        body: bytes | memoryview = b"",
        headers: dict[str, str] | None = None,
        *,
        send_body: bool = True,
    ) -> None:
        lines = [f"HTTP/1.1 {status.value} {status.phrase}", f"Content-Length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        self._socket.sendall("\r\n".join([*lines, "", ""]).encode())
        if send_body and len(body):
            self._socket.sendall(body)


def main() -> None:
    """Serve until standard input ends."""
    bucket = Bucket()
    listener = socket.create_server(("127.0.0.1", 0), backlog=256)
    print(listener.getsockname()[1], flush=True)

    def accept() -> None:
        while True:
            peer, _ = listener.accept()
            threading.Thread(target=Connection(bucket, peer).serve, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    sys.stdin.read()


if __name__ == "__main__":
    main()
