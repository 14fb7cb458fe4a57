"""Walk over nested containers: one list of container types, for moving, measuring, converting and saving.

Containers are

- sequences: lists, tuples, named tuples, deques and every other ``Sequence``, but for text, bytes and numbers in one
  block of memory (``range``, ``array``);
- sets and frozen sets;
- mappings: every kind of dict, ``UserDict`` and every other ``Mapping``;
- records: instances of dataclasses and attrs classes (also frozen ones, ones with slots, and ones with fields that
  ``__init__`` does not set), ``Namespace`` and ``SimpleNamespace``, with all their attributes.

Everything else is a leaf, modules included.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from argparse import Namespace
from array import array
from collections import OrderedDict, UserDict, UserList, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, MutableSequence, Sequence, Set
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, Literal

from torch.nn import Module

from treadle_fabric.errors import MisconfigurationException

__all__ = [
    "children",
    "entries",
    "holds_state",
    "leaves",
    "leaves_by_path",
    "map_leaves",
    "update_entries",
    "with_children",
    "with_entries",
]

_OF_PYTHON = (dict, list, tuple, deque, UserDict, UserList)
_NO_SEQUENCES = (str, bytes, bytearray, memoryview, range, array)


@lru_cache(1024)
def _kind(cls: type) -> Literal["sequence", "set", "mapping", "record", "leaf"]:
    if issubclass(cls, Mapping):
        return "mapping"
    if issubclass(cls, (Sequence, deque)):
        return "leaf" if issubclass(cls, _NO_SEQUENCES) else "sequence"
    if issubclass(cls, Set):
        return "set"
    records = issubclass(cls, (Namespace, SimpleNamespace)) or hasattr(cls, "__attrs_attrs__")
    if (records or dataclasses.is_dataclass(cls)) and not issubclass(cls, Module):
        return "record"
    return "leaf"


def children(value: Any) -> Iterable[tuple[Any, Any]] | None:
    """What a container holds.

    Args:
        value: Anything.

    Returns:
        Pairs of index, key or attribute name, and value. ``None`` for a leaf.
    """
    cls: Any = type(value)
    kind = _kind(cls)
    if kind == "leaf":
        return None
    if kind == "mapping":
        pairs: Iterable[tuple[Any, Any]] = value.items()
        return pairs
    if kind == "record":
        return [(name, getattr(value, name)) for name in _attributes(value) if hasattr(value, name)]
    return enumerate(value)


def holds_state(value: Any) -> bool:
    """Whether objects with a state may be in a value: in the containers of Python, and in records.

    To look into a mapping or sequence of another library may load a dataset, or raise.
    """
    cls: Any = type(value)
    return issubclass(cls, _OF_PYTHON) or _kind(cls) == "record"


def entries(value: Any) -> dict[Any, Any]:
    """What a container that :func:`holds_state` holds, by index, key or name, of named tuples too; else nothing."""
    if not holds_state(value):
        return {}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return dict(zip(value._fields, value, strict=True))
    return dict(children(value) or ())


def _attributes(record: Any) -> Iterable[str]:
    """The names of the fields, which slots may hold, and of the other attributes."""
    if dataclasses.is_dataclass(record):
        names = [field.name for field in dataclasses.fields(record)]
    else:
        names = [field.name for field in getattr(record, "__attrs_attrs__", ())]
    return dict.fromkeys([*names, *getattr(record, "__dict__", ())])


def with_children(value: Any, changed: Mapping[Any, Any]) -> Any:
    """A copy of a container, of the same type, that holds something else at some places.

    Args:
        value: The container.
        changed: What it is to hold, by the index, key or attribute name that :func:`children` gives.

    Raises:
        MisconfigurationException: The type of the container is one that cannot be made anew.
    """
    cls = type(value)
    if cls is dict:
        return {**value, **changed}
    if cls is list:
        return [changed.get(i, item) for i, item in enumerate(value)]
    try:
        return _made_anew(value, changed)
    except Exception as error:
        raise MisconfigurationException(
            f"A {cls.__module__}.{cls.__qualname__} holds tensors that are to be moved or converted, and there is no "
            f"way to make another one with the new tensors ({type(error).__name__}: {error}). Give the class a method "
            "to(device), use a dict, a tuple or a dataclass, or move batches in transfer_batch_to_device."
        ) from error


def with_entries(value: Any, changed: Mapping[Any, Any]) -> Any:
    """As :func:`with_children`, by the indexes, keys and names of :func:`entries`."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        changed = {i: changed[name] for i, name in enumerate(value._fields) if name in changed}
    return with_children(value, changed)


def update_entries(value: Any, changed: Mapping[Any, Any]) -> Any:
    """As :func:`with_entries`, in the container itself; in a copy only where the container cannot be changed."""
    if isinstance(value, (MutableMapping, MutableSequence)):
        for key, item in changed.items():
            value[key] = item
        return value
    cls: Any = type(value)
    if _kind(cls) == "record":
        with contextlib.suppress(AttributeError):  # of a frozen one, which refuses the first already
            for name, item in changed.items():
                setattr(value, name, item)
            return value
    return with_entries(value, changed)


def _made_anew(value: Any, changed: Mapping[Any, Any]) -> Any:
    cls: Any = type(value)
    kind = _kind(cls)
    if kind == "record":
        result = copy.copy(value)
        for name, item in changed.items():
            object.__setattr__(result, name, item)  # frozen ones too
        return result
    if isinstance(value, (MutableMapping, MutableSequence)):
        result = _copied(value)
        for key, item in changed.items():
            result[key] = item
        return result
    if kind == "mapping":
        wanted = {**value, **changed}
        result = cls(wanted)
        same = len(result) == len(wanted) and all(result[key] is item for key, item in wanted.items())
    else:
        items = [changed.get(i, item) for i, item in enumerate(value)]
        result = _tuple(value, items) if isinstance(value, tuple) else cls(items)
        same = kind == "set" or (len(result) == len(items) and all(a is b for a, b in zip(result, items, strict=True)))
    if not same:
        raise TypeError(f"{cls.__qualname__}(entries) holds other entries")
    return result


def _copied(value: Any) -> Any:
    """A shallow copy that shares no storage with the original."""
    result = copy.copy(value)
    if not isinstance(value, (list, dict, deque)):  # its entries are in one of its attributes, as in UserDict
        for name, held in getattr(value, "__dict__", {}).items():
            if type(held) in (list, dict, OrderedDict, deque) and vars(result).get(name) is held:
                vars(result)[name] = copy.copy(held)
    return result


def _tuple(value: Any, items: list[Any]) -> Any:
    """A tuple of the same type, with the attributes of ``value``; a ``__new__`` of the user's own is not called."""
    cls = type(value)
    try:
        result = tuple.__new__(cls, items)
    except TypeError:  # types of C's, such as torch.return_types.max
        return cls(items)
    if attributes := getattr(value, "__dict__", None):
        vars(result).update(attributes)
    return result


def map_leaves(
    value: Any, change: Callable[[Any], Any], is_leaf: Callable[[Any], bool] | None = None, within: tuple[int, ...] = ()
) -> Any:
    """Change every leaf in nested containers.

    Args:
        value: A leaf, or a container.
        change: Gets a leaf, gives what takes its place.
        is_leaf: What to change: leaves, or containers to change as a whole. By default every leaf.
        within: The ids of the containers that hold ``value``: in a container that holds itself the walk ends.

    Returns:
        The same structure; a container in which nothing changed is the same object.

    Raises:
        MisconfigurationException: The type of a container is one that cannot be made anew.
    """
    if is_leaf is not None and is_leaf(value):
        return change(value)
    held = children(value)
    if held is None:
        return change(value) if is_leaf is None else value
    if id(value) in within:
        return value
    within = (*within, id(value))
    changed = {}
    for key, old in held:
        new = map_leaves(old, change, is_leaf, within)
        if new is not old:
            changed[key] = new
    return with_children(value, changed) if changed else value


def leaves(value: Any, is_leaf: Callable[[Any], bool] | None = None, within: tuple[int, ...] = ()) -> Iterator[Any]:
    """The leaves in nested containers, in their order; ``is_leaf`` and ``within`` as in :func:`map_leaves`."""
    held = None if is_leaf is not None and is_leaf(value) else children(value)
    if held is not None:
        if id(value) not in within:
            for _, item in held:
                yield from leaves(item, is_leaf, (*within, id(value)))
    elif is_leaf is None or is_leaf(value):
        yield value


def leaves_by_path(
    value: Any, is_leaf: Callable[[Any], bool], path: str = "", within: tuple[int, ...] = ()
) -> Iterator[tuple[str, Any]]:
    """The leaves in nested containers with their paths, such as ``['a'][0]``, and what ``is_leaf`` takes for a leaf."""
    held = None if is_leaf(value) else children(value)
    if held is None:
        yield path, value
    elif id(value) not in within:
        for key, item in held:
            yield from leaves_by_path(item, is_leaf, f"{path}[{key!r}]", (*within, id(value)))
