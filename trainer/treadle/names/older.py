"""What Lightning 1 had and Lightning 2 has no more, or elsewhere. It is data, in ``older.toml``."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib import resources
from typing import Any

from treadle.names.table import PACKAGES

__all__ = ["Older", "older"]


class Older:
    """Names, arguments and methods of Lightning 1, and what they are today.

    Args:
        entries: The parsed content of ``older.toml``.
    """

    def __init__(self, entries: Mapping[str, Any]) -> None:
        self._entries = entries

    @property
    def bases(self) -> frozenset[str]:
        """The classes whose heirs have methods that are called otherwise today."""
        return frozenset(self._entries["methods"])

    def today(self, parts: tuple[str, ...]) -> tuple[str, ...]:
        """Return where Lightning 2 has a dotted name: the same name where it did not move."""
        key = _key(parts)
        for end in range(len(key), 0, -1):
            if moved := self._entries["moved"].get(".".join(key[:end])):
                return "lightning", *moved.split("."), *key[end:]
        return parts

    def removed(self, parts: tuple[str, ...]) -> str:
        """Return what to use instead of a dotted name that is no more; empty: it is there."""
        key = _key(parts)
        for end in range(len(key), 0, -1):
            if remedy := self._entries["removed"].get(".".join(key[:end])):
                return str(remedy)
        return ""

    def argument(self, called: str, name: str) -> str:
        """Return the remedy for an argument of a class, or of a trainer's method."""
        return str(self._entries["arguments"].get(called, {}).get(name, ""))

    def renamed(self, called: str, name: str, value: object) -> str:
        """Return the arguments, as a program writes them, that mean today what one with this value meant.

        Returns:
            Nothing where only the author of the program knows.
        """
        by_value = self._entries["renamed"].get(called, {}).get(name, {})
        if isinstance(value, str):
            return str(by_value.get(value, ""))
        if value is None or isinstance(value, bool | int):
            counts = not isinstance(value, bool) and value is not None and value > 0
            return str(by_value.get(repr(value)) or (by_value.get("N", "") if counts else "")).format(N=value)
        return ""

    def value(self, called: str, name: str, value: str) -> str:
        """Return the remedy for a string that an argument of a class may not be."""
        return str(self._entries["values"].get(called, {}).get(name, {}).get(value, ""))

    def method(self, base: str, name: str) -> str:
        """Return the remedy for a method of an heir."""
        return str(self._entries["methods"].get(base, {}).get(name, ""))

    def parameter(self, base: str, method: str, name: str) -> str:
        """Return the remedy for a parameter of an heir's method."""
        by_method = self._entries["parameters"].get(base, {})
        return str(by_method.get(method, {}).get(name) or by_method.get("*", {}).get(name, ""))

    def attribute(self, of: str, name: str) -> str:
        """Return the remedy for an attribute that is read or called."""
        return str(self._entries["attributes"].get(of, {}).get(name, ""))


def _key(parts: tuple[str, ...]) -> tuple[str, ...]:
    if package := PACKAGES[parts[0]]:
        return package, *parts[1:]
    has_its_own = parts[1:2] in (("pytorch",), ("fabric",), ("app",))
    return parts[1:] if has_its_own else ("pytorch", *parts[1:])  # `lightning` has the names of `lightning.pytorch`


@functools.cache
def older() -> Older:
    """Return what the installed package knows."""
    import tomllib  # for those who ask

    with resources.files("treadle.names").joinpath("older.toml").open("rb") as file:
        return Older(tomllib.load(file))
