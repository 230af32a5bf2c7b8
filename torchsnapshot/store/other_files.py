"""Any other fsspec filesystem, through the calls that all of them have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torchsnapshot.store.backend import ObjectInfo
from torchsnapshot.store.remote_files import Page, RemoteFiles, seconds


class OtherFiles(RemoteFiles):
    """Objects in whatever fsspec leads to.

    A put is one ``pipe_file``: atomic on object stores, not on those that write in place (plain sftp, smb).
    """

    lists_deep = False

    def __init__(self, filesystem: Any, path: str) -> None:
        self._fs = filesystem
        self._root = path.rstrip("/")

    def put(self, key: str, data: bytes, *, creation: str | None = None) -> None:
        """See ``RemoteFiles.put``. Conditional only by looking first."""
        path = self._full(key)
        if creation is not None and self._fs.exists(path):
            raise FileExistsError(path)
        try:
            self._fs.pipe_file(path, data)
        except FileNotFoundError:
            self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            self._fs.pipe_file(path, data)

    def get(self, key: str, start: int, end: int | None) -> bytes:
        """See ``RemoteFiles.get``."""
        return bytes(self._fs.cat_file(self._full(key), start=start, end=end))

    def info(self, key: str) -> ObjectInfo:
        """See ``RemoteFiles.info``."""
        self._fs.invalidate_cache()
        found = self._fs.info(self._full(key))
        if found["type"] != "file":
            raise FileNotFoundError(self._full(key))
        return ObjectInfo(key, int(found["size"]), _modified(found))

    def page(self, folder: str, *, deep: bool, token: str | None) -> Page:
        """See ``RemoteFiles.page``. Not ``find`` or ``walk``: they pass over folders that can't be listed."""
        self._fs.invalidate_cache()
        path = self._full(folder) if folder else self._root
        try:
            entries = self._fs.ls(path, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return Page((), (), None)
        except KeyError as error:
            raise ConnectionError(f"{path} changed while it was listed") from error  # memory://; try again
        folders: list[str] = []
        objects: list[ObjectInfo] = []
        for entry in entries:
            name = str(entry["name"]).rstrip("/").rpartition("/")[2]
            if not name or str(entry["name"]).strip("/") == path.strip("/"):
                continue  # some list a file, or the folder itself, as its own content
            if entry["type"] == "directory":
                folders.append(name)
            elif entry["type"] == "file":
                key = f"{folder}/{name}" if folder else name
                objects.append(ObjectInfo(key, int(entry["size"]), _modified(entry)))
        return Page(tuple(folders), tuple(objects), None)

    def delete(self, keys: Sequence[str]) -> dict[str, Exception]:
        """See ``RemoteFiles.delete``. Not ``rm``, which expands patterns."""
        failures: dict[str, Exception] = {}
        for key in keys:
            try:
                self._fs.rm_file(self._full(key))
            except (FileNotFoundError, KeyError):
                pass
            except Exception as error:
                failures[key] = error
        return failures

    def _full(self, key: str) -> str:
        return f"{self._root}/{key}"


def _modified(info: dict[str, Any]) -> float:
    for name in ("mtime", "LastModified", "last_modified", "modified", "updated", "created"):
        value = info.get(name)
        if value:
            return seconds(value)
    return 0.0
