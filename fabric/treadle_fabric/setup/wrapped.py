"""Tell wrapped objects from the user's own, and unwrap them."""

from __future__ import annotations

from typing import Any

from torch.nn import Module
from torch.utils.data import DataLoader

from treadle_fabric.containers import entries, holds_state, map_leaves, update_entries
from treadle_fabric.data.loader import WrappedLoader
from treadle_fabric.errors import WrongTypeError
from treadle_fabric.setup.module import FabricModule, engine_of
from treadle_fabric.setup.optimizer import FabricOptimizer
from treadle_fabric.setup.stateless import has_state, left_out, state_of_loader
from treadle_fabric.strategies.unwrapping import layers_of

__all__ = ["given_engine", "given_module", "is_wrapped", "put_back", "unwrap", "unwrap_objects"]


def is_wrapped(obj: object) -> bool:
    """Return whether ``Fabric.setup`` or ``Fabric.setup_dataloaders`` returned this object, or one that is inside."""
    return isinstance(obj, (FabricOptimizer, WrappedLoader)) or _set_up(obj) is not None


def _set_up(obj: object) -> FabricModule | None:
    """What ``Fabric.setup`` returned, also where it was compiled afterwards; None for other objects."""
    layers = layers_of(obj) if isinstance(obj, Module) else ()
    return next((layer for layer in layers if isinstance(layer, FabricModule)), None)


def given_module(module: Any) -> FabricModule:
    """Return what ``Fabric.setup`` returned, also where it was compiled afterwards."""
    wrapped = _set_up(module)
    assert wrapped is not None
    return wrapped


def given_engine(module: Any, what: str) -> Module:
    """Return the engine of a wrapped module; ``what`` names the caller, for the error."""
    wrapped = _set_up(module)
    if wrapped is None:
        raise WrongTypeError(
            f"{what} needs the model that setup returned, and got {type(module).__name__}. "
            "Call model = fabric.setup(model) first."
        )
    return engine_of(wrapped)


def unwrap(state: Any) -> Any:
    """Replace wrappers by engines and users' optimizers; a container without wrappers stays the same object."""
    return map_leaves(state, _unwrapped, _is_whole)


def _is_whole(value: Any) -> bool:
    whole = isinstance(value, (Module, FabricOptimizer, WrappedLoader, DataLoader)) or has_state(value)
    return whole or not holds_state(value)


def _unwrapped(value: Any) -> Any:
    if isinstance(value, Module):
        wrapped = _set_up(value)
        return value if wrapped is None else engine_of(wrapped)
    if isinstance(value, FabricOptimizer):
        return value.optimizer
    return state_of_loader(value) if isinstance(value, (WrappedLoader, DataLoader)) else value


def put_back(state: dict[str, Any], loaded: dict[str, Any]) -> None:
    """Copy the plain values that loading put into the unwrapped copy of a dict into the user's dict."""
    for key, old in list(state.items()):
        if key in loaded:
            state[key] = _merged(old, loaded[key])


def _merged(old: Any, new: Any) -> Any:
    """The loaded value in the place of a plain one; a wrapper, and what was left out, stays."""
    if unwrap(old) is old and next(left_out(old), None) is None:
        return new
    if _is_whole(old):
        return old
    held, found = entries(old), entries(new)
    return update_entries(old, {key: _merged(value, found[key]) for key, value in held.items() if key in found})


def unwrap_objects(collection: Any) -> Any:
    """Replace what ``setup`` and ``setup_dataloaders`` returned by engines, optimizers and loaders, in containers."""
    return map_leaves(collection, _inside, is_wrapped)


def _inside(wrapper: Any) -> Any:
    if isinstance(wrapper, WrappedLoader):
        return wrapper.dataloader
    return wrapper.optimizer if isinstance(wrapper, FabricOptimizer) else engine_of(given_module(wrapper))
