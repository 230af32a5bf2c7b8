"""The main job in buckets: through ``Snapshot`` and the command line against S3 and GCS servers, and in memory.

What the remote backend does with single requests is tested in ``test_remote``; here it is what a user does.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from committed import CHUNK_NBYTES, assert_holds, restored, state_of, take
from folders import manifest, new_process, refs
from memory_states import same
from servers import Fault, FaultProxy, fault_proxy

from torchsnapshot import Snapshot, StateDict, knobs
from torchsnapshot.cli import main
from torchsnapshot.copy import copy_snapshot
from torchsnapshot.errors import (
    CommitUnknownError,
    CorruptionError,
    CredentialsError,
    SnapshotError,
    SnapshotNotFoundError,
    StoreUnavailableError,
)
from torchsnapshot.maintenance import collect, retain
from torchsnapshot.reading.opening import open_snapshot
from torchsnapshot.store import locate
from torchsnapshot.store.backend import Backend
from torchsnapshot.store.locate import open_backend
from torchsnapshot.store.remote import RetryPolicy


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test begins as a new process would, with chunks of 64 KiB; requests are tried again without waiting."""
    monkeypatch.setattr(RetryPolicy, "wait", lambda self, attempt: None)
    monkeypatch.setattr(locate, "_known_roots", {})
    new_process()
    with knobs.override_max_chunk_size_bytes(CHUNK_NBYTES):
        yield


@dataclass
class Place:
    """A ROOT that nothing else uses, and the options that reach it."""

    url: str
    options: dict[str, Any]
    proxy: FaultProxy | None = None

    def backend(self) -> Backend:
        """The ROOT's own."""
        return open_backend(self.url, self.options)

    def objects(self) -> dict[str, int]:
        """Every object below ROOT, with its size."""
        return {info.key: info.nbytes for info in self.backend().list("")}

    def blobs(self) -> set[str]:
        """The keys of all blobs."""
        return {key.rpartition("/")[2] for key in self.objects() if "/blobs/" in key}

    def needed(self, *names: str) -> set[str]:
        """The keys of the blobs that these snapshots refer to."""
        found: set[str] = set()
        for name in names:
            opened = open_snapshot(f"{self.url}/{name}", self.options)
            found |= opened.manifest.envelope.all_keys(opened.repository.read_table)
        return found


SERVICES = ["s3", "gcs"]


@pytest.fixture
def proxied(request: pytest.FixtureRequest) -> Iterator[Place]:
    """A fresh bucket, reached through a proxy that counts and breaks requests; the parameter names the service."""
    url, options = request.getfixturevalue(f"{request.param}_url")
    with fault_proxy(options["endpoint_url"]) as proxy:
        yield Place(url, {**options, "endpoint_url": proxy.url}, proxy)


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """A fresh ROOT on the kind of store that the parameter names."""
    if request.param == "memory":
        return Place(f"memory://{tmp_path.name}/runs", {})
    return Place(*request.getfixturevalue(f"{request.param}_url"))


everywhere = pytest.mark.parametrize("place", [*SERVICES, "memory"], indirect=True)
both_services = pytest.mark.parametrize("proxied", SERVICES, indirect=True)


class TestMainJob:
    @everywhere
    def test_a_life(self, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
        """Take, change, go back, list, delete, retain, collect, verify: all as on a local disk."""
        for number in (1, 2):
            take(f"{place.url}/step_{number}", number, storage_options=place.options)
        pending = Snapshot.async_take(
            f"{place.url}/step_3", {"app": StateDict(**state_of(3))}, storage_options=place.options
        )
        assert pending.wait().path == f"{place.url}/step_3"
        take(f"{place.url}/step_1", 4, storage_options=place.options)
        take(f"{place.url}/evals/best", 1, storage_options=place.options)
        holds = {"step_1": 4, "step_2": 2, "step_3": 3, "evals/best": 1}
        for name, number in holds.items():
            assert_holds(f"{place.url}/{name}", number, place.options)
        assert [found.name for found in Snapshot.list(place.url, place.options)] == [
            "step_2",
            "step_3",
            "step_1",
            "evals/best",
        ]
        latest = Snapshot.latest(place.url, place.options)
        assert latest is not None
        assert latest.path == f"{place.url}/evals/best"

        Snapshot(f"{place.url}/step_3", storage_options=place.options).delete()
        with pytest.raises(SnapshotNotFoundError, match="nothing is there"):
            restored(f"{place.url}/step_3", place.options)
        plan = retain(place.url, place.options, last=1, keep=["step_1"])
        assert [info.name for info in plan.drop] == ["step_2"]
        before = place.blobs()
        planned = collect(place.url, place.options, dry_run=True)
        assert place.blobs() == before
        report = collect(place.url, place.options)
        assert (report.freed_blobs, report.failed) == (planned.freed_blobs, {})
        assert place.blobs() == place.needed("step_1", "evals/best") < before
        assert_holds(f"{place.url}/step_1", 4, place.options)
        assert_holds(f"{place.url}/evals/best", 1, place.options)
        assert not any("/leases/" in key or "/gc/pending/" in key for key in place.objects())

        options = ["--storage-options", json.dumps(place.options)]
        assert main(["verify", place.url, *options]) == 0
        assert main(["ls", place.url, *options]) == 0
        out = capsys.readouterr().out
        assert "2 snapshots checked to the bytes: 0 problems" in out
        assert "evals/best" in out

    @everywhere
    def test_unchanged_and_changed(self, place: Place) -> None:
        """An unchanged state costs three small objects; one element costs its chunk; a new process shares as well."""
        state = state_of(1)
        Snapshot.take(f"{place.url}/step_1", {"app": StateDict(**state)}, storage_options=place.options)
        for name in ("step_2", "step_3"):
            before = place.objects()
            stats = Snapshot.take(
                f"{place.url}/{name}", {"app": StateDict(**state)}, storage_options=place.options
            ).stats
            assert stats is not None
            assert (stats.num_new_chunks, stats.stored_nbytes) == (0, 0)
            new = place.objects().keys() - before.keys()
            assert all(key.startswith(f"{name}/") for key in new)
            assert len(new) == 3
            new_process()
            restored(f"{place.url}/{name}", place.options)
        state["large"][20_000] += 1
        before = place.objects()
        stats = Snapshot.take(f"{place.url}/step_4", {"app": StateDict(**state)}, storage_options=place.options).stats
        assert stats is not None
        assert (stats.num_new_chunks, stats.new_nbytes) == (1, CHUNK_NBYTES)
        (blob,) = (key for key in place.objects().keys() - before.keys() if "/blobs/" in key)
        assert place.objects()[blob] <= CHUNK_NBYTES
        assert same(restored(f"{place.url}/step_4", place.options), state)

    @both_services
    def test_requests(self, proxied: Place) -> None:
        """An unchanged take uploads lease, manifest, ``.ok`` and signpost, and needs some twenty requests in all."""
        assert proxied.proxy is not None
        take(f"{proxied.url}/step_1", 1, storage_options=proxied.options)
        take(f"{proxied.url}/step_2", 1, storage_options=proxied.options)
        proxied.proxy.seen.clear()
        take(f"{proxied.url}/step_3", 1, storage_options=proxied.options)
        uploads = [path for method, path in proxied.proxy.seen if method == "PUT" or "/upload/" in path]
        assert len(uploads) == 4
        assert len(proxied.proxy.seen) <= 22
        proxied.proxy.seen.clear()
        new_process()
        restored(f"{proxied.url}/step_3", proxied.options)
        num_blobs = len({path for _, path in proxied.proxy.seen if "blobs" in path})
        assert len(proxied.proxy.seen) <= num_blobs + 12

    @both_services
    def test_storage_options_reach_the_filesystem(self, proxied: Place) -> None:
        """Endpoint and keys are those that were passed, in every request of takes, restores and collections."""
        assert proxied.proxy is not None
        options = dict(proxied.options)
        expected = ""
        if proxied.url.startswith("s3"):
            options["key"], options["secret"] = "the-key-that-was-passed", "the-secret"
            expected = "Credential=the-key-that-was-passed/"
        for use in (
            lambda: take(f"{proxied.url}/step_1", 1, storage_options=options),
            lambda: restored(f"{proxied.url}/step_1", options),
            lambda: Snapshot.list(proxied.url, options),
            lambda: collect(proxied.url, options),
        ):
            proxied.proxy.seen.clear()
            proxied.proxy.authorizations.clear()
            use()
            assert proxied.proxy.seen
            assert all(expected in authorization for authorization in proxied.proxy.authorizations)


class TestCopy:
    def test_around_the_world(
        self, tmp_path: Path, s3_url: tuple[str, dict[str, Any]], gcs_url: tuple[str, dict[str, Any]]
    ) -> None:
        """From a local disk to S3, to GCS and back: every bit of it, and the second snapshot shares with the first."""
        stops = [(str(tmp_path / "here"), {}), s3_url, gcs_url, (str(tmp_path / "home"), {})]
        for number in (1, 2):
            take(f"{stops[0][0]}/step_{number}", number, user_metadata={"number": number})
        for (source, source_options), (destination, options) in itertools.pairwise(stops):
            new_process()
            for number in (1, 2):
                opened = open_snapshot(f"{source}/step_{number}", source_options)
                stats = copy_snapshot(opened, f"{destination}/step_{number}", options)
                # the second shares "frozen"
                assert stats.reused_nbytes == (0 if number == 1 else 2 * CHUNK_NBYTES)
        for folder, options in stops:
            for number in (1, 2):
                assert_holds(f"{folder}/step_{number}", number, options)
                snapshot = Snapshot(f"{folder}/step_{number}", storage_options=options)
                assert snapshot.user_metadata == {"number": number}
        here, home = (chunks_of(tmp_path / name / "step_2") for name in ("here", "home"))
        assert here == home

    def test_command(self, tmp_path: Path, s3_url: tuple[str, dict[str, Any]]) -> None:
        """``torchsnapshot copy`` takes the options of both ends."""
        url, options = s3_url
        take(tmp_path / "here" / "step_1", 1)
        to = ["--to-storage-options", json.dumps(options)]
        assert main(["copy", str(tmp_path / "here" / "step_1"), f"{url}/step_1", *to]) == 0
        back = ["--storage-options", json.dumps(options), "--to-storage-options", "{}"]
        assert main(["copy", f"{url}/step_1", str(tmp_path / "back" / "step_1"), *back]) == 0
        assert_holds(f"{url}/step_1", 1, options)
        assert_holds(tmp_path / "back" / "step_1", 1)

    @everywhere
    def test_copy_of_a_copy_again(self, place: Place, tmp_path: Path) -> None:
        """What the destination holds already is not written again, also by a new process."""
        take(tmp_path / "here" / "step_1", 1)
        source = open_snapshot(str(tmp_path / "here" / "step_1"))
        assert copy_snapshot(source, f"{place.url}/a", place.options).num_new_chunks > 0
        new_process()
        before = place.blobs()
        assert copy_snapshot(source, f"{place.url}/b", place.options).num_new_chunks == 0
        assert place.blobs() == before


def take_either_way(path: str, number: int, is_async: bool, options: dict[str, Any]) -> None:
    """Take ``state_of(number)``, and wait for it."""
    app_state = {"app": StateDict(**state_of(number))}
    if is_async:
        Snapshot.async_take(path, app_state, storage_options=options).wait()
    else:
        Snapshot.take(path, app_state, storage_options=options)


def is_upload(method: str, path: str) -> bool:
    """Whether this request puts an object."""
    return method == "PUT" or (method == "POST" and "/upload/" in path)


def chunks_of(path: Path) -> dict[str, list[tuple[bytes, int]]]:
    """The contents that a local snapshot is made of, by path in the state."""
    return {
        name: [(ref.digest, ref.nbytes) for ref in refs(path, name)]
        for name in (stored.partition("/")[2] for stored in manifest(path).entries)
    }


class TestFaults:
    @both_services
    @pytest.mark.parametrize("fault", [Fault(503), Fault(drop=True)], ids=["503", "reset"])
    def test_every_request_fails_once(self, proxied: Place, fault: Fault) -> None:
        """Whatever fails for a moment is tried again: takes, restores, deletions and collections don't notice."""
        assert proxied.proxy is not None
        failed: set[tuple[str, str]] = set()

        def first_time(method: str, path: str) -> Fault | None:
            # uploads to GCS all have one path, so only the first of them fails
            if (method, path) in failed:
                return None
            failed.add((method, path))
            return fault

        proxied.proxy.decide = first_time
        take(f"{proxied.url}/step_1", 1, storage_options=proxied.options)
        take(f"{proxied.url}/step_2", 2, storage_options=proxied.options)
        assert_holds(f"{proxied.url}/step_1", 1, proxied.options)
        Snapshot(f"{proxied.url}/step_1", storage_options=proxied.options).delete()
        assert collect(proxied.url, proxied.options).failed == {}
        assert_holds(f"{proxied.url}/step_2", 2, proxied.options)
        assert len(failed) > 20
        assert proxied.blobs() == proxied.needed("step_2")

    @both_services
    def test_answers_that_are_lost(self, proxied: Place) -> None:
        """An upload that was done although its answer was lost is done once more, with the same content."""
        assert proxied.proxy is not None
        seen = [0]

        def every_other(method: str, path: str) -> Fault | None:
            if not is_upload(method, path):
                return None
            seen[0] += 1
            return Fault(drop=True, forward_first=True) if seen[0] % 2 else None

        proxied.proxy.decide = every_other
        take(f"{proxied.url}/step_1", 1, storage_options=proxied.options)
        proxied.proxy.decide = lambda method, path: None
        assert_holds(f"{proxied.url}/step_1", 1, proxied.options)
        assert proxied.blobs() == proxied.needed("step_1")

    @both_services
    def test_reset_in_the_middle_of_a_body(self, proxied: Place) -> None:
        """A download that breaks off is begun again; half of an answer is never taken for the whole."""
        assert proxied.proxy is not None
        take(f"{proxied.url}/step_1", 1, storage_options=proxied.options)
        cut: set[str] = set()

        def first_time(method: str, path: str) -> Fault | None:
            if method != "GET" or path in cut:
                return None
            cut.add(path)
            return Fault(cut=True)

        proxied.proxy.decide = first_time
        assert_holds(f"{proxied.url}/step_1", 1, proxied.options)
        assert len([path for path in cut if "blobs" in path]) > 5

    @both_services
    def test_blob_that_cannot_be_put(self, proxied: Place) -> None:
        """Where a put fails for good, the take fails and commits nothing; the next one works, gc takes the debris."""
        assert proxied.proxy is not None
        take(f"{proxied.url}/step_1", 1, storage_options=proxied.options)
        uploads = [0]

        def after_three(method: str, path: str) -> Fault | None:
            uploads[0] += is_upload(method, path)
            return Fault(503) if uploads[0] > 3 and is_upload(method, path) else None

        for is_async in (False, True):
            uploads[0] = 0
            proxied.proxy.decide = after_three
            for path in (f"{proxied.url}/step_1", f"{proxied.url}/step_2"):
                with pytest.raises(StoreUnavailableError, match=r"put.*network"):
                    take_either_way(path, 2 + is_async, is_async, proxied.options)
            proxied.proxy.decide = lambda method, path: None
            assert_holds(f"{proxied.url}/step_1", 1, proxied.options)
            with pytest.raises(SnapshotNotFoundError):
                restored(f"{proxied.url}/step_2", proxied.options)
        take(f"{proxied.url}/step_2", 4, storage_options=proxied.options)
        assert_holds(f"{proxied.url}/step_2", 4, proxied.options)
        assert collect(proxied.url, proxied.options, wait=0).freed_blobs > 0
        assert proxied.blobs() == proxied.needed("step_1", "step_2")

    @pytest.mark.parametrize("proxied", ["s3"], indirect=True)
    def test_commit_without_a_clear_answer(self, proxied: Place) -> None:
        """Where nobody knows whether the commit happened, the error says so and how to find out; no harm is done."""
        assert proxied.proxy is not None
        take(f"{proxied.url}/step_1", 1, storage_options=proxied.options)
        proxied.proxy.decide = lambda method, path: (
            Fault(drop=True, forward_first=method == "PUT") if path.endswith(".ok") else None
        )
        with pytest.raises(CommitUnknownError, match=r"Look again.*\.ok"):
            take(f"{proxied.url}/step_2", 2, storage_options=proxied.options)
        proxied.proxy.decide = lambda method, path: None
        assert_holds(f"{proxied.url}/step_2", 2, proxied.options)

    @both_services
    def test_damaged_blob(self, proxied: Place) -> None:
        """Damage in a bucket is found, named, and never reaches the target."""
        take(f"{proxied.url}/step_1", 1, storage_options=proxied.options)
        key = next(key for key in proxied.objects() if key.endswith(".p"))
        data = bytearray(proxied.backend().read(key))
        data[-5] ^= 4
        proxied.backend().put(key, data)
        with pytest.raises(CorruptionError, match=key.rpartition("/")[2]) as caught:
            restored(f"{proxied.url}/step_1", proxied.options)
        assert f"{proxied.url}/step_1" in str(caught.value)
        snapshot = Snapshot(f"{proxied.url}/step_1", storage_options=proxied.options)
        assert {problem.kind for problem in snapshot.verify()} == {"damaged"}
        proxied.backend().delete([key])
        assert {problem.kind for problem in snapshot.verify("blobs")} == {"missing"}

    def test_credentials_for_a_prefix(self, s3_url: tuple[str, dict[str, Any]]) -> None:
        """Credentials that are good for the store's prefix alone are enough for everything."""
        url, options = s3_url
        bucket = url.removeprefix("s3://").partition("/")[0]
        take(f"{url}/mine/step_1", 1, storage_options=options)
        with fault_proxy(options["endpoint_url"]) as proxy:
            mine = {**options, "endpoint_url": proxy.url}

            def only_mine(method: str, path: str) -> Fault | None:
                allowed = "runs%2Fmine" in path or f"{bucket}/runs/mine" in path or "?delete" in path
                return None if allowed else Fault(403, b"<Error><Code>AccessDenied</Code></Error>")

            proxy.decide = only_mine
            assert_holds(f"{url}/mine/step_1", 1, mine)
            take(f"{url}/mine/step_2", 2, storage_options=mine)
            assert_holds(f"{url}/mine/step_2", 2, mine)
            assert collect(f"{url}/mine", mine).freed_blobs == 0
            with pytest.raises(CredentialsError):
                take(f"{url}/others/step_1", 1, storage_options=mine)


class TestSecrets:
    KEY, SECRET, TOKEN = "AKIDXPOSED", "s3cr3t-that-must-not-show", "session-t0k3n"

    @pytest.mark.parametrize("proxied", ["s3"], indirect=True)
    def test_keys_are_nowhere(self, proxied: Place, caplog: pytest.LogCaptureFixture) -> None:
        """Neither errors nor our logs nor any stored object hold a key, a secret or a token."""
        assert proxied.proxy is not None
        options = {**proxied.options, "key": self.KEY, "secret": self.SECRET, "token": self.TOKEN}
        messages: list[str] = []
        with caplog.at_level(logging.DEBUG, "torchsnapshot"):
            for fault in (Fault(403), Fault(503), Fault(drop=True), Fault(404), Fault(507)):
                proxied.proxy.decide = lambda method, path, fault=fault: fault
                for use in (
                    lambda: take(f"{proxied.url}/step_2", 2, storage_options=options),
                    lambda: restored(f"{proxied.url}/step_1", options),
                    lambda: Snapshot.list(proxied.url, {**options, "no_such_option": 1}),
                ):
                    with pytest.raises((SnapshotError, ValueError)) as caught:
                        use()
                    messages += chain(caught.value)
            proxied.proxy.decide = lambda method, path: None
            take(f"{proxied.url}/step_1", 1, storage_options=options)
            take(f"{proxied.url}/step_1", 2, storage_options=options)
            collect(proxied.url, options)
        backend = proxied.backend()
        stored = [backend.read(key).decode("latin-1") + key for key in proxied.objects()]
        logged = [record.getMessage() for record in caplog.records if record.name.startswith("torchsnapshot")]
        assert len(messages) > 10
        assert logged
        for text in (*messages, *logged, *stored):
            for secret in (self.KEY, self.SECRET, self.TOKEN):
                assert secret not in text

    @pytest.mark.parametrize(
        "url",
        [
            "memory://user:hunter2@place/runs/nothing",
            "memory://user:hunter2@place/runs/../x",
            "nosuch://user:hunter2@host/runs",
            "ftp://user:hunter2@127.0.0.1:1/runs/step_1",
            "a::nosuch://user:hunter2@host/runs",
        ],
    )
    def test_passwords_in_urls_are_in_no_message(self, url: str) -> None:
        """A URL with a password is shown without it, whatever is wrong with it."""
        for use in (
            lambda: restored(url),
            lambda: Snapshot.take(url, {"app": StateDict(step=1)}, store=f"{url}/below"),
            lambda: collect(url),
            lambda: Snapshot.list(url),
            lambda: Snapshot(url).delete(),
        ):
            with pytest.raises((SnapshotError, ValueError)) as caught:
                use()
            assert "hunter2" not in str(caught.value)

    def test_passwords_in_urls_are_in_no_object(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """Nor do they reach the store, or the log."""
        root = f"memory://user:hunter2@{tmp_path.name}/runs"
        with caplog.at_level(logging.DEBUG, "torchsnapshot"):
            take(f"{root}/step_1", 1)
            take(f"{root}/step_1", 2)
            Snapshot.async_take(f"{root}/step_2", {"app": StateDict(x=torch.ones(3))}).wait()
            Snapshot(f"{root}/step_2").delete()
            collect(root)
            with pytest.raises(ValueError, match="inside the folder") as caught:
                take(f"{root}/step_1/below", 1)
        assert "hunter2" not in str(caught.value)
        assert "hunter2" not in caplog.text
        backend = open_backend(root)
        assert not any(b"hunter2" in backend.read(info.key) for info in backend.list(""))
        assert_holds(f"{root}/step_1", 2)


def chain(error: BaseException | None) -> list[str]:
    """The messages of our own errors in a chain; what other libraries put into theirs is not ours."""
    found = []
    while error is not None:
        if type(error).__module__.startswith("torchsnapshot") or isinstance(error, ValueError):
            found.append(str(error))
        error = error.__cause__
    return found
