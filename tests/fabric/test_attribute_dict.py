"""A dictionary whose keys are attributes."""

from __future__ import annotations

import copy
import pickle

import pytest

from treadle_fabric.attribute_dict import AttributeDict


def test_keys_and_attributes_are_the_same_thing() -> None:
    state = AttributeDict({"step": 1}, lr=0.1)
    state.step += 1
    state["name"] = "x"
    assert state == {"step": 2, "lr": 0.1, "name": "x"}
    assert state.name == "x"
    del state.name
    assert "name" not in state


def test_a_missing_attribute_is_named() -> None:
    state = AttributeDict()
    with pytest.raises(AttributeError, match="'AttributeDict' object has no attribute 'lr'"):
        state.lr
    for error in (AttributeError, KeyError):
        with pytest.raises(error, match="^'AttributeDict' object has no attribute 'lr'$"):
            del state.lr
    assert not hasattr(state, "lr")


def test_it_is_copied_and_pickled_whole() -> None:
    state = AttributeDict(a=[1])
    for other in (copy.copy(state), copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        assert type(other) is AttributeDict
        assert other == state
    assert copy.deepcopy(state).a is not state.a


def test_it_prints_as_a_table() -> None:
    assert repr(AttributeDict(x=1, name="y")) == '"name": y\n"x":    1'
    assert repr(AttributeDict()) == ""
