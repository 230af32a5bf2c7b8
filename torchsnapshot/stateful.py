"""What an application's state is made of: objects with ``state_dict`` and ``load_state_dict``."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch


@runtime_checkable
class Stateful(Protocol):
    """Anything whose state can be read as a dict and loaded from one: modules, optimizers, schedulers…"""

    def state_dict(self) -> dict[str, Any]:
        """The state. Its tensors may be the live ones."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state."""
        ...


@runtime_checkable
class HasParameters(Protocol):
    """A ``Stateful`` that says how tensors are spread that it does not have yet."""

    def parameter_of(self, components: Sequence[str]) -> torch.Tensor | None:
        """The parameter like which a tensor is spread, by the components of its path below the object's key."""
        ...


AppState = dict[str, Stateful]
"""What a snapshot is taken of: objects by key. A plain dict in it acts as a ``StateDict``."""


class StateDict(UserDict):  # type: ignore[type-arg]
    """A dict that is its own state: ``StateDict(epoch=3, losses=[])``.

    Restoring it replaces the keys that the snapshot holds; its other keys stay.
    """

    def state_dict(self) -> dict[Any, Any]:
        """The dict itself, not a copy."""
        return self.data

    def load_state_dict(self, state_dict: dict[Any, Any]) -> None:
        """Take over the keys of ``state_dict``."""
        self.data.update(state_dict)


class RNGState:
    """The state of torch's random number generator for the host.

    With it in the state, the generator is after a restore where it was after the take, even if some ``state_dict``
    draws numbers. An application's state holds at most one.
    """

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The generator's state."""
        return {"rng_state": torch.get_rng_state()}

    def load_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
        """Set the generator's state."""
        torch.set_rng_state(state_dict["rng_state"])


def as_stateful(key: str, value: Any) -> Stateful:
    """The object to ask for the state under ``key``: ``value`` itself, or a plain dict in the shape of a ``StateDict``.

    Args:
        key: where it stands in the application's state.
        value: a ``Stateful`` or a dict. Restoring updates the dict itself.

    Raises:
        TypeError: it is neither.
    """
    # a class has the methods of its objects, but nobody whose state they could read
    if isinstance(value, Stateful) and not isinstance(value, type):
        return value
    if isinstance(value, dict):
        wrapped = StateDict()
        wrapped.data = value
        return wrapped
    raise TypeError(
        f"Expected Stateful in app_state for key {key}, got {value if isinstance(value, type) else type(value)}. Pass "
        "an object with state_dict() and load_state_dict(), or put the value into a dict."
    )
