"""Objects in a state that a checkpoint can keep nothing of, such as a plain loader: they are left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch.utils.data import DataLoader, Dataset, Sampler

from treadle_fabric.containers import entries, with_entries
from treadle_fabric.data.loader import WrappedLoader
from treadle_fabric.data.samplers import samplers_of

__all__ = ["LoaderParts", "has_state", "left_out", "state_of_loader", "without_stateless"]


class LoaderParts:
    """The state of a loader that keeps no position, but whose dataset or sampler has a state.

    Args:
        parts: By name what has a ``state_dict``.
    """

    def __init__(self, parts: Mapping[str, Any]) -> None:
        self._parts = parts

    def state_dict(self) -> dict[str, Any]:
        """The states of the parts, by name."""
        return {name: part.state_dict() for name, part in self._parts.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; a part that the loader no longer has is passed over."""
        for name, part in self._parts.items():
            if name in state_dict:
                part.load_state_dict(state_dict[name])


def state_of_loader(loader: Any) -> Any:
    """The object whose state a checkpoint keeps of a loader.

    Returns:
        The wrapper or the loader inside, where these have a state; else their parts that have one; ``None`` without
        any.
    """
    inner = loader.dataloader if isinstance(loader, WrappedLoader) else loader
    for candidate in (loader, inner):
        if has_state(candidate):
            return candidate
    named = {"dataset": getattr(inner, "dataset", None)}
    named["sampler"] = next(filter(has_state, samplers_of(inner)), None)
    parts = {name: part for name, part in named.items() if has_state(part)}
    return LoaderParts(parts) if parts else None


def has_state(value: Any) -> bool:
    """Whether a checkpoint keeps the state that an object gives of itself."""
    kind = type(value)  # a wrapper has the attributes of the loader inside
    return callable(getattr(kind, "state_dict", None)) and callable(getattr(kind, "load_state_dict", None))


def _is_stateless(value: Any) -> bool:
    if isinstance(value, (WrappedLoader, DataLoader)):
        return state_of_loader(value) is None
    return isinstance(value, (Sampler, Dataset)) and not has_state(value)


def left_out(state: Any, place: str = "state", within: tuple[int, ...] = ()) -> Iterator[tuple[str, Any]]:
    """What :func:`without_stateless` leaves out, each with its place; ``within`` as in :func:`map_leaves`."""
    if _is_stateless(state):
        yield place, state
    elif not has_state(state) and id(state) not in within:
        for key, value in entries(state).items():
            yield from left_out(value, f"{place}[{key!r}]", (*within, id(state)))


def without_stateless(state: Any) -> Any:
    """Leave out of dicts, and replace by ``None`` in other containers, what has no state.

    Returns:
        The state; the same object if nothing is left out.
    """
    if isinstance(state, dict) and any(_is_stateless(value) for value in state.values()):
        state = {key: value for key, value in state.items() if not _is_stateless(value)}
    if _is_stateless(state):
        return None
    if next(left_out(state), None) is None:
        return state
    held = {key: without_stateless(value) for key, value in entries(state).items()}
    return with_entries(state, held)
