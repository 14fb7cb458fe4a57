"""All kinds of values that are kept plain with the kind beside them: of Python and torch, of NumPy, of OmegaConf."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, Final

from treadle_fabric.checkpoint.values import numpy_kinds, omegaconf_kinds
from treadle_fabric.checkpoint.values.standard_kinds import kind_named, kind_of

__all__ = ["classes_beside", "make_kind", "take_kind"]
_LIBRARIES: Final[dict[str, Any]] = {"numpy": numpy_kinds, "omegaconf": omegaconf_kinds}


def take_kind(value: Any) -> tuple[str, Any, Any] | None:
    """The kind of a value, its content and what else is to be known of it; None for a value of no kind of the list.

    Raises:
        NoPlainFormError: This value has no plain form.
    """
    kind = kind_of(type(value))
    if kind is not None:
        return kind.name, *kind.take(value)
    for library, kinds in _LIBRARIES.items():
        taken: tuple[str, Any, Any] | None = kinds.take(value) if library in sys.modules else None
        if taken is not None:
            return taken
    return None


def classes_beside(kind: str, value: Any) -> dict[Any, type]:
    """The classes of the program that parts of a value have beside their type: dataclasses of structured configs."""
    return omegaconf_kinds.classes_of(value) if kind.startswith("omegaconf.") else {}


def make_kind(name: str, content: Any, more: Any, classes: Mapping[Any, type] | None = None) -> Any:
    """The value that :func:`take_kind` took apart, with the classes of :func:`classes_beside`, if there are any.

    Raises:
        ImportError: It is of a library that is not installed.
        Exception: The file says something that fits no kind of the list.
    """
    library = _LIBRARIES.get(name.partition(".")[0])
    if library is None:
        return kind_named(name).make(content, more)
    return library.make(name, content, more) if not classes else library.make(name, content, more, classes)
