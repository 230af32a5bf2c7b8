"""The state of one take, and its plan, made in the shortest way that is open.

What lives here: the choice among the ways. What doesn't: the long one (``plan``), the short ones (``structure``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchsnapshot.state.app_state import PrepareTensor, ask_for_states, flatten_states, log_opaque
from torchsnapshot.state.flatten import Node
from torchsnapshot.state.live_digests import Look
from torchsnapshot.state.skeleton import Reading, Skeleton
from torchsnapshot.stateful import Stateful
from torchsnapshot.store.known import Known
from torchsnapshot.taking import structure
from torchsnapshot.taking.expected import Expected
from torchsnapshot.taking.history import Remembered
from torchsnapshot.taking.plan import TakePlan, plan_take
from torchsnapshot.taking.structure import Structure


class TakenState:
    """What the application's objects said of their states. Drop it when it is planned: it holds their tensors.

    Args:
        statefuls: what ``check_app_state`` returned.
        prepare: applied to every tensor; what it returns is stored.

    Raises:
        UnsupportedValueError: values that no snapshot can hold, all of them at once.
    """

    def __init__(self, statefuls: Mapping[str, Stateful], prepare: PrepareTensor | None = None) -> None:
        states = ask_for_states(statefuls)
        self._reading: Reading | None = None
        self._nodes: dict[str, Node] | None = None
        # what another function makes of the tensors is in no skeleton
        self._states: dict[str, Any] | None = states if prepare is None else None
        if prepare is None:
            self._reading = structure.read(states, log_opaque)
        if self._reading is None:
            self._nodes = flatten_states(states, prepare)

    def nodes(self) -> Mapping[str, Node]:
        """The nodes by path, keys in order, parents before children."""
        if self._nodes is None:
            assert self._reading is not None
            self._nodes = self._reading.nodes()
        return self._nodes

    def plan_anew(
        self, store_id: str, previous: Remembered, chunk_nbytes: int, small_nbytes: int
    ) -> tuple[TakePlan, Structure | None]:
        """Cut the state into chunks, with a look at every one of them. See ``plan``."""
        last = structure.recall(store_id)
        if last is not None:
            plan = last.plan(self.nodes(), previous, chunk_nbytes, small_nbytes)
            if plan is not None:
                self._give_skeleton(last)
                return plan, last
        plan = plan_take(self.nodes(), previous, chunk_nbytes, small_nbytes)
        found = Structure.of(plan, chunk_nbytes, small_nbytes)
        if found is not None:
            self._give_skeleton(found)
        structure.remember(store_id, found)
        return plan, found

    def plan(
        self, store_id: str, previous: Remembered, known: Known, look: Look, chunk_nbytes: int, small_nbytes: int
    ) -> tuple[TakePlan, Expected, Structure | None]:
        """Cut the state into chunks; a state of the same structure as the last one with less work.

        Args:
            store_id: the store that it is taken into.
            previous: what this process last took or restored there.
            known: what the take may reuse.
            look: what is known of memory, and was found out when the state was there.
            chunk_nbytes: see ``plan_take``.
            small_nbytes: see ``plan_take``.

        Returns:
            The plan, what it expects of leaves that it has taken over, and the structure that packs it: None for states
            that have kinds of leaves without one.
        """
        last = structure.recall(store_id)
        if last is not None and self._reading is not None:
            short = last.plan_settled(self._reading, previous.take_id, known, look, (chunk_nbytes, small_nbytes))
            if short is not None:
                return *short, last
        plan, found = self.plan_anew(store_id, previous, chunk_nbytes, small_nbytes)
        return plan, Expected(), found

    def _give_skeleton(self, owner: Structure) -> None:
        """See to it that the next state like this one can be read faster."""
        if self._reading is not None:
            # stores that are given the same state share one
            if owner.skeleton is not self._reading.skeleton:
                owner.skeleton = self._reading.skeleton
        elif self._states is not None:
            owner.skeleton = Skeleton(self._states, self.nodes())
