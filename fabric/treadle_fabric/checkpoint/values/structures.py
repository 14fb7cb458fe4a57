"""Dataclasses, enums and named tuples, and the classes that a program names in its annotations.

A file says only what a class is called. The class itself has to be known to the program that loads: from the
annotations of a constructor, or from objects that the program gives.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import inspect
import sys
import typing
from collections.abc import Iterable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

from torch.nn import Module

from treadle_fabric.containers import children

__all__ = ["classes_in_state", "known_classes", "make_structure", "name_of", "take_structure"]


def name_of(cls: type) -> str:
    """The name of a class with its module, by which a file and a program find that they mean the same class."""
    return f"{cls.__module__}.{cls.__qualname__}"


# --- the values ---


def take_structure(value: Any) -> tuple[str, Any, Any] | None:
    """The kind of a value, its content and what else is to be known of it; None for what is no structure."""
    if isinstance(value, enum.Enum):
        return "enum", value.value if _is_plain(value.value) else value.name, value.name
    if isinstance(value, Module | type):
        return None
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        return "dataclass", {name: getattr(value, name) for name in names if hasattr(value, name)}, None
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return "namedtuple", tuple(value), None
    return None


def _is_plain(value: Any) -> bool:
    if type(value) is tuple:
        return all(_is_plain(each) for each in value)
    return type(value) in (bool, int, float, complex, str, bytes, type(None))


def make_structure(kind: str, content: Any, more: Any, cls: Any) -> Any:
    """The value that :func:`take_structure` took apart.

    Raises:
        Exception: The content does not fit the class, which may be another one than when it was saved.
    """
    if kind == "enum":
        if more in cls.__members__:
            return cls[more]
        return cls(content)
    if kind == "namedtuple":
        return cls._make(content)
    if kind == "dataclass":
        return _make_dataclass(cls, content)
    raise LookupError(kind)


def _make_dataclass(cls: Any, content: Mapping[str, Any]) -> Any:
    """Call the constructor, for what it sets beside the fields, and set all fields to what they were."""
    fields = dataclasses.fields(cls)
    try:
        made = cls(**{f.name: content[f.name] for f in fields if f.init and f.name in content})
    except Exception:  # it wants an InitVar, or what was changed later would not pass its checks
        missing = [f.name for f in fields if f.name not in content and _has_no_default(f)]
        if missing:
            raise
        made = object.__new__(cls)
        for f in fields:
            if f.name not in content:
                default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
                object.__setattr__(made, f.name, default)
    for f in fields:
        if f.name in content:
            object.__setattr__(made, f.name, content[f.name])  # frozen dataclasses, too
    return made


def _has_no_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


# --- the classes ---


def known_classes(owner: type) -> frozenset[type]:
    """The dataclasses, enums and named tuples in the annotations and defaults of the constructors of a class.

    They are found as deep as the annotations go: in ``Optional``, unions, ``list[...]`` and the like, and in the fields
    of dataclasses and named tuples. An annotation with a name that only a type checker sees counts for nothing.
    """
    found: set[type] = set()
    for cls in owner.__mro__:
        if dataclasses.is_dataclass(cls):
            _add_all(_hints(cls), found)
        init = vars(cls).get("__init__")
        if init is None or cls is object:
            continue
        _add_all(_hints(init), found)
        try:
            parameters: Iterable[inspect.Parameter] = inspect.signature(init).parameters.values()
        except (TypeError, ValueError):
            continue
        for parameter in parameters:
            if parameter.default is not parameter.empty:
                found |= classes_in_state(parameter.default)
    return frozenset(found)


def classes_in_state(state: Any) -> frozenset[type]:
    """The classes of the dataclasses, enums and named tuples in an object, and those that their fields may have."""
    found: set[type] = set()
    for value in _structures(state):
        _add(type(value), found)
    return frozenset(found)


def _structures(value: Any, within: tuple[int, ...] = ()) -> Iterator[Any]:
    """The structures in a value, which may hold itself: a tree whose nodes know their parents, for example."""
    if isinstance(value, enum.Enum):
        yield value
        return
    structure = take_structure(value)
    if structure is not None:
        yield value
    if id(value) not in within and (structure is not None or isinstance(value, dict | list | tuple)):
        for _, each in children(value) or ():
            yield from _structures(each, (*within, id(value)))


def _add_all(annotations: Iterable[Any], found: set[type]) -> None:
    for annotation in annotations:
        _add(annotation, found)


def _add(annotation: Any, found: set[type]) -> None:
    for argument in typing.get_args(annotation):
        _add(type(argument) if isinstance(argument, enum.Enum) else argument, found)  # Literal[Color.RED]
    cls = typing.get_origin(annotation) or annotation
    if isinstance(cls, typing.TypeVar):
        _add_all((cls.__bound__, *cls.__constraints__), found)
    elif hasattr(cls, "__supertype__"):  # typing.NewType
        _add(cls.__supertype__, found)
    elif isinstance(cls, list | tuple):  # the arguments of Callable[[...], ...]
        _add_all(cls, found)
    if not isinstance(cls, type) or cls in found or issubclass(cls, Module):
        return
    fields = dataclasses.is_dataclass(cls) or (issubclass(cls, tuple) and hasattr(cls, "_fields"))
    if fields or issubclass(cls, enum.Enum):
        found.add(cls)
    if fields or typing.is_typeddict(cls):
        _add_all(_hints(cls), found)


def _hints(owner: Any) -> Iterable[Any]:
    """The annotations of a function or a class, each by itself, so that one unknown name does not hide the others."""
    with contextlib.suppress(Exception):  # a name that only a type checker sees
        return typing.get_type_hints(owner).values()
    if isinstance(owner, type):
        found = [(cls, vars(cls).get("__annotations__", {})) for cls in owner.__mro__]
    else:
        found = [(owner, getattr(owner, "__annotations__", {}))]
    hints: list[Any] = []
    for home, annotated in found:
        known = dict(vars(sys.modules.get(home.__module__, SimpleNamespace())))
        for name, annotation in annotated.items():
            with contextlib.suppress(Exception):  # this one is not known
                one = SimpleNamespace(__annotations__={name: annotation})
                hints += typing.get_type_hints(one, globalns=known).values()
    return hints
