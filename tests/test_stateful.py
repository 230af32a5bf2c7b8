"""What an application's state is made of."""

from __future__ import annotations

import pytest
import torch

from torchsnapshot.stateful import AppState, RNGState, StateDict, Stateful, as_stateful


def test_a_state_dict_is_its_own_state() -> None:
    """The very dict is read, and restoring keeps keys that the snapshot does not hold."""
    state = StateDict(epoch=1, losses=[0.5])
    assert type(state.state_dict()) is dict
    assert state.state_dict() is state.data
    state.load_state_dict({"epoch": 7})
    assert state == {"epoch": 7, "losses": [0.5]}
    assert isinstance(state, Stateful)


def test_a_plain_dict_acts_as_a_state_dict() -> None:
    """Restoring updates the user's own dict, in place."""
    own = {"epoch": 1, "kept": True}
    stateful = as_stateful("progress", own)
    assert stateful.state_dict() is own
    stateful.load_state_dict({"epoch": 2})
    assert own == {"epoch": 2, "kept": True}


def test_objects_with_a_state_are_taken_as_they_are() -> None:
    """Modules, optimizers and everything with the two methods."""
    module = torch.nn.Linear(1, 1)
    app_state: AppState = {"model": module, "progress": StateDict(), "random": RNGState()}  # type: ignore[dict-item]
    for key, value in app_state.items():
        assert as_stateful(key, value) is value


@pytest.mark.parametrize("value", [1, [torch.zeros(1)], None, torch.zeros(1)])
def test_other_values_are_refused(value: object) -> None:
    """The error names the key and the type."""
    with pytest.raises(TypeError, match="Expected Stateful in app_state for key stray, got"):
        as_stateful("stray", value)


def test_the_random_state_is_torchs() -> None:
    """Numbers drawn after loading it are those drawn after it was read."""
    state = RNGState()
    before = state.state_dict()
    first = torch.rand(3)
    state.load_state_dict(before)
    assert torch.equal(torch.rand(3), first)
