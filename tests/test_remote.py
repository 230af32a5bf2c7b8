"""The remote backend: retries and their bound, lost replies, per-key errors, listings, credentials, forks."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import aiohttp
import fsspec.asyn
import pytest
from conftest import StoreUrl, s3_options
from servers import Fault, FaultProxy, fault_proxy, free_port

from torchsnapshot.errors import (
    BucketNotFoundError,
    CredentialsError,
    KeyAbsentError,
    KeyExistsError,
    ReadOnlyError,
    StoreError,
    StoreFullError,
    StoreUnavailableError,
    UnknownProtocolError,
)
from torchsnapshot.store import filesystems, gcs_files, remote_errors, transfers
from torchsnapshot.store.remote import RemoteBackend, RetryPolicy
from torchsnapshot.store.remote_files import Page

QUICK = RetryPolicy(attempts=4, first_wait=0.001, longest_wait=0.002)
SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


def s3_error(code: str, message: str = "no") -> bytes:
    """The body of an S3 error."""
    return f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()


@pytest.fixture(params=["s3", "gcs"])
def proxied(request: pytest.FixtureRequest) -> Iterator[tuple[RemoteBackend, FaultProxy]]:
    """A backend of each service, with a proxy in between that can break requests."""
    url, options = request.getfixturevalue(f"{request.param}_url")
    with fault_proxy(options["endpoint_url"]) as proxy:
        yield RemoteBackend(url, {**options, "endpoint_url": proxy.url}, retry=QUICK), proxy


@pytest.fixture
def s3_proxied(s3_url: StoreUrl) -> Iterator[tuple[RemoteBackend, FaultProxy]]:
    """An S3 backend with a proxy in between."""
    url, options = s3_url
    with fault_proxy(options["endpoint_url"]) as proxy:
        yield RemoteBackend(url, {**options, "endpoint_url": proxy.url}, retry=QUICK), proxy


@pytest.fixture
def gcs_proxied(gcs_url: StoreUrl) -> Iterator[tuple[RemoteBackend, FaultProxy]]:
    """A GCS backend with a proxy in between."""
    url, options = gcs_url
    with fault_proxy(options["endpoint_url"]) as proxy:
        yield RemoteBackend(url, {**options, "endpoint_url": proxy.url}, retry=QUICK), proxy


class TestRetries:
    @pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
    def test_transient_status(self, proxied: tuple[RemoteBackend, FaultProxy], status: int) -> None:
        """A request that fails a few times with a status worth a retry succeeds, whatever it was."""
        backend, proxy = proxied
        fault = Fault(status, SLOW_DOWN if status == 503 else b"")
        for request in (
            lambda: backend.put("a/key", b"content"),
            lambda: backend.read("a/key") == b"content",
            lambda: backend.read("a/key", 1, 3) == b"ont",
            lambda: backend.stat("a/key").nbytes == 7,
            lambda: len(list(backend.list(""))) == 1,
            lambda: backend.list_folder("").folders == ("a",),
            lambda: backend.touch("a/key"),
            lambda: backend.delete(["a/key"]) == {},
        ):
            proxy.fail_next(3, fault)
            assert request() in (None, True)

    def test_dropped_connections(self, proxied: tuple[RemoteBackend, FaultProxy]) -> None:
        """A connection that is closed without an answer is worth a retry."""
        backend, proxy = proxied
        proxy.fail_next(2, Fault(drop=True))
        backend.put("key", b"content")
        proxy.fail_next(2, Fault(drop=True))
        assert backend.read("key") == b"content"

    def test_bound(self, proxied: tuple[RemoteBackend, FaultProxy]) -> None:
        """A service that stays down ends in StoreUnavailableError after exactly the attempts of the policy."""
        backend, proxy = proxied
        proxy.fail_next(10**6, Fault(503, SLOW_DOWN))
        for request in (lambda: backend.put("key", b""), lambda: backend.read("key"), lambda: list(backend.list(""))):
            proxy.seen.clear()
            with pytest.raises(StoreUnavailableError, match="try again"):
                request()
            assert len(proxy.seen) == QUICK.attempts
        assert isinstance(backend.delete(["key"])["key"], StoreUnavailableError)

    def test_clear_answers_are_not_retried(self, s3_proxied: tuple[RemoteBackend, FaultProxy]) -> None:
        """An absent key, a refusal and a malformed request are answers: they cost one request."""
        backend, proxy = s3_proxied
        backend.put("other", b"")
        list(backend.list(""))
        for fault, kind in (
            (Fault(403, s3_error("AccessDenied")), CredentialsError),
            (Fault(400, s3_error("InvalidArgument")), StoreError),
            (Fault(404, s3_error("NoSuchKey")), KeyAbsentError),
        ):
            proxy.fail_next(10, fault)
            proxy.seen.clear()
            with pytest.raises(kind):
                backend.read("key")
            assert len(proxy.seen) == 1

    def test_unreachable_endpoint(self, s3_url: StoreUrl, gcs_url: StoreUrl) -> None:
        """Where nobody listens, the error says so, after the bounded retries."""
        for url, options in (s3_url, gcs_url):
            nobody = f"http://127.0.0.1:{free_port()}"
            backend = RemoteBackend(url, {**options, "endpoint_url": nobody}, retry=QUICK)
            with pytest.raises(StoreUnavailableError, match="endpoint") as caught:
                backend.put("key", b"")
            assert url in str(caught.value)
            with pytest.raises(StoreUnavailableError):
                backend.stat("key")

    def test_waits_grow_and_are_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Waits double, have jitter, and never exceed the longest."""
        waits: list[float] = []
        monkeypatch.setattr("time.sleep", waits.append)
        policy = RetryPolicy(attempts=9, first_wait=1.0, longest_wait=10.0)
        for attempt in range(8):
            policy.wait(attempt)
        for attempt, wait in enumerate(waits):
            longest = min(10.0, 2.0**attempt)
            assert longest / 2 <= wait <= longest
        assert len({wait / min(10.0, 2.0**attempt) for attempt, wait in enumerate(waits)}) > 1

    def test_single_keys_of_a_bulk_delete_are_retried(self, s3_url: StoreUrl, monkeypatch: pytest.MonkeyPatch) -> None:
        """Only the keys that failed for a passing reason are sent again."""
        backend = RemoteBackend(*s3_url, retry=QUICK)
        for name in "abc":
            backend.put(name, b"")
        sent = answer_bulk_delete(
            backend, monkeypatch, [{"b": "SlowDown", "c": "InternalError"}, {"c": "SlowDown"}, {}]
        )
        assert backend.delete(["a", "b", "c"]) == {}
        assert sent == [["a", "b", "c"], ["b", "c"]]  # the last single key goes by itself
        assert list(backend.list("")) == []


class TestLostReplies:
    @pytest.mark.parametrize("fault", [Fault(drop=True, forward_first=True), Fault(500, forward_first=True)])
    def test_conditional_put(self, proxied: tuple[RemoteBackend, FaultProxy], fault: Fault) -> None:
        """A conditional put that happened but whose reply was lost is a success: the retry finds its own token."""
        backend, proxy = proxied
        proxy.fail_next(1, fault)
        backend.put("config", b"mine", if_absent=True)
        assert backend.read("config") == b"mine"
        with pytest.raises(KeyExistsError):
            backend.put("config", b"mine", if_absent=True)

    def test_conditional_put_that_lost(self, proxied: tuple[RemoteBackend, FaultProxy]) -> None:
        """A conditional put that is retried and finds another's bytes has lost."""
        backend, proxy = proxied
        backend.put("config", b"theirs")
        proxy.fail_next(1, Fault(503, SLOW_DOWN))
        with pytest.raises(KeyExistsError):
            backend.put("config", b"mine", if_absent=True)
        assert backend.read("config") == b"theirs"

    def test_one_winner(self, proxied: tuple[RemoteBackend, FaultProxy]) -> None:
        """Of many conditional puts at once exactly one succeeds, and its bytes stay."""
        backend, _ = proxied

        def race(number: int) -> int | None:
            try:
                backend.put("config", bytes([number]), if_absent=True)
            except KeyExistsError:
                return None
            return number

        with ThreadPoolExecutor(8) as pool:
            winners = [number for number in pool.map(race, range(16)) if number is not None]
        assert len(winners) == 1
        assert backend.read("config") == bytes(winners)

    def test_delete_twice(self, proxied: tuple[RemoteBackend, FaultProxy]) -> None:
        """A delete that happened but whose reply was lost is a success."""
        backend, proxy = proxied
        for keys in (["one"], ["one", "two"]):
            for key in keys:
                backend.put(key, b"")
            proxy.fail_next(1, Fault(drop=True, forward_first=True))
            assert backend.delete(keys) == {}
        assert list(backend.list("")) == []


class TestBulkDelete:
    def test_errors_of_single_keys(self, s3_url: StoreUrl, monkeypatch: pytest.MonkeyPatch) -> None:
        """A key that the service could not delete is reported, though the request itself succeeded."""
        backend = RemoteBackend(*s3_url, retry=QUICK)
        answer_bulk_delete(backend, monkeypatch, [{"b": "AccessDenied", "c": "InternalError"}, {"c": "InternalError"}])
        real = backend._files
        monkeypatch.setattr(real, "_delete_one", lambda key: {key: TimeoutError("still")})
        failures = backend.delete(["a", "b", "c"])
        assert {key: type(error) for key, error in failures.items()} == {"b": ReadOnlyError, "c": StoreUnavailableError}
        assert "'b'" in str(failures["b"])

    def test_more_than_one_request_takes(self, s3_proxied: tuple[RemoteBackend, FaultProxy]) -> None:
        """More keys than a bulk request takes are divided."""
        backend, proxy = s3_proxied
        backend.put("key1500", b"")
        assert backend.delete(f"key{number}" for number in range(2001)) == {}
        assert list(backend.list("")) == []
        assert sum(method == "POST" for method, _ in proxy.seen) == 2

    @pytest.mark.parametrize(("status", "code"), [(501, "NotImplemented"), (400, "MissingContentMD5")])
    def test_services_without_it(self, s3_proxied: tuple[RemoteBackend, FaultProxy], status: int, code: str) -> None:
        """Where the service knows no bulk delete, keys are deleted one by one."""
        backend, proxy = s3_proxied
        for key in ("one", "two"):
            backend.put(key, b"")
        proxy.fail_next(1, Fault(status, s3_error(code)), method="POST")
        assert backend.delete(["one", "two"]) == {}
        assert list(backend.list("")) == []

    def test_a_service_that_asks_for_less(self, s3_proxied: tuple[RemoteBackend, FaultProxy]) -> None:
        """A bulk delete that was throttled is tried again as it is, and not key by key."""
        backend, proxy = s3_proxied
        keys = [f"key{number}" for number in range(20)]
        for key in keys:
            backend.put(key, b"")
        proxy.fail_next(1, Fault(503, SLOW_DOWN), method="POST")
        proxy.seen.clear()
        assert backend.delete(keys) == {}
        assert [method for method, _ in proxy.seen] == ["POST", "POST"]


class TestSilentServers:
    @pytest.fixture(params=["s3", "gcs"])
    def silent(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[RemoteBackend]:
        """A backend whose server accepts connections, and then neither reads nor answers."""
        monkeypatch.setattr(transfers, "_MIN_UPLOAD_RATE", 1e9)
        with socket.create_server(("127.0.0.1", 0)) as server:
            url = f"http://127.0.0.1:{server.getsockname()[1]}"
            if request.param == "s3":
                options = {**s3_options(url), "config_kwargs": {"read_timeout": 0.3, "connect_timeout": 5}}
            else:
                timeout = aiohttp.ClientTimeout(sock_connect=5, sock_read=0.3)
                options = {"endpoint_url": url, "token": "anon", "requests_timeout": timeout}
            yield RemoteBackend(f"{request.param}://bucket/run", options, retry=RetryPolicy(2, 0.001, 0.002))

    @pytest.mark.parametrize("nbytes", [10, 16_000_000])
    def test_uploads_come_to_an_end(self, silent: RemoteBackend, nbytes: int) -> None:
        """A put is given up, whether the server reads the body or not, and the error says what was waited for."""
        with pytest.raises(StoreUnavailableError, match=r"put 'key'.*(no answer to an upload|imeout|timed out)"):
            silent.put("key", bytes(nbytes))

    def test_other_requests_come_to_an_end(self, silent: RemoteBackend) -> None:
        """So are reads, listings and deletes."""
        for request in (lambda: silent.read("key"), lambda: list(silent.list(""))):
            with pytest.raises(StoreUnavailableError):
                request()
        assert {type(error) for error in silent.delete(["a", "b"]).values()} == {StoreUnavailableError}


class TestListings:
    def test_one_that_does_not_go_on(self, s3_url: StoreUrl, monkeypatch: pytest.MonkeyPatch) -> None:
        """A service that names the same next page for ever is an error."""
        backend = RemoteBackend(*s3_url, retry=QUICK)
        monkeypatch.setattr(backend._files, "page", lambda *args, **options: Page((), (), "again"))
        with pytest.raises(StoreError, match="does not go on"):
            list(backend.list(""))

    @pytest.mark.parametrize("service", ["s3", "gcs"])
    def test_pages(self, request: pytest.FixtureRequest, service: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """A listing goes on to its last page, by level and at any depth."""
        url, options = request.getfixturevalue(f"{service}_url")
        with fault_proxy(options["endpoint_url"]) as proxy:
            backend = RemoteBackend(url, {**options, "endpoint_url": proxy.url}, retry=QUICK)
            keys = {f"folder/{number % 7}/{number:04d}" for number in range(25)}
            for key in keys:
                backend.put(key, b"")
            small_pages(backend, monkeypatch)
            proxy.seen.clear()
            assert {info.key for info in backend.list("folder")} == keys
            assert len(proxy.seen) >= 25 // 3
            assert set(backend.list_folder("folder").folders) == {str(number) for number in range(7)}

    def test_fails_on_a_later_page(self, s3_url: StoreUrl, monkeypatch: pytest.MonkeyPatch) -> None:
        """A listing whose second page fails raises; it doesn't just end."""
        url, options = s3_url
        with fault_proxy(options["endpoint_url"]) as proxy:
            backend = RemoteBackend(url, {**options, "endpoint_url": proxy.url}, retry=QUICK)
            for number in range(9):
                backend.put(f"key{number}", b"")
            small_pages(backend, monkeypatch)
            proxy.fail_next(10**6, Fault(403, s3_error("AccessDenied")), contains="continuation-token")
            with pytest.raises(CredentialsError):
                list(backend.list(""))

    def test_cut_short_by_the_service(self, s3_url: StoreUrl, monkeypatch: pytest.MonkeyPatch) -> None:
        """A page that says "there is more" without saying where is an error."""
        backend = RemoteBackend(*s3_url, retry=QUICK)
        backend.put("key", b"")
        files: Any = backend._files
        real = files._fs.call_s3
        monkeypatch.setattr(files._fs, "call_s3", lambda *a, **k: {**real(*a, **k), "IsTruncated": True})
        with pytest.raises(StoreError, match="cut short"):
            list(backend.list(""))

    def test_no_stale_listing(self, proxied: tuple[RemoteBackend, FaultProxy]) -> None:
        """What another client puts or deletes after a listing is seen by the next one."""
        backend, proxy = proxied
        other = RemoteBackend(backend.url, {**backend._options, "endpoint_url": proxy.target}, retry=QUICK)
        backend.put("folder/one", b"")
        assert len(list(backend.list("folder"))) == 1
        assert len(backend.list_folder("folder").objects) == 1
        other.put("folder/two", b"")
        other.delete(["folder/one"])
        assert [info.key for info in backend.list("folder")] == ["folder/two"]
        assert [info.key for info in backend.list_folder("folder").objects] == ["folder/two"]
        with pytest.raises(KeyAbsentError):
            backend.stat("folder/one")
        assert backend.stat("folder/two").nbytes == 0

    def test_folder_markers_are_no_objects(self, s3_url: StoreUrl) -> None:
        """The empty objects that consoles make for folders are not shown, and hide nothing."""
        url, _ = s3_url
        backend = RemoteBackend(*s3_url, retry=QUICK)
        files: Any = backend._files
        bucket = url.removeprefix("s3://").partition("/")[0]
        for marker in ("runs/", "runs/folder/", "runs/folder/sub/", "runs//odd"):
            files._fs.call_s3("put_object", Bucket=bucket, Key=marker, Body=b"")
        backend.put("folder/key", b"")
        assert [info.key for info in backend.list("")] == ["folder/key"]
        assert backend.list_folder("").folders == ("folder",)
        assert backend.list_folder("folder").folders == ("sub",)
        assert [info.key for info in backend.list_folder("folder").objects] == ["folder/key"]

    def test_reads_cost_one_request(self, proxied: tuple[RemoteBackend, FaultProxy]) -> None:
        """A read, a ranged read, a stat and a put are one request each."""
        backend, proxy = proxied
        backend.put("key", b"content")
        for request in (
            lambda: backend.read("key"),
            lambda: backend.read("key", 2, 3),
            lambda: backend.read_head("key", 3),
            lambda: backend.stat("key"),
            lambda: backend.put("key", b"again"),
            lambda: list(backend.list("")),
        ):
            proxy.seen.clear()
            request()
            assert len(proxy.seen) == 1


class TestReadInto:
    CONTENT = os.urandom(3_000_000)

    @pytest.mark.parametrize(("start", "nbytes"), [(0, 3_000_000), (0, 1), (2_999_999, 1), (1_234_567, 1_500_000)])
    @pytest.mark.parametrize("has_ranges", [True, False])
    def test_the_wanted_bytes(
        self, proxied: tuple[RemoteBackend, FaultProxy], start: int, nbytes: int, has_ranges: bool
    ) -> None:
        """Memory is filled by one request, and no byte beside it, also by a server that sends the whole object."""
        backend, proxy = proxied
        backend.put("key", self.CONTENT)
        if not has_ranges:
            proxy.fail_next(1, Fault(status=200, body=self.CONTENT), method="GET")
        memory = bytearray(nbytes + 20)
        proxy.seen.clear()
        assert backend.read_into("key", start, memoryview(memory)[10:-10])
        assert len(proxy.seen) == 1
        assert bytes(memory) == bytes(10) + self.CONTENT[start : start + nbytes] + bytes(10)

    @pytest.mark.parametrize("start", [2_999_990, 3_000_000, 4_000_000])
    @pytest.mark.parametrize("has_ranges", [True, False])
    def test_an_object_that_ends_too_soon(
        self, proxied: tuple[RemoteBackend, FaultProxy], start: int, has_ranges: bool
    ) -> None:
        """Fewer bytes than were asked for are an error that says how many there are."""
        backend, proxy = proxied
        backend.put("key", self.CONTENT)
        if not has_ranges:
            proxy.fail_next(1, Fault(status=200, body=self.CONTENT), method="GET")
        with pytest.raises(StoreError, match=f"too short: 20 bytes .* offset {start}, and {max(0, 3_000_000 - start)}"):
            backend.read_into("key", start, memoryview(bytearray(20)))

    def test_connections_are_kept(self, proxied: tuple[RemoteBackend, FaultProxy]) -> None:
        """What has been read to its end leaves its connection to the next request."""
        backend, proxy = proxied
        backend.put("key", self.CONTENT)
        memory = memoryview(bytearray(2_000_000))
        backend.read_into("key", 5, memory)
        before = proxy.num_connections
        for _ in range(10):
            backend.read_into("key", 5, memory)
        assert proxy.num_connections == before

    @pytest.mark.parametrize("status", [204, 304, 400, 403, 499, 500])
    def test_an_answer_without_the_bytes(self, proxied: tuple[RemoteBackend, FaultProxy], status: int) -> None:
        """Whatever a server answers instead, its body is not taken for the object's bytes."""
        backend, proxy = proxied
        backend.put("key", self.CONTENT)
        proxy.fail_next(QUICK.attempts, Fault(status=status, body=b"" if status in (204, 304) else b"x" * 1000))
        memory = bytearray(1000)
        with pytest.raises(StoreError):
            backend.read_into("key", 0, memoryview(memory))
        assert memory == bytes(1000)

    def test_nothing_is_written_after_an_interrupt(
        self, proxied: tuple[RemoteBackend, FaultProxy], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A request that goes on although its caller was interrupted no longer touches the caller's memory."""
        backend, _ = proxied
        backend.put("key", self.CONTENT)
        loop, pending = backend._files._fs.loop, []  # type: ignore[attr-defined]

        def interrupted(loop: object, function: Any, *args: Any) -> None:
            pending.append(function(*args))
            raise KeyboardInterrupt

        memory = bytearray(1000)
        with monkeypatch.context() as patched:
            patched.setattr(fsspec.asyn, "sync", interrupted)
            with pytest.raises(KeyboardInterrupt):
                backend.read_into("key", 0, memoryview(memory))
        with pytest.raises(ValueError, match="released memoryview"):
            asyncio.run_coroutine_threadsafe(pending[0], loop).result(60)
        assert memory == bytes(1000)


class TestClearErrors:
    def test_an_expired_token(self, s3_proxied: tuple[RemoteBackend, FaultProxy]) -> None:
        """S3 answers HEAD with nothing but "bad request" then: the reason is asked for, and the cure is told."""
        backend, proxy = s3_proxied
        expired = s3_error("ExpiredToken", "The provided token has expired.")
        proxy.decide = lambda method, path: Fault(400, b"" if method == "HEAD" else expired)
        with pytest.raises(CredentialsError, match=r"token has expired.*storage_options"):
            backend.stat("key")

    def test_no_such_bucket(self, s3_url: StoreUrl, gcs_url: StoreUrl) -> None:
        """A bucket that isn't there is its own error, for every request, and is named."""
        for url, options in (s3_url, gcs_url):
            backend = RemoteBackend(f"{url.partition('://')[0]}://no-such-bucket/runs", options, retry=QUICK)
            for request in (
                lambda backend=backend: backend.put("key", b""),
                lambda backend=backend: backend.read("key"),
                lambda backend=backend: backend.stat("key"),
                lambda backend=backend: list(backend.list("")),
                lambda backend=backend: backend.list_folder("folder"),
            ):
                with pytest.raises(BucketNotFoundError, match="no-such-bucket"):
                    request()

    @pytest.mark.parametrize("code", ["InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"])
    def test_bad_credentials(self, s3_proxied: tuple[RemoteBackend, FaultProxy], code: str) -> None:
        """Refused credentials are told apart from refused writing, and the cure is named."""
        backend, proxy = s3_proxied
        proxy.fail_next(10**6, Fault(403, s3_error(code)))
        for request in (lambda: backend.put("key", b""), lambda: backend.read("key"), lambda: list(backend.list(""))):
            with pytest.raises(CredentialsError, match=r"storage_options|login"):
                request()

    def test_no_credentials(self, s3_url: StoreUrl, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without any credentials S3 is never asked anonymously: the error names what to pass."""
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
        url, options = s3_url
        without = {name: value for name, value in options.items() if name not in ("key", "secret")}
        backend = RemoteBackend(url, without, retry=QUICK)
        with pytest.raises(CredentialsError, match="storage_options"):
            backend.put("key", b"")

    def test_no_google_credentials(self, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """gcsfs would silently go on without credentials; that is refused, unless it is asked for."""
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
        monkeypatch.setenv("NO_GCE_CHECK", "true")
        with pytest.raises(CredentialsError, match="anon"):
            RemoteBackend("gs://some-bucket/runs", {"project": "none"})
        RemoteBackend("gs://some-bucket/runs", {"token": "anon"})

    def test_read_only(self, proxied: tuple[RemoteBackend, FaultProxy]) -> None:
        """Where reading works and writing is refused, it is ReadOnlyError."""
        backend, proxy = proxied
        backend.put("key", b"content")
        proxy.decide = lambda method, path: None if method in ("GET", "HEAD") else Fault(403, s3_error("AccessDenied"))
        with pytest.raises(ReadOnlyError, match="permission"):
            backend.put("key", b"")
        assert isinstance(backend.delete(["key"])["key"], ReadOnlyError)
        assert backend.read("key") == b"content"

    def test_full(self, s3_proxied: tuple[RemoteBackend, FaultProxy]) -> None:
        """A full store is StoreFullError."""
        backend, proxy = s3_proxied
        proxy.fail_next(10**6, Fault(507, s3_error("XMinioStorageFull")))
        with pytest.raises(StoreFullError, match="gc"):
            backend.put("key", b"")

    @pytest.mark.parametrize("url", ["nonsense://bucket/x", "s3", "simplecache::s3://bucket/x", "://x"])
    def test_unknown_protocol(self, url: str) -> None:
        """A URL that nobody speaks is refused with what to install; a chain of filesystems can't be a store."""
        with pytest.raises(UnknownProtocolError, match=r"install|URL of a store"):
            RemoteBackend(url)

    def test_filesystem_that_is_not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where the package for a protocol is missing, it is named."""
        monkeypatch.setitem(sys.modules, "s3fs", None)
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
        with pytest.raises(UnknownProtocolError, match="pip install s3fs"):
            RemoteBackend("s3://bucket/x")

    def test_refused_option(self, s3_url: StoreUrl) -> None:
        """An option that the filesystem doesn't know is refused when the store is opened, and named."""
        url, options = s3_url
        with pytest.raises(ValueError, match="no_such_option"):
            RemoteBackend(url, {**options, "no_such_option": 1})

    def test_passwords_are_not_shown(self) -> None:
        """A password in a URL doesn't reach messages."""
        backend = RemoteBackend("memory://user:secret@place/x")
        assert backend.url == "memory://user:***@place/x"

    def test_s3_versions(self, s3_url: StoreUrl) -> None:
        """A key that s3fs would cut off at "?versionId=" is refused."""
        with pytest.raises(ValueError, match="versionId"):
            RemoteBackend(*s3_url).put("step?versionId=7", b"")

    def test_transient_or_not(self) -> None:
        """Errors are told apart by what they say, not only by their type."""
        assert remote_errors.is_transient(ConnectionResetError())
        assert remote_errors.is_transient(TimeoutError())
        assert not remote_errors.is_transient(PermissionError())
        assert not remote_errors.is_transient(FileNotFoundError())
        chained = OSError("outer")
        chained.__cause__ = ConnectionResetError()
        assert remote_errors.is_transient(chained)


class TestChecksums:
    def test_s3_uploads_carry_one(self, s3_url: StoreUrl) -> None:
        """An S3 upload carries a checksum that the service compares."""
        backend = RemoteBackend(*s3_url)
        files: Any = backend._files
        headers: list[dict[str, str]] = []
        files._fs.s3.meta.events.register(
            "before-send.s3.PutObject",
            lambda request, **_: headers.append({k.lower(): v for k, v in request.headers.items()}),
        )
        backend.put("key", b"content")
        assert any(name.startswith("x-amz-checksum-") or name == "content-md5" for name in headers[0])

    @pytest.mark.parametrize("function", ["crc32c", "md5"])
    def test_gcs_refuses_damaged_uploads(
        self, gcs_url: StoreUrl, monkeypatch: pytest.MonkeyPatch, function: str
    ) -> None:
        """A GCS upload whose bytes were damaged on the way is refused by the service, sent again, and never stored."""
        if function == "md5":
            monkeypatch.setattr(gcs_files, "_crc32c_function", lambda: None)
        backend = RemoteBackend(*gcs_url, retry=QUICK)
        files: Any = backend._files
        real = files._fs._call
        damage = [2]

        def call(method: str, path: str, *arguments: Any, **options: Any) -> Any:
            if method == "POST" and damage[0]:
                damage[0] -= 1
                options["data"].getbuffer()[-60] ^= 1
            return real(method, path, *arguments, **options)

        monkeypatch.setattr(files._fs, "_call", call)
        backend.put("key", b"x" * 200)
        assert damage == [0]
        assert backend.read("key") == b"x" * 200
        damage[0] = 10**6
        with pytest.raises(StoreUnavailableError, match="match calculated"):
            backend.put("other", b"x" * 200)
        damage[0] = 0
        assert [info.key for info in backend.list("")] == ["key"]

    def test_gcs_data_like_a_boundary(self, gcs_url: StoreUrl) -> None:
        """Data that looks like the divider of gcsfs's own uploads is stored as it is."""
        backend = RemoteBackend(*gcs_url, retry=QUICK)
        for data in (b"before\n--==0==--\nafter", b"\r\n--\r\n", b"\r", b"\n", b"--"):
            backend.put("key", data)
            assert backend.read("key") == data


class TestProcesses:
    @pytest.mark.parametrize("service", ["s3", "gcs"])
    @pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
    def test_forked_child(self, request: pytest.FixtureRequest, service: str) -> None:
        """A backend that was used in the parent works in a forked child, and in the parent afterwards."""
        backend = RemoteBackend(*request.getfixturevalue(f"{service}_url"), retry=QUICK)
        backend.put("parent", b"1")
        child = os.fork()
        if child == 0:
            status = 1
            try:
                backend.put("child", backend.read("parent") + b"2")
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        assert backend.read("child") == b"12"

    def test_clients_are_shared(self, s3_url: StoreUrl) -> None:
        """Backends with the same options share one client; others don't, nor does anybody else's fsspec code."""
        url, options = s3_url
        one, two = RemoteBackend(url, options), RemoteBackend(f"{url}/below", dict(options))
        other = RemoteBackend(url, {**options, "key": "another"})
        files: list[Any] = [backend._files for backend in (one, two, other)]
        assert files[0]._fs is files[1]._fs
        assert files[0]._fs is not files[2]._fs
        assert fsspec.filesystem("s3", **options) is not files[0]._fs
        two.put("key", b"")
        assert [info.key for info in one.list("")] == ["below/key"]

    def test_user_options_stay(self, s3_server: str) -> None:
        """What the user configures wins over our defaults, and the user's dictionaries aren't changed."""
        options = {**s3_options(s3_server), "config_kwargs": {"retries": {"max_attempts": 7}}}
        filesystems.open_files("s3://bucket/x", options, num_connections=5)
        assert options["config_kwargs"] == {"retries": {"max_attempts": 7}}
        files: Any = filesystems.open_files("s3://bucket/x", options, num_connections=5)
        assert files._fs.config_kwargs["retries"]["total_max_attempts"] == 8
        assert files._fs.config_kwargs["max_pool_connections"] == 5

    def test_gcs_experiment_is_off_by_default(self) -> None:
        """gcsfs's class that needs a gRPC service isn't used, and the environment is left as it was."""
        RemoteBackend("gs://some-bucket/runs", {"token": "anon", "endpoint_url": "http://127.0.0.1:1"})
        assert "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT" not in os.environ
        assert fsspec.get_filesystem_class("gs").__name__ == "GCSFileSystem"


class TestOtherFilesystems:
    def test_folders_are_made(self, tmp_path: Any) -> None:
        """A filesystem with real folders gets them made; deletes take patterns literally."""

        class Plain(fsspec.implementations.local.LocalFileSystem):
            protocol = "plain"
            auto_mkdir = False

        fsspec.register_implementation("plain", Plain, clobber=True)
        backend = RemoteBackend(f"plain://{tmp_path}/root", retry=QUICK)
        for key in ("a/b/x1", "a/b/x[1]", "a/b/x*"):
            backend.put(key, b"1")
        assert backend.delete(["a/b/x[1]", "a/b/x*", "a/b/none"]) == {}
        assert [info.key for info in backend.list("")] == ["a/b/x1"]
        assert backend.stat("a/b/x1").modified > 0

    def test_listing_that_fails_raises(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A folder that can't be listed stops the listing; fsspec's own walk would pass over it."""
        backend = RemoteBackend(f"memory://{os.urandom(6).hex()}", retry=QUICK)
        backend.put("a/b/key", b"")
        files: Any = backend._files
        real = files._fs.ls

        def ls(path: str, **options: Any) -> Any:
            if path.endswith("/b"):
                raise PermissionError(path)
            return real(path, **options)

        monkeypatch.setattr(files._fs, "ls", ls)
        with pytest.raises(CredentialsError):
            list(backend.list(""))

    def test_filesystem_that_only_reads(self) -> None:
        """Writing through a filesystem that can't is ReadOnlyError."""

        class ReadsOnly(fsspec.AbstractFileSystem):
            protocol = "readsonly"

            def _open(self, path: str, **_: Any) -> Any:
                raise NotImplementedError

        fsspec.register_implementation("readsonly", ReadsOnly, clobber=True)
        with pytest.raises(ReadOnlyError):
            RemoteBackend("readsonly://x/y", retry=QUICK).put("key", b"")


def answer_bulk_delete(
    backend: RemoteBackend, monkeypatch: pytest.MonkeyPatch, answers: list[dict[str, str]]
) -> list[list[str]]:
    """Let bulk deletes report these errors (name → code) for keys, one answer per request; returns what was sent."""
    files: Any = backend._files
    real = files._send
    sent: list[list[str]] = []

    def send(method: str, nbytes: int, **request: Any) -> Any:
        if method != "delete_objects":
            return real(method, nbytes, **request)
        errors = answers[len(sent)]
        names = {item["Key"].rpartition("/")[2]: item for item in request["Delete"]["Objects"]}
        sent.append(sorted(names))
        kept = [item for name, item in names.items() if name not in errors]
        if kept:
            real(method, nbytes, **{**request, "Delete": {"Objects": kept, "Quiet": True}})
        return {"Errors": [{"Key": names[name]["Key"], "Code": code, "Message": "no"} for name, code in errors.items()]}

    monkeypatch.setattr(files, "_send", send)
    return sent


def small_pages(backend: RemoteBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let listings come in pages of three."""
    files: Any = backend._files
    if hasattr(files._fs, "call_s3"):
        real = files._fs.call_s3
        monkeypatch.setattr(
            files._fs,
            "call_s3",
            lambda method, **request: real(method, **request, **({"MaxKeys": 3} if "list" in method else {})),
        )
    else:
        monkeypatch.setattr(gcs_files, "_LIST_PAGE", 3)
