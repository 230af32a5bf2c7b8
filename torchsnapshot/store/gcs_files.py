"""Google Cloud Storage, through gcsfs and its JSON API.

gcsfs is used for its session, credentials and event loop. Its uploads are not: they carry no checksum, and their parts
are divided by a fixed line that the data may hold. Zonal (rapid) buckets speak another protocol and are not served.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import io
import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

from torchsnapshot.errors import CredentialsError
from torchsnapshot.store.backend import ObjectInfo
from torchsnapshot.store.remote_errors import is_out_of_range
from torchsnapshot.store.remote_files import CREATION, Page, RemoteFiles, seconds
from torchsnapshot.store.transfers import ANSWER_SECONDS, copy_body, filled, sent

_LIST_PAGE = 1000


class UploadChecksumError(OSError):
    """The service stored other bytes than were sent; the same upload is worth another try."""


class GcsFiles(RemoteFiles):
    """Google Cloud Storage, through gcsfs and its JSON API."""

    def __init__(self, filesystem: Any, path: str, url: str) -> None:
        self._fs = filesystem
        self._bucket, _, prefix = path.strip("/").partition("/")
        self._prefix = f"{prefix}/" if prefix else ""
        credentials = filesystem.credentials
        if credentials.credentials is None and credentials.token != "anon" and filesystem.on_google:
            raise CredentialsError(
                f"{url}: no Google credentials were found, and gcsfs would go on without any. Run `gcloud auth "
                "application-default login`, set GOOGLE_APPLICATION_CREDENTIALS, or pass "
                "storage_options={'token': …}; for a public bucket pass {'token': 'anon'}"
            )
        self._crc32c = _crc32c_function()
        self._upload_base = filesystem.base.removesuffix("storage/v1/") + "upload/storage/v1/"

    def put(self, key: str, data: bytes, *, creation: str | None = None) -> None:
        """See ``RemoteFiles.put``. One multipart upload, which the service refuses if the checksum differs."""
        name, checksum = self._checksum(data)
        boundary = os.urandom(16).hex()
        metadata: dict[str, Any] = {"name": self._prefix + key, name: checksum}
        condition = {}
        if creation is not None:
            metadata["metadata"] = {CREATION: creation}
            condition["ifGenerationMatch"] = "0"
        head = (
            f"--{boundary}\r\nContent-Type: application/json; charset=UTF-8\r\n\r\n{json.dumps(metadata)}\r\n"
            f"--{boundary}\r\nContent-Type: application/octet-stream\r\n\r\n"
        )
        body = b"".join((head.encode(), data, f"\r\n--{boundary}--\r\n".encode()))
        try:
            request = partial(
                self._fs._call,
                "POST",
                f"{self._upload_base}b/{quote(self._bucket, safe='')}/o",
                uploadType="multipart",
                headers={"Content-Type": f"multipart/related; boundary={boundary}"},
                data=io.BytesIO(body),
                json_out=True,
                **condition,
            )
            answer = sent(self._fs.loop, request, len(body), self._answer_seconds)
        except Exception as error:
            if "match calculated" in str(error):
                raise UploadChecksumError(str(error)) from None  # not the cause: its "400" reads like a final answer
            raise
        if answer.get(name, checksum) != checksum:
            raise UploadChecksumError(f"{name} of what was stored is {answer[name]}, of what was sent {checksum}")

    @property
    def _answer_seconds(self) -> float:
        """How long the service may be silent: the user's own bound, which aiohttp takes as a number too."""
        given = self._fs.requests_timeout
        bound = given if isinstance(given, (int, float)) else getattr(given, "sock_read", None)
        return bound or ANSWER_SECONDS

    def creation_of(self, key: str) -> str | None:
        """See ``RemoteFiles.creation_of``."""
        found = self._fs.call("GET", "b/{}/o/{}", self._bucket, self._prefix + key, json_out=True)
        token: str | None = found.get("metadata", {}).get(CREATION)
        return token

    def _checksum(self, data: bytes) -> tuple[str, str]:
        """The name and the value of a checksum, as they stand in an object's metadata."""
        if self._crc32c is not None:
            return "crc32c", base64.b64encode(self._crc32c(data).to_bytes(4, "big")).decode()
        return "md5Hash", base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()

    def get(self, key: str, start: int, end: int | None) -> bytes:
        """See ``RemoteFiles.get``."""
        try:
            return bytes(self._fs.cat_file(f"{self._bucket}/{self._prefix}{key}", start=start, end=end))
        except Exception as error:
            if is_out_of_range(error):
                return b""
            raise

    def get_into(self, key: str, start: int, memory: memoryview) -> int:
        """See ``RemoteFiles.get_into``."""
        return filled(self._fs.loop, partial(self._fill, f"{self._bucket}/{self._prefix}{key}", start), memory)

    async def _fill(self, path: str, start: int, memory: memoryview) -> int:
        fs = self._fs
        headers = fs._get_headers({"Range": f"bytes={start}-{start + memory.nbytes - 1}"})
        parameters, timeout = fs._get_params({}), fs.requests_timeout
        async with fs.session.get(fs.url(path), headers=headers, params=parameters, timeout=timeout) as answer:
            if answer.status not in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT):
                importlib.import_module("gcsfs.retry").validate_response(answer.status, await answer.read(), path)
                raise OSError(f"{path}: an answer with the status {answer.status}")
            is_range = answer.status == HTTPStatus.PARTIAL_CONTENT
            return await copy_body(answer.content.read, memory, start, is_range=is_range)

    def info(self, key: str) -> ObjectInfo:
        """See ``RemoteFiles.info``."""
        return self._object(self._fs.call("GET", "b/{}/o/{}", self._bucket, self._prefix + key, json_out=True))

    def page(self, folder: str, *, deep: bool, token: str | None) -> Page:
        """See ``RemoteFiles.page``."""
        prefix = self._prefix + (f"{folder}/" if folder else "")
        answer = self._fs.call(
            "GET",
            "b/{}/o",
            self._bucket,
            prefix=prefix or None,
            delimiter=None if deep else "/",
            maxResults=_LIST_PAGE,
            pageToken=token,
            fields="items(name,size,updated),prefixes,nextPageToken",
            json_out=True,
        )
        return Page(
            tuple(name[len(prefix) : -1] for name in answer.get("prefixes", ())),
            tuple(self._object(item) for item in answer.get("items", ())),
            answer.get("nextPageToken"),
        )

    def delete(self, keys: Sequence[str]) -> dict[str, Exception]:
        """See ``RemoteFiles.delete``."""
        failures: dict[str, Exception] = {}
        for key in keys:
            try:
                self._fs.call("DELETE", "b/{}/o/{}", self._bucket, self._prefix + key)
            except FileNotFoundError:
                pass
            except Exception as error:
                failures[key] = error
        return failures

    def probe(self) -> None:
        """See ``RemoteFiles.probe``."""
        self._fs.call("GET", "b/{}/o", self._bucket, prefix=self._prefix or None, maxResults=1, json_out=True)

    def _object(self, item: dict[str, Any]) -> ObjectInfo:
        return ObjectInfo(item["name"][len(self._prefix) :], int(item["size"]), seconds(item["updated"]))


def _crc32c_function() -> Callable[[bytes], int] | None:
    try:
        function: Callable[[bytes], int] = importlib.import_module("google_crc32c").value
    except ImportError:
        return None
    return function
