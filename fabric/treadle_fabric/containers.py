"""Walk over nested containers: one list of container types, for moving, measuring, converting and saving.

Containers are lists, tuples, named tuples and deques; mappings, every kind of dict included; instances of dataclasses,
also frozen ones, ones with slots and ones with fields that ``__init__`` does not set. Everything else is a leaf.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any, Final

__all__ = ["SEQUENCES", "children", "leaves", "map_leaves", "with_children"]

SEQUENCES: Final = (list, tuple, deque)


def children(value: Any) -> Iterable[tuple[Any, Any]] | None:
    """What a container holds.

    Args:
        value: Anything.

    Returns:
        Pairs of index, key or field name, and value. ``None`` for a leaf.
    """
    if isinstance(value, SEQUENCES):
        return enumerate(value)
    if isinstance(value, Mapping):
        return value.items()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        return [(name, getattr(value, name)) for name in names if hasattr(value, name)]
    return None


def with_children(value: Any, changed: Mapping[Any, Any]) -> Any:
    """A copy of a container, of the same type, that holds something else at some places.

    Args:
        value: The container.
        changed: What it is to hold, by the index, key or field name that :func:`children` gives.
    """
    kind: Any = type(value)
    if kind is list or isinstance(value, tuple):
        items = [changed.get(i, item) for i, item in enumerate(value)]
        return items if kind is list else kind(*items) if hasattr(value, "_fields") else kind(items)
    if kind is dict or (isinstance(value, Mapping) and not isinstance(value, MutableMapping)):
        return kind({**value, **changed})
    result = copy.copy(value)
    for key, item in changed.items():
        if isinstance(value, (list, deque, Mapping)):
            result[key] = item
        else:
            object.__setattr__(result, key, item)  # frozen dataclasses too
    return result


def map_leaves(value: Any, change: Callable[[Any], Any], is_leaf: Callable[[Any], bool] | None = None) -> Any:
    """Change every leaf in nested containers.

    Args:
        value: A leaf, or a container.
        change: Gets a leaf, gives what takes its place.
        is_leaf: What to change: leaves, or containers to change as a whole. By default every leaf.

    Returns:
        The same structure; a container in which nothing changed is the same object.
    """
    if is_leaf is not None and is_leaf(value):
        return change(value)
    held = children(value)
    if held is None:
        return change(value) if is_leaf is None else value
    changed = {}
    for key, old in held:
        new = map_leaves(old, change, is_leaf)
        if new is not old:
            changed[key] = new
    return with_children(value, changed) if changed else value


def leaves(value: Any, is_leaf: Callable[[Any], bool] | None = None) -> Iterator[Any]:
    """The leaves in nested containers, in their order; ``is_leaf`` as in :func:`map_leaves`."""
    held = None if is_leaf is not None and is_leaf(value) else children(value)
    if held is not None:
        for _, item in held:
            yield from leaves(item, is_leaf)
    elif is_leaf is None or is_leaf(value):
        yield value
