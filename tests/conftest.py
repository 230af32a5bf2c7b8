"""Fixtures that several test modules share: the S3 and GCS servers, and a fresh place in each."""

from __future__ import annotations

import json
import os
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from servers import gcs_server, moto_server

StoreUrl = tuple[str, dict[str, Any]]
"""A root URL and the storage_options that reach it."""


@pytest.fixture(scope="session", autouse=True)
def _no_credentials_of_the_developer() -> Iterator[None]:
    """No test sees the machine's own credentials, endpoints or store."""
    hidden = [
        name
        for name in os.environ
        if name.startswith(("AWS_", "GOOGLE_", "GCSFS_", "FSSPEC_", "STORAGE_EMULATOR", "TORCHSNAPSHOT_"))
    ]
    saved = {name: os.environ.pop(name) for name in hidden}
    os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
    os.environ["NO_GCE_CHECK"] = "true"
    yield
    os.environ.update(saved)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The URL of an S3 server of this test session."""
    with moto_server() as url:
        yield url


@pytest.fixture(scope="session")
def gcs_server_url() -> Iterator[str]:
    """The URL of a GCS server of this test session."""
    with gcs_server() as url:
        yield url


def s3_options(endpoint: str) -> dict[str, Any]:
    """The storage_options for an S3 server on loopback."""
    return {
        "endpoint_url": endpoint,
        "key": "testing",
        "secret": "testing",
        "client_kwargs": {"region_name": "us-east-1"},
    }


@pytest.fixture
def s3_url(s3_server: str) -> StoreUrl:
    """A fresh bucket's URL, and the storage_options for it."""
    bucket = f"bucket-{os.urandom(6).hex()}"
    _send("PUT", f"{s3_server}/{bucket}", None)
    return f"s3://{bucket}/runs", s3_options(s3_server)


@pytest.fixture
def gcs_url(gcs_server_url: str) -> StoreUrl:
    """A fresh bucket's URL, and the storage_options for it."""
    bucket = f"bucket-{os.urandom(6).hex()}"
    _send("POST", f"{gcs_server_url}/storage/v1/b", json.dumps({"name": bucket}).encode())
    return f"gs://{bucket}/runs", {"endpoint_url": gcs_server_url, "token": "anon"}


def _send(method: str, url: str, body: bytes | None) -> None:
    with urllib.request.urlopen(urllib.request.Request(url, data=body, method=method), timeout=60) as answer:
        assert answer.status == 200
