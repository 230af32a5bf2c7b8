"""Reading and checking an application's state: which objects it names, and the order in which they are asked.

What doesn't live here: what a state looks like inside (``flatten``), and how it is written back
(``restoring.restore``).

Invariant (upstream's): where the state holds an ``RNGState``, the random state after a take equals the one before it,
even if some ``state_dict()`` draws numbers, and it equals the one after a restore of that snapshot.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from torchsnapshot.errors import UnsupportedValueError
from torchsnapshot.format.entries import escape
from torchsnapshot.state.flatten import Node, TensorLeaf, flatten
from torchsnapshot.stateful import RNGState, Stateful, as_stateful

logger = logging.getLogger(__name__)

PrepareTensor = Callable[[str, torch.Tensor, bool], torch.Tensor]
"""``_custom_tensor_prepare_func``: (path, tensor, tracing) -> the tensor to store."""


def check_app_state(app_state: Mapping[str, Any]) -> dict[str, Stateful]:
    """The state's objects by key, in the order in which they are asked: sorted, an ``RNGState`` last.

    Raises:
        TypeError: it is no dict, a key is no str, or a value has no ``state_dict``/``load_state_dict`` and is no dict.
        RuntimeError: there is more than one ``RNGState``.
    """
    # whoever is not checked by mypy may pass anything, most often a module by itself
    given: object = app_state
    if not isinstance(given, Mapping):
        raise TypeError(
            "app_state must be a dict of objects by key, as in {'model': model, 'optim': optimizer}, not "
            f"{type(given).__name__}"
        )
    statefuls: dict[str, Stateful] = {}
    for key, value in app_state.items():
        if not isinstance(key, str):
            raise TypeError(f"Expected str keys in app_state, got {key!r} of type {type(key).__name__}.")
        statefuls[key] = as_stateful(key, value)
    random_states = [key for key, stateful in statefuls.items() if isinstance(stateful, RNGState)]
    if len(random_states) > 1:
        raise RuntimeError(f"Multiple RNGState objects in app_state: {random_states}. Keep one.")
    return {key: statefuls[key] for key in sorted(statefuls, key=lambda key: (key in random_states, key))}


@contextmanager
def random_state_kept(statefuls: Mapping[str, Stateful]) -> Iterator[None]:
    """Put torch's random state back after the block, if the state holds an ``RNGState``."""
    if not any(isinstance(stateful, RNGState) for stateful in statefuls.values()):
        yield
        return
    before = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(before)


def ask_for_states(statefuls: Mapping[str, Stateful]) -> dict[str, Any]:
    """Ask every object for its state; in the order of the keys."""
    states: dict[str, Any] = {}
    with random_state_kept(statefuls):
        # the random state is read before any other state_dict() has had a chance to draw numbers
        for key in sorted(statefuls, key=lambda key: not isinstance(statefuls[key], RNGState)):
            states[key] = statefuls[key].state_dict()
    return {key: states[key] for key in statefuls}


def flatten_states(states: Mapping[str, Any], prepare: PrepareTensor | None = None) -> dict[str, Node]:
    """Flatten what objects said of their states.

    Args:
        states: what ``ask_for_states`` returned.
        prepare: applied to every tensor; what it returns is stored.

    Returns:
        The nodes by path, keys in order, parents before children.

    Raises:
        UnsupportedValueError: values that no snapshot can hold, all of them at once.
    """
    nodes: dict[str, Node] = {}
    problems: list[str] = []
    for key, state in states.items():
        try:
            nodes.update(flatten(escape(key), state, on_opaque=log_opaque))
        except UnsupportedValueError as error:
            problems.extend(error.problems)
    if problems:
        raise UnsupportedValueError(problems)
    return nodes if prepare is None else _prepared_nodes(nodes, prepare)


def _prepared_nodes(nodes: Mapping[str, Node], prepare: PrepareTensor) -> dict[str, Node]:
    """What is stored instead of these nodes: a function may turn a dense tensor into one of several parts."""
    prepared: dict[str, Node] = {}
    problems: list[str] = []
    for path, node in nodes.items():
        if not (isinstance(node, TensorLeaf) and isinstance(node.tensor, torch.Tensor)):
            prepared[path] = node
            continue
        try:
            prepared.update(flatten(path, _prepared(path, node.tensor, prepare), on_opaque=log_opaque))
        except UnsupportedValueError as error:
            problems.extend(error.problems)
            continue
        result = prepared[path]
        if isinstance(result, TensorLeaf):
            prepared[path] = TensorLeaf(result.tensor, node.wrapper, node.requires_grad)
    if problems:
        raise UnsupportedValueError(problems)
    return prepared


def _prepared(path: str, tensor: torch.Tensor, prepare: PrepareTensor) -> torch.Tensor:
    traced = prepare(path, tensor, True)
    result = prepare(path, tensor, False)
    for kind, other in (("tracing", traced), ("staging", result)):
        if other.shape != tensor.shape:
            raise RuntimeError(
                f"_custom_tensor_prepare_func shouldn't change the tensor's shape: {path} has {tuple(tensor.shape)}, "
                f"the {kind} call returned {tuple(other.shape)}."
            )
    return result


def log_opaque(path: str, type_name: str) -> None:
    """Tell the user of a value that is stored as a pickle."""
    logger.info(
        "%s: a %s can only be stored as a pickle; restoring it needs allow_pickle=True. Plain values and objects "
        "with state_dict() need none.",
        path,
        type_name,
    )
