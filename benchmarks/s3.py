"""A take to S3 and a restore from it, beside a plain loop that puts and gets the same objects with the same client.

The server is ``s3_stub``: fast enough that the client is what is measured, as far as one machine can do that.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import aiobotocore.session
from aiobotocore.config import AioConfig

from benchmarks.limits import Limits, pieces_of
from benchmarks.part import REPOSITORY, Options, run_part, take_turns, timed, use_all_cores
from benchmarks.report import Line, Result, megabytes, readable, verdict
from benchmarks.states import FULL, QUICK, State
from torchsnapshot import Snapshot

BUCKET = "bucket"
IN_FLIGHT = 32
TARGET = 0.8


@contextmanager
def stub() -> Iterator[str]:
    """A running stub server; yields its URL."""
    command = [sys.executable, "-m", "benchmarks.s3_stub"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.stdin.close()


class Plain:
    """The plain loop: the objects that a take has stored, put and got with ``IN_FLIGHT`` requests at a time."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._objects: dict[str, bytes] = {}

    def learn(self, prefix: str) -> int:
        """Fetch what lies below ``prefix``; these are the objects from now on. Returns their bytes."""

        async def fetch(client: Any) -> None:
            found: dict[str, Any] = await client.list_objects_v2(Bucket=BUCKET, Prefix=prefix)
            for item in found["Contents"]:
                answer = await client.get_object(Bucket=BUCKET, Key=item["Key"])
                self._objects[item["Key"].replace(prefix, "plain", 1)] = await answer["Body"].read()

        asyncio.run(self._with_client(fetch))
        return sum(map(len, self._objects.values()))

    def put(self) -> float:
        """Seconds to put every object."""

        async def put_one(client: Any, key: str) -> None:
            await client.put_object(Bucket=BUCKET, Key=key, Body=self._objects[key])

        return self._each(put_one)

    def get(self) -> float:
        """Seconds to get every object."""

        async def get_one(client: Any, key: str) -> None:
            answer = await client.get_object(Bucket=BUCKET, Key=key)
            await answer["Body"].read()

        return self._each(get_one)

    def _each(self, work: Callable[[Any, str], Awaitable[None]]) -> float:
        seconds = 0.0

        async def run(client: Any) -> None:
            nonlocal seconds
            slots = asyncio.Semaphore(IN_FLIGHT)

            async def limited(key: str) -> None:
                async with slots:
                    await work(client, key)

            begin = time.perf_counter()
            await asyncio.gather(*(limited(key) for key in self._objects))
            seconds = time.perf_counter() - begin

        asyncio.run(self._with_client(run))
        return seconds

    async def _with_client(self, work: Callable[[Any], Awaitable[None]]) -> None:
        session = aiobotocore.session.get_session()
        config = AioConfig(max_pool_connections=IN_FLIGHT, s3={"addressing_style": "path"})
        async with session.create_client(
            "s3",
            endpoint_url=self._url,
            region_name="us-east-1",
            aws_access_key_id="benchmark",
            aws_secret_access_key="benchmark",
            config=config,
        ) as client:
            await work(client)


class Ours:
    """Takes into a new root each time, and restores of the last one."""

    def __init__(self, state: State, url: str, limits: Limits) -> None:
        self._state = state
        self._options = {
            "key": "benchmark",
            "secret": "benchmark",
            "endpoint_url": url,
            "client_kwargs": {"region_name": "us-east-1"},
        }
        self._limits = limits
        self._pieces = pieces_of(state.flat().values())
        self._number = 0

    @property
    def prefix(self) -> str:
        """Where the last take went."""
        return f"ours-{self._number}"

    def take(self) -> float:
        """Seconds of a first take."""
        self._number += 1
        path = f"s3://{BUCKET}/{self.prefix}/step"
        work = partial(Snapshot.take, path, self._state.app_state, storage_options=self._options, encoding="raw")
        return timed(work)

    def restore(self) -> float:
        """Seconds of a restore into a state that differs everywhere."""
        digests = self._limits.digests(self._pieces)
        self._state.change("all")
        snapshot = Snapshot(f"s3://{BUCKET}/{self.prefix}/step", storage_options=self._options)
        seconds = timed(lambda: snapshot.restore(self._state.app_state))
        if self._limits.digests(self._pieces) != digests:
            raise AssertionError("the restored state is not the one that was taken")
        return seconds


def measure(options: Options) -> Result:
    """Measure, and hold it against the targets."""
    use_all_cores()
    result = Result()
    state = State(QUICK if options.quick else FULL)
    limits = Limits(options.folder)
    with stub() as url:
        plain, ours = Plain(url), Ours(state, url, limits)
        ours.take()
        result.facts = {"state_nbytes": state.nbytes, "objects_nbytes": plain.learn(ours.prefix)}
        _wipe(url)

        def round_trip(contender: str, put: Callable[[], float], get: Callable[[], float]) -> float:
            """One put and one get; the server starts and ends empty, or its memory would grow."""
            seconds = put()
            back = get()
            _wipe(url)
            gets.setdefault(contender, []).append(back)
            return seconds

        gets: dict[str, list[float]] = {}
        turns = {
            "take": partial(round_trip, "restore", ours.take, ours.restore),
            "plain puts": partial(round_trip, "plain gets", plain.put, plain.get),
        }
        take_turns(turns, result, options.rounds)
        result.series.update({name: seconds[-options.rounds :] for name, seconds in gets.items()})
    stored = megabytes(result.facts["objects_nbytes"])
    for name, loop in (("take", "plain puts"), ("restore", "plain gets")):
        mine, theirs = result.median(name), result.median(loop)
        result.lines.append(
            Line(
                f"S3, {name} of {stored}",
                f"≥ {TARGET:g} × the speed of a plain loop",
                f"{readable(mine)} = {theirs / mine:.2f} × its speed",
                "",
                f"{readable(theirs)} {loop}, {IN_FLIGHT} at a time",
                verdict(theirs / mine >= TARGET),
            )
        )
    return result


def _wipe(url: str) -> None:
    urllib.request.urlopen(urllib.request.Request(f"{url}/?wipe", method="POST")).close()


if __name__ == "__main__":
    run_part("s3", measure)
