"""What stands for classes and functions that are inside of Lightning only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

__all__ = ["stand_in"]


class _Absent(type):
    """The type of classes that are no more than names."""

    def __getattr__(cls, name: str) -> NoReturn:
        raise AttributeError(f"{cls.__doc__} It has no attribute {name!r}.")


def stand_in(name: str, error: ImportError) -> type | Callable[..., NoReturn]:
    """Make a class, or a function, of which no more is there than the name: its use is the error that it stands for.

    Libraries import such names for an annotation, for ``isinstance`` or for one case of many: their import succeeds.

    Args:
        name: The name; that of a class begins with a capital letter, after underscores.
        error: Says what to use instead.
    """
    told = str(error)

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise type(error)(told)

    if name.lstrip("_")[:1].isupper():
        return _Absent(name, (), {"__new__": refuse, "__doc__": told, "__module__": __name__})
    refuse.__name__ = refuse.__qualname__ = name
    refuse.__doc__ = told
    return refuse
