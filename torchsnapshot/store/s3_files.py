"""S3 and what speaks its protocol, through s3fs.

s3fs is used for its session, credentials and event loop. Its own ``ls``, ``info``, ``rm`` and bulk delete are not:
they ask twice, expand patterns, or lose the errors of single keys.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from functools import partial
from http import HTTPStatus
from typing import Any

from torchsnapshot.errors import StoreError
from torchsnapshot.store.backend import ObjectInfo
from torchsnapshot.store.remote_errors import is_out_of_range, is_transient
from torchsnapshot.store.remote_files import CREATION, Page, RemoteFiles
from torchsnapshot.store.transfers import ANSWER_SECONDS, copy_body, filled, sent


class S3Files(RemoteFiles):
    """S3 and what speaks its protocol, through s3fs."""

    delete_batch = 1000
    forbidden = ("?versionId=",)  # s3fs takes what follows for a version

    def __init__(self, filesystem: Any, path: str) -> None:
        self._fs = filesystem
        self._bucket, _, prefix = path.strip("/").partition("/")
        self._prefix = f"{prefix}/" if prefix else ""

    def put(self, key: str, data: bytes, *, creation: str | None = None) -> None:
        """See ``RemoteFiles.put``. One PUT, checked by the checksum that botocore adds (or Content-MD5)."""
        condition = {"IfNoneMatch": "*", "Metadata": {CREATION: creation}} if creation is not None else {}
        self._send("put_object", len(data), Key=self._full(key), Body=data, **condition)

    def _send(self, method: str, nbytes: int, **arguments: Any) -> Any:
        """A request with a body of about so many bytes."""
        seconds = self._fs.config_kwargs.get("read_timeout") or ANSWER_SECONDS
        request = partial(self._fs._call_s3, method, Bucket=self._bucket, **arguments)
        return sent(self._fs.loop, request, nbytes, seconds)

    def creation_of(self, key: str) -> str | None:
        """See ``RemoteFiles.creation_of``."""
        found: str | None = self._head(key).get("Metadata", {}).get(CREATION)
        return found

    def _head(self, key: str) -> Any:
        try:
            return self._fs.call_s3("head_object", Bucket=self._bucket, Key=self._full(key))
        except OSError as error:
            if error.errno == errno.EINVAL:
                # "bad request": an answer to HEAD has no body that would say why; an expired token is one reason
                self.probe()
            raise

    def get(self, key: str, start: int, end: int | None) -> bytes:
        """See ``RemoteFiles.get``."""
        try:
            return bytes(self._fs.cat_file(f"{self._bucket}/{self._full(key)}", start=start, end=end))
        except Exception as error:
            if is_out_of_range(error):
                return b""
            raise

    def get_into(self, key: str, start: int, memory: memoryview) -> int:
        """See ``RemoteFiles.get_into``."""
        return filled(self._fs.loop, partial(self._fill, self._full(key), start), memory)

    async def _fill(self, name: str, start: int, memory: memoryview) -> int:
        wanted = f"bytes={start}-{start + memory.nbytes - 1}"
        answer = await self._fs._call_s3("get_object", Bucket=self._bucket, Key=name, Range=wanted)
        is_range = answer["ResponseMetadata"]["HTTPStatusCode"] == HTTPStatus.PARTIAL_CONTENT
        body = answer["Body"]
        try:
            return await copy_body(body.read, memory, start, is_range=is_range)
        finally:
            body.close()

    def info(self, key: str) -> ObjectInfo:
        """See ``RemoteFiles.info``. ``fs.info`` would take a folder of that name for it, by a second request."""
        head = self._head(key)
        return ObjectInfo(key, int(head["ContentLength"]), head["LastModified"].timestamp())

    def page(self, folder: str, *, deep: bool, token: str | None) -> Page:
        """See ``RemoteFiles.page``."""
        prefix = self._prefix + (f"{folder}/" if folder else "")
        request: dict[str, Any] = {"Bucket": self._bucket, "Prefix": prefix}
        if not deep:
            request["Delimiter"] = "/"
        if token is not None:
            request["ContinuationToken"] = token
        answer = self._fs.call_s3("list_objects_v2", **request)
        next_token = answer.get("NextContinuationToken")
        if answer.get("IsTruncated") and not next_token:
            raise StoreError(f"the listing of {prefix!r} in bucket {self._bucket!r} was cut short by the service")
        return Page(
            tuple(item["Prefix"][len(prefix) : -1] for item in answer.get("CommonPrefixes", ())),
            tuple(
                ObjectInfo(item["Key"][len(self._prefix) :], int(item["Size"]), item["LastModified"].timestamp())
                for item in answer.get("Contents", ())
            ),
            next_token if answer.get("IsTruncated") else None,
        )

    def delete(self, keys: Sequence[str]) -> dict[str, Exception]:
        """See ``RemoteFiles.delete``. The bulk request answers 200 even if every key failed: each result is read."""
        if len(keys) == 1:
            return self._delete_one(keys[0])
        names = {self._full(key): key for key in keys}
        request = {"Objects": [{"Key": name} for name in names], "Quiet": True}
        try:
            answer = self._send("delete_objects", sum(map(len, names)), Delete=request)
        except Exception as error:
            if getattr(error, "errno", None) is None or isinstance(error, PermissionError) or is_transient(error):
                raise
            # Some services know no bulk delete, or refuse the checksum that it is sent with.
            return {key: failure for each in keys for key, failure in self._delete_one(each).items()}
        failures: dict[str, Exception] = {}
        for item in answer.get("Errors", ()):
            if item.get("Code") != "NoSuchKey":
                failures[names[item["Key"]]] = _S3KeyError(item.get("Code", ""), item.get("Message", ""))
        return failures

    def _delete_one(self, key: str) -> dict[str, Exception]:
        try:
            self._fs.call_s3("delete_object", Bucket=self._bucket, Key=self._full(key))
        except FileNotFoundError:
            pass
        except Exception as error:
            return {key: error}
        return {}

    def probe(self) -> None:
        """See ``RemoteFiles.probe``."""
        self._fs.call_s3("list_objects_v2", Bucket=self._bucket, Prefix=self._prefix, MaxKeys=1)

    def _full(self, key: str) -> str:
        return self._prefix + key


class _S3KeyError(OSError):
    """One key's error in the answer to a bulk request."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.response = {"Error": {"Code": code, "Message": message}}
