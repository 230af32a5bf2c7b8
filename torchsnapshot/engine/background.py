"""Work that goes on in the background after its caller has returned: one thread a task, and what exit does about them.

What doesn't live here: what the work is (``snapshot`` gives it), the worker threads that move bytes (``pipeline``).

Invariants: a task always ends, with a result or with an error that ``wait`` raises; an error that nobody has waited
for is logged when the process ends, at the latest. Leaving the interpreter waits for every task *before* Python shuts
its executors down: filesystems resolve names and run callbacks in these, and a task that only ran on would fail
there. A forked child inherits no task.
"""

from __future__ import annotations

import concurrent.futures.thread  # noqa: F401  (registers its exit hook before ours)
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Generic, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")

# those that run, and those that have failed without anybody having heard of it
_tasks: list[Task[object]] = []
_lock = threading.Lock()


class Task(Generic[T]):
    """One function running in a thread of its own."""

    def __init__(self, function: Callable[[], T], name: str) -> None:
        self._future: Future[T] = Future()
        self._pid = os.getpid()
        self._heard = False
        self.name = name
        self._thread = threading.Thread(target=self._run, args=(function,), name=name, daemon=False)
        with _lock:
            _tasks.append(self)  # type: ignore[arg-type]
        try:
            self._thread.start()
        except BaseException:
            self._forget()
            raise

    def _run(self, function: Callable[[], T]) -> None:
        try:
            result = function()
        except BaseException as error:  # the error belongs to whoever waits
            self._future.set_exception(error)
        else:
            self._forget()
            self._future.set_result(result)

    def _forget(self) -> None:
        with _lock:
            if self in _tasks:
                _tasks.remove(self)  # type: ignore[arg-type]

    def done(self) -> bool:
        """Whether the task has ended, with a result or an error."""
        return self._future.done()

    def wait(self, timeout: float | None = None) -> T:
        """The task's result.

        Args:
            timeout: seconds to wait; None waits as long as it takes.

        Raises:
            TimeoutError: the task has not ended by then; it goes on.
            Whatever the task raised.
        """
        if self._pid != os.getpid():
            raise RuntimeError(f"{self.name} runs in process {self._pid}; a forked child cannot wait for it")
        try:
            return self._future.result(timeout)
        except BaseException as error:
            if error is self.error():
                self._note_heard()
                raise
            if isinstance(error, FutureTimeoutError):
                raise TimeoutError(f"{self.name} has not finished within {timeout} s; it goes on") from None
            raise

    def wait_ended(self) -> None:
        """Return once the task has ended; its result or error stays for whoever calls ``wait``."""
        self._thread.join()

    def error(self) -> BaseException | None:
        """The error of a task that has ended with one."""
        return self._future.exception() if self._future.done() else None

    def report_unheard(self) -> None:
        """Log the error of a task that has ended with one, unless somebody has heard of it already."""
        error = self.error()
        if error is not None and not self._heard:
            self._note_heard()
            logger.error("%s failed, and nobody has waited for it", self.name, exc_info=error)

    def _note_heard(self) -> None:
        self._heard = True
        self._forget()

    def _join_at_exit(self) -> None:
        self._thread.join()
        self.report_unheard()


def _wait_at_exit() -> None:
    with _lock:
        tasks = list(_tasks)
    for task in tasks:
        task._join_at_exit()


def _reset_in_child() -> None:
    global _lock
    _lock = threading.Lock()
    _tasks.clear()


os.register_at_fork(after_in_child=_reset_in_child)
# Callbacks run in reverse order of registration: concurrent.futures, imported above, has registered its own before, so
# its executors still work while ours waits. Without this (private) hook, threading joins the threads after them.
_register_atexit = getattr(threading, "_register_atexit", None)
if _register_atexit is not None:
    _register_atexit(_wait_at_exit)
