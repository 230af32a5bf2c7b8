"""A small Google Cloud Storage for the tests: the part of the JSON API that gcsfs uses for plain objects.

Buckets; objects with generations and ifGenerationMatch; listings with prefix, delimiter and pages; media download with
ranges; multipart and resumable upload; crc32c and md5. ``python gcs_server.py PORT`` serves on the loopback interface.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
import sys
import threading
from dataclasses import dataclass
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import google_crc32c

PAGE = 1000


@dataclass(frozen=True)
class Stored:
    """One object."""

    content: bytes
    generation: int
    updated: str
    metadata: dict[str, str]


class Cloud:
    """All buckets and uploads in progress, behind one lock."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.buckets: dict[str, dict[str, Stored]] = {}
        self.uploads: dict[str, tuple[str, str, dict[str, str], bytearray]] = {}
        self.generations = itertools.count(1)

    def store(self, bucket: str, name: str, content: bytes, metadata: dict[str, str]) -> Stored:
        """Put an object."""
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        stored = Stored(content, next(self.generations), now, metadata)
        self.buckets[bucket][name] = stored
        return stored


CLOUD = Cloud()


class HttpError(Exception):
    """An answer other than success."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def describe(bucket: str, name: str, stored: Stored) -> dict[str, object]:
    """The object's resource, as the API shows it."""
    return {
        "kind": "storage#object",
        "bucket": bucket,
        "name": name,
        "size": str(len(stored.content)),
        "generation": str(stored.generation),
        "metageneration": "1",
        "contentType": "application/octet-stream",
        "timeCreated": stored.updated,
        "updated": stored.updated,
        "storageClass": "STANDARD",
        "metadata": stored.metadata,
        "md5Hash": base64.b64encode(hashlib.md5(stored.content).digest()).decode(),
        "crc32c": base64.b64encode(google_crc32c.value(stored.content).to_bytes(4, "big")).decode(),
    }


def list_objects(bucket: str, query: dict[str, str]) -> dict[str, object]:
    """One page of a listing."""
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
    limit = min(int(query.get("maxResults", PAGE)), PAGE)
    after = base64.urlsafe_b64decode(query["pageToken"]).decode() if "pageToken" in query else ""
    items: list[dict[str, object]] = []
    prefixes: list[str] = []
    last = ""
    for name in sorted(CLOUD.buckets[bucket]):
        if not name.startswith(prefix):
            continue
        head, found, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
        entry = prefix + head + delimiter if found else name
        if (after and entry <= after) or (prefixes and entry == prefixes[-1]):
            continue
        if len(items) + len(prefixes) == limit:
            token = base64.urlsafe_b64encode(last.encode()).decode()
            return {"kind": "storage#objects", "items": items, "prefixes": prefixes, "nextPageToken": token}
        if found:
            prefixes.append(entry)
        else:
            items.append(describe(bucket, name, CLOUD.buckets[bucket][name]))
        last = entry
    return {"kind": "storage#objects", "items": items, "prefixes": prefixes}


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"

    def handle_any(self) -> None:
        """Serve any method: find the route, answer, and turn errors into the API's form."""
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        try:
            with CLOUD.lock:
                self.route(parts.path)
        except HttpError as error:
            content = json.dumps({"error": {"code": error.status, "message": str(error)}}).encode()
            self.answer(error.status, content)

    do_GET = do_POST = do_DELETE = do_PUT = do_PATCH = handle_any

    def route(self, path: str) -> None:
        """Find what a path means."""
        if path in ("/storage/v1/b", "/storage/v1/b/"):
            return self.on_buckets()
        if match := re.fullmatch(r"/upload/storage/v1/b/([^/]+)/o", path):
            return self.on_upload(unquote(match[1]))
        if match := re.fullmatch(r"(?:/download)?/storage/v1/b/([^/]+)/o/([^/]+)", path):
            return self.on_object(unquote(match[1]), unquote(match[2]))
        if match := re.fullmatch(r"/storage/v1/b/([^/]+)/o/?", path):
            bucket = self.bucket(unquote(match[1]))
            return self.answer_json(list_objects(bucket, self.query))
        if match := re.fullmatch(r"/storage/v1/b/([^/]+)", path):
            return self.answer_json({"kind": "storage#bucket", "name": self.bucket(unquote(match[1]))})
        raise HttpError(404, f"no such route: {path}")

    def on_buckets(self) -> None:
        """Create or list buckets."""
        if self.command == "POST":
            name = json.loads(self.body)["name"]
            CLOUD.buckets.setdefault(name, {})
            return self.answer_json({"kind": "storage#bucket", "name": name})
        return self.answer_json({"kind": "storage#buckets", "items": [{"name": name} for name in CLOUD.buckets]})

    def on_object(self, bucket: str, name: str) -> None:
        """Describe, download or delete one object."""
        stored = CLOUD.buckets[self.bucket(bucket)].get(name)
        if stored is None:
            raise HttpError(404, f"No such object: {bucket}/{name}")
        if self.command == "DELETE":
            self.check_generation(stored)
            del CLOUD.buckets[bucket][name]
            return self.answer(204, b"")
        if self.query.get("alt") != "media":
            return self.answer_json(describe(bucket, name, stored))
        content, status, headers = stored.content, 200, {}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first = int(wanted[1])
            last = min(int(wanted[2] or len(content)), len(content) - 1)
            if first >= len(content) or last < first:
                raise HttpError(416, "The requested range cannot be satisfied.")
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content, status = content[first : last + 1], 206
        return self.answer(status, content, headers, "application/octet-stream")

    def on_upload(self, bucket: str) -> None:
        """Multipart upload, or the beginning and the parts of a resumable one."""
        self.bucket(bucket)
        kind = self.query.get("uploadType")
        if kind == "multipart":
            boundary = re.search(r'boundary="?([^";]+)"?', self.headers["Content-Type"])
            assert boundary is not None
            mark = b"--" + boundary[1].encode()
            _, head, rest = self.body.split(mark, 2)
            metadata = json.loads(re.split(rb"\r?\n\r?\n", head, maxsplit=1)[1])
            media = re.split(rb"\r?\n\r?\n", rest, maxsplit=1)[1]
            content = media[: media.rindex(b"\n" + mark)].removesuffix(b"\r")
            facts = describe(bucket, metadata["name"], Stored(content, 0, "", {}))
            for checksum in ("crc32c", "md5Hash"):
                if metadata.get(checksum, facts[checksum]) != facts[checksum]:
                    raise HttpError(400, f"Provided {checksum} doesn't match calculated {checksum}.")
            return self.finish_upload(bucket, metadata["name"], content, self.query, metadata.get("metadata"))
        if "upload_id" in self.query:
            upload = self.query["upload_id"]
            if upload not in CLOUD.uploads:
                raise HttpError(404, "no such upload")
            _, name, conditions, received = CLOUD.uploads[upload]
            span = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", self.headers["Content-Range"])
            assert span is not None
            assert int(span[1]) == len(received)
            received += self.body
            if len(received) < int(span[3]):
                return self.answer(308, b"", {"Range": f"bytes=0-{len(received) - 1}"})
            del CLOUD.uploads[upload]
            return self.finish_upload(bucket, name, bytes(received), conditions)
        if kind == "resumable":
            upload = str(len(CLOUD.uploads)) + base64.b16encode(self.query["name"].encode()[-6:]).decode()
            CLOUD.uploads[upload] = (bucket, self.query["name"], self.query, bytearray())
            host = self.headers["Host"]
            location = f"http://{host}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={upload}"
            return self.answer(200, b"", {"Location": location})
        raise HttpError(400, f"uploadType {kind!r} is not known here")

    def finish_upload(
        self,
        bucket: str,
        name: str,
        content: bytes,
        conditions: dict[str, str],
        metadata: dict[str, str] | None = None,
    ) -> None:
        """Store what was uploaded, if the condition holds."""
        self.check_generation(CLOUD.buckets[bucket].get(name), conditions)
        self.answer_json(describe(bucket, name, CLOUD.store(bucket, name, content, metadata or {})))

    def check_generation(self, stored: Stored | None, conditions: dict[str, str] | None = None) -> None:
        """412 unless ifGenerationMatch holds; 0 means that there is no such object."""
        wanted = (conditions if conditions is not None else self.query).get("ifGenerationMatch")
        if wanted is not None and int(wanted) != (0 if stored is None else stored.generation):
            raise HttpError(412, "At least one of the pre-conditions you specified did not hold.")

    def bucket(self, name: str) -> str:
        """The name, or 404."""
        if name not in CLOUD.buckets:
            raise HttpError(404, "The specified bucket does not exist.")
        return name

    def answer_json(self, value: object) -> None:
        """Answer 200 with JSON."""
        self.answer(200, json.dumps(value).encode())

    def answer(
        self, status: int, content: bytes, headers: dict[str, str] | None = None, kind: str = "application/json"
    ) -> None:
        """Send one answer."""
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
