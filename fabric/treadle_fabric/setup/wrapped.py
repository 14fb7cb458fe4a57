"""Tell wrapped objects from the user's own, and unwrap them."""

from __future__ import annotations

from typing import Any

from torch.nn import Module
from torch.utils.data import DataLoader

from treadle_fabric.data.loader import WrappedLoader
from treadle_fabric.errors import MisconfigurationException
from treadle_fabric.setup.module import FabricModule, engine_of
from treadle_fabric.setup.optimizer import FabricOptimizer
from treadle_fabric.setup.stateless import left_out, state_of_loader
from treadle_fabric.strategies.unwrapping import layers_of

__all__ = ["given_engine", "is_wrapped", "put_back", "unwrap"]


def is_wrapped(obj: object) -> bool:
    """Return whether ``Fabric.setup`` or ``Fabric.setup_dataloaders`` returned this object, or one that is inside."""
    return isinstance(obj, (FabricOptimizer, WrappedLoader)) or _set_up(obj) is not None


def _set_up(obj: object) -> FabricModule | None:
    """What ``Fabric.setup`` returned, also where it was compiled afterwards; None for other objects."""
    layers = layers_of(obj) if isinstance(obj, Module) else ()
    return next((layer for layer in layers if isinstance(layer, FabricModule)), None)


def given_engine(module: Any, what: str) -> Module:
    """Return the engine of a wrapped module; ``what`` names the caller, for the error."""
    wrapped = _set_up(module)
    if wrapped is None:
        raise MisconfigurationException(
            f"{what} needs the model that setup returned, and got {type(module).__name__}. "
            "Call model = fabric.setup(model) first."
        )
    return engine_of(wrapped)


def unwrap(state: Any) -> Any:
    """Replace wrappers by engines and users' optimizers; a container without wrappers stays the same object."""
    if isinstance(state, Module):
        wrapped = _set_up(state)
        return state if wrapped is None else engine_of(wrapped)
    if isinstance(state, FabricOptimizer):
        return state.optimizer
    if isinstance(state, (WrappedLoader, DataLoader)):
        return state_of_loader(state)
    if isinstance(state, dict):
        new = {key: unwrap(value) for key, value in state.items()}
        return state if all(new[key] is value for key, value in state.items()) else new
    if type(state) in (list, tuple):
        items = [unwrap(value) for value in state]
        return state if all(a is b for a, b in zip(items, state, strict=True)) else type(state)(items)
    return state


def put_back(state: dict[str, Any], loaded: dict[str, Any]) -> None:
    """Copy the plain values that loading put into the unwrapped copy of a dict into the user's dict."""
    for key, old in list(state.items()):
        if key in loaded:
            state[key] = _merged(old, loaded[key])


def _merged(old: Any, new: Any) -> Any:
    """The loaded value in the place of a plain one; a wrapper, and what was left out, stays."""
    if unwrap(old) is old and next(left_out(old), None) is None:
        return new
    if isinstance(old, dict):
        put_back(old, new)
    elif type(old) in (list, tuple) and isinstance(new, (list, tuple)) and len(new) == len(old):
        items = map(_merged, old, new)
        if isinstance(old, tuple):
            return tuple(items)
        old[:] = items
    return old
