"""Opens the fsspec filesystem for a URL, so that none of the traps of opening one is stepped into."""

from __future__ import annotations

import copy
import importlib
import os
import threading
import types
from typing import Any

import fsspec
import fsspec.asyn

from torchsnapshot.errors import UnknownProtocolError
from torchsnapshot.store.backend import StorageOptions
from torchsnapshot.store.gcs_files import GcsFiles
from torchsnapshot.store.other_files import OtherFiles
from torchsnapshot.store.remote_errors import without_password
from torchsnapshot.store.remote_files import RemoteFiles
from torchsnapshot.store.s3_files import S3Files

S3_PROTOCOLS = ("s3", "s3a")
GCS_PROTOCOLS = ("gs", "gcs")

_INSTALL = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}
_filesystems: dict[tuple[int, str, str], Any] = {}
"""(process id, protocol, options) → filesystem. A forked child keeps its parent's, so as not to close their sockets."""

_lock = threading.Lock()


def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()  # another thread of the parent may have held it


os.register_at_fork(after_in_child=_renew_lock)


def open_files(url: str, options: StorageOptions, *, num_connections: int) -> RemoteFiles:
    """Open the filesystem for ``url``.

    Raises:
        UnknownProtocolError: no installed filesystem speaks it.
        ValueError: the filesystem refuses one of the options.
        CredentialsError: Google credentials were needed and not found.
    """
    protocol, separator, _ = url.partition("://")
    if not protocol or not separator or "::" in url:
        raise UnknownProtocolError(
            f"{without_password(url)}: not the URL of a store; chained filesystems (`a::b`) can't be one"
        )
    try:
        if protocol in GCS_PROTOCOLS:
            _import_gcsfs()
        fsspec.get_filesystem_class(protocol)
    except (ValueError, ImportError) as error:
        package = _INSTALL.get(protocol)
        cure = f"pip install {package}" if package else "install the fsspec filesystem that speaks it"
        raise UnknownProtocolError(
            f"{without_password(url)}: no filesystem for {protocol!r}: {error} ({cure})"
        ) from error
    options = copy.deepcopy(options)  # clients change what they are given
    if protocol in S3_PROTOCOLS:
        config = dict(options.get("config_kwargs") or {})
        config.setdefault("max_pool_connections", num_connections)
        config.setdefault("connect_timeout", 10)
        config.setdefault("read_timeout", 60)
        config.setdefault("retries", {"total_max_attempts": 1, "mode": "standard"})  # RemoteBackend retries
        options["config_kwargs"] = config
    elif protocol in GCS_PROTOCOLS:
        # gcsfs has none of its own: a connection that went silent would hold a take for ever
        timeout = importlib.import_module("aiohttp").ClientTimeout(sock_connect=10, sock_read=60)
        options.setdefault("requests_timeout", timeout)
    filesystem, path = _shared(url, protocol, options)
    if protocol in S3_PROTOCOLS:
        return S3Files(filesystem, path)
    if protocol in GCS_PROTOCOLS:
        return GcsFiles(filesystem, path, url)
    return OtherFiles(filesystem, path)


def _shared(url: str, protocol: str, options: StorageOptions) -> tuple[Any, str]:
    """A filesystem of this process for these options: making a client of S3 takes longer than many a take.

    fsspec's own cache is not used: it would hand out instances that others have made, with a listing cache.
    """
    if protocol not in S3_PROTOCOLS + GCS_PROTOCOLS:
        return _instantiate(url, protocol, options)
    key = (os.getpid(), protocol, repr(sorted(options.items(), key=lambda item: item[0])))
    with _lock:
        filesystem = _filesystems.get(key)
    if filesystem is not None:
        return filesystem, filesystem._strip_protocol(url)
    filesystem, path = _instantiate(url, protocol, options)
    with _lock:
        return _filesystems.setdefault(key, filesystem), path


def _instantiate(url: str, protocol: str, options: StorageOptions) -> tuple[Any, str]:
    options = {**options, "skip_instance_cache": True}
    try:
        try:
            filesystem, path = fsspec.core.url_to_fs(url, **{**options, "use_listings_cache": False})
        except TypeError:
            # some filesystems hand every option on to a client that knows nothing of caches
            filesystem, path = fsspec.core.url_to_fs(url, **options)
        if protocol in S3_PROTOCOLS:
            filesystem.retries = 1
            filesystem.connect()
        elif protocol in GCS_PROTOCOLS:
            request = getattr(type(filesystem)._request, "__wrapped__", None)
            if request is not None:
                filesystem._request = types.MethodType(request, filesystem)  # without gcsfs's own retries
            # here, and not by two first requests at once: one of their two sessions would never be closed
            fsspec.asyn.sync(filesystem.loop, filesystem._set_session)
    except (TypeError, KeyError, ValueError) as error:
        # config_kwargs is there on S3, whoever gave it
        names = ", ".join(sorted(map(str, options.keys() - {"skip_instance_cache", "config_kwargs"}))) or "none"
        raise ValueError(
            f"{without_password(url)}: the filesystem refuses the storage_options ({names} were given): "
            f"{type(error).__name__}: {error}"
        ) from error
    return filesystem, path


def _import_gcsfs() -> None:
    # Its default class asks a gRPC service for the bucket's type before anything else, which hangs for a minute where
    # that service can't be reached (emulators, proxies, private endpoints). What the user has set stays.
    name = "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"
    if name in os.environ:
        importlib.import_module("gcsfs")
        return
    with _lock:
        os.environ[name] = "false"
        try:
            importlib.import_module("gcsfs")
        finally:
            os.environ.pop(name, None)
