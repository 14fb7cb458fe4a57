"""Tell wrapped objects from the user's own, and get the one out of the other."""

from __future__ import annotations

from typing import Any

from torch.nn import Module

from treadle_fabric.data.loader import WrappedLoader
from treadle_fabric.errors import MisconfigurationException
from treadle_fabric.setup.module import FabricModule
from treadle_fabric.setup.optimizer import FabricOptimizer

__all__ = ["engine_of", "is_wrapped", "put_back", "unwrap"]


def is_wrapped(obj: object) -> bool:
    """Whether an object is what ``Fabric.setup`` or ``setup_dataloaders`` returned."""
    return isinstance(obj, (FabricModule, FabricOptimizer, WrappedLoader))


def engine_of(module: Any, what: str) -> Module:
    """The engine of a wrapped module; ``what`` names the caller for the error."""
    if not isinstance(module, FabricModule):
        raise MisconfigurationException(
            f"{what} needs the model that setup returned, and got {type(module).__name__}. "
            "Call model = fabric.setup(model) first."
        )
    return module.forward_module


def unwrap(state: Any) -> Any:
    """Engines and users' optimizers in place of wrappers; a container without any is the same object."""
    if isinstance(state, FabricModule):
        return state.forward_module
    if isinstance(state, FabricOptimizer):
        return state.optimizer
    if isinstance(state, WrappedLoader):
        return _saveable(state)
    if isinstance(state, dict):
        new = {key: unwrap(value) for key, value in state.items()}
        return state if all(new[key] is value for key, value in state.items()) else new
    if type(state) in (list, tuple):
        items = [unwrap(value) for value in state]
        return state if all(a is b for a, b in zip(items, state, strict=True)) else type(state)(items)
    return state


def _saveable(loader: WrappedLoader) -> Any:
    """What a checkpoint gets of a loader: its own state, or that of the loader inside."""
    for candidate in (loader, loader.dataloader):
        if callable(getattr(type(candidate), "state_dict", None)):
            return candidate
    raise MisconfigurationException(
        f"The state holds a loader ({type(loader.dataloader).__name__}) that does not keep its position. Set it up "
        "with fabric.setup_dataloaders(loader, resumable=True), or leave it out."
    )


def put_back(state: dict[str, Any], loaded: dict[str, Any]) -> None:
    """Give the user's dict the plain values that loading put into its unwrapped copy."""
    for key, old in list(state.items()):
        if isinstance(old, dict) and unwrap(old) is not old:
            put_back(old, loaded[key])
        elif unwrap(old) is old:
            state[key] = loaded[key]
