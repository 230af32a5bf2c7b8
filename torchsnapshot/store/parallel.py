"""Many small requests at once: listings and reads of protocol objects. The data path has its own engine."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def parallel(function: Callable[[T], R], items: Iterable[T], num_threads: int) -> Iterator[R]:
    """``map(function, items)`` on ``num_threads`` threads, in order, holding at most twice as many results.

    The first error ends it and is raised. Not for work that may still run while the interpreter exits.
    """
    iterator = iter(items)
    first = next(iterator, _NOTHING)
    if isinstance(first, _Nothing):
        return
    second = next(iterator, _NOTHING)
    if num_threads <= 1 or isinstance(second, _Nothing):
        # no thread is worth starting for one request
        yield function(first)
        if not isinstance(second, _Nothing):
            yield function(second)
        for item in iterator:
            yield function(item)
        return
    with ThreadPoolExecutor(num_threads, thread_name_prefix="torchsnapshot-store") as pool:
        running: deque[Future[R]] = deque((pool.submit(function, first), pool.submit(function, second)))
        try:
            for item in iterator:
                running.append(pool.submit(function, item))
                if len(running) >= 2 * num_threads:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()


class _Nothing:
    """No item."""


_NOTHING = _Nothing()
