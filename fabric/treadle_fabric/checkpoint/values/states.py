"""The state of an object, as a checkpoint keeps it."""

from __future__ import annotations

from types import FunctionType
from typing import Any

__all__ = ["state_of"]


def state_of(holder: Any) -> Any:
    """Return ``holder.state_dict()`` without functions of the class of ``holder``, which each of its objects has.

    ``SWALR`` of torch 2.9 keeps such a one. As part of a state, a function could only be pickled.
    """
    state = holder.state_dict()
    if type(state) is not dict:
        return state
    own = {key for key, value in state.items() if _is_of_class(value, type(holder))}
    return {key: value for key, value in state.items() if key not in own} if own else state


def _is_of_class(value: Any, cls: type) -> bool:
    return isinstance(value, FunctionType) and getattr(cls, value.__name__, None) is value
