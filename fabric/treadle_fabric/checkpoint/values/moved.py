"""Classes that a pickle names by a path which is another program's, or which is gone."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Final

__all__ = ["PICKLE", "Absent", "absent", "absent_allowed", "find_moved"]

_FINDERS: Final[list[Callable[[str, str], Any]]] = []
_allowed = False


class Absent:
    """In the place of an object whose class is not there: it takes whatever the pickle gives it, and keeps nothing."""

    def __new__(cls, *_: Any, **__: Any) -> Absent:
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        """Take any arguments."""

    def __setstate__(self, _: Any) -> None:
        """Take the state of the object."""

    def __setitem__(self, _: Any, __: Any) -> None:
        """Take an entry of a dictionary."""

    def append(self, _: Any) -> None:
        """Take an element of a list."""

    def extend(self, _: Any) -> None:
        """Take elements of a list."""


def absent(module: str, name: str) -> type[Absent]:
    """Return a class that takes the place of one that is not there."""
    return type(name.rpartition(".")[2], (Absent,), {"__module__": module, "__qualname__": name})


def find_moved(find: Callable[[str, str], Any]) -> None:
    """Have pickles look a class up by ``find(module, name)`` first; None leaves it to Python.

    Only loads that are allowed to run code of the file ask, those with ``weights_only=False``.
    """
    _FINDERS.append(find)


@contextmanager
def absent_allowed() -> Generator[None]:
    """While entered, objects whose class cannot be imported are :class:`Absent`, and no error."""
    global _allowed
    before, _allowed = _allowed, True
    try:
        yield
    finally:
        _allowed = before


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Find what a pickle names: a class or a function."""
        for find in _FINDERS:
            if (found := find(module, name)) is not None:
                return found
        try:
            return super().find_class(module, name)
        except (ImportError, AttributeError):
            if not _allowed:
                raise
            return absent(module, name)


PICKLE: Final[Any] = SimpleNamespace(
    Unpickler=_Unpickler, load=lambda file, **options: _Unpickler(file, **options).load(), __name__=pickle.__name__
)
"""What torch.load takes as ``pickle_module``."""
