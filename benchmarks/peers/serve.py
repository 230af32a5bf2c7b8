"""A peer's side of the conversation: reads one request a line, as JSON, does it, answers with the seconds it took."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks.states import FULL, QUICK, State


class Contender(Protocol):
    """What a peer's module offers as ``make(state)``. A method that it cannot offer raises ``NotImplementedError``."""

    def save(self, folder: Path) -> None:
        """Save the state into an empty folder; return when the library calls it done."""

    def load(self, folder: Path) -> None:
        """Bring back what ``save`` wrote, into the state's own tensors."""

    def begin(self, folder: Path) -> Callable[[], None]:
        """Begin to save in the background; return as soon as the state may change, with what waits for the end."""


def serve(module: str, *, quick: bool) -> None:
    """Answer requests until there are none."""
    warnings.simplefilter("ignore")
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints is not an answer
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    state = State(QUICK if quick else FULL, lifelike=False)
    contender: Contender = importlib.import_module(f"benchmarks.peers.{module}").make(state)
    waiting: list[Callable[[], None]] = []
    for line in sys.stdin:
        try:
            answer = _answer(contender, state, json.loads(line), waiting)
        except Exception:
            answer = {"error": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")


def _answer(
    contender: Contender, state: State, request: dict[str, Any], waiting: list[Callable[[], None]]
) -> dict[str, Any]:
    folder = Path(request["folder"])
    work: Callable[[], object] = {
        "hello": lambda: None,
        "change": lambda: state.change(request["what"]),
        "save": lambda: contender.save(folder),
        "save durably": lambda: save_durably(contender, folder),
        "load": lambda: contender.load(folder),
        "begin": lambda: waiting.append(contender.begin(folder)),
        "wait": lambda: waiting.pop()(),
    }[request["do"]]
    begin = time.perf_counter()
    work()
    return {"seconds": time.perf_counter() - begin}


def save_durably(contender: Contender, folder: Path) -> None:
    """Save, and wait until the bytes are on the disk."""
    contender.save(folder)
    make_durable(folder)


def make_durable(folder: Path) -> None:
    """Fsync every file below ``folder`` and every folder."""
    for path in [*folder.rglob("*"), folder, folder.parent]:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
