"""What a dotted name of Lightning is in Treadle: the table's answer, held against what Treadle really has."""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
import re
from types import ModuleType
from typing import Any, Final, NamedTuple

from treadle.names.older import Older, older
from treadle.names.table import PACKAGES, LeftOut, Table, Target, table
from treadle_fabric import TreadleError

__all__ = ["Found", "Missing", "Names", "names"]

_TREADLE: Final = ("treadle", "treadle_fabric")
_OF_LIGHTNING: Final = re.compile(r"(?<![\w.])(?:pytorch_lightning|lightning_fabric)(?:\.\w+)*")


class Found(NamedTuple):
    """A name that Treadle has: a module, and the attributes below it, of which there may be none."""

    module: str
    attributes: tuple[str, ...] = ()

    @property
    def dotted(self) -> str:
        """The whole name."""
        return ".".join((self.module, *self.attributes))


class Missing(NamedTuple):
    """A name that Treadle does not have."""

    remedy: str
    nearest: Found | None = None  # as much of the name as Treadle has, and the rest as it is written
    certain: bool = True  # whether it is a name of Lightning, and not only a word that begins as one
    named: bool = False  # whether the remedy is for this name


class Names:
    """Finds names by the table.

    Args:
        known: The table of names.
        earlier: What has another name in Lightning 2 than it had in Lightning 1.
    """

    def __init__(self, known: Table, earlier: Older) -> None:
        self._table = known
        self._older = earlier
        self.find = functools.cache(self._find)
        self.follows = functools.cache(_follows)

    def _find(self, dotted: str) -> Found | Missing | None:
        """Find what Treadle has for a dotted name of Lightning, or of Treadle.

        Returns:
            None where it is a name of neither.
        """
        parts = tuple(dotted.split("."))
        if parts[0] in _TREADLE:
            return _look(parts[0], parts[1:], ours=True)
        if parts[0] not in PACKAGES:
            return None
        found = self._in_table(parts)
        if isinstance(found, Missing):
            today = self._older.today(parts)
            if today != parts and isinstance(moved := self._in_table(today), Found):
                return moved
            if remedy := self._older.removed(parts):
                return Missing(self._sentence(remedy), found.nearest, named=True)
        return found

    def _in_table(self, parts: tuple[str, ...]) -> Found | Missing:
        depth = self._depth(parts)
        if remedy := self._table.instead(".".join(parts[:depth])):
            return Missing(self._sentence(remedy), self._nearest(parts[: depth - 1]), named=True)
        if depth == len(parts) and (home := self._table.home(".".join(parts))):
            return Found(home)
        for end in range(min(depth, len(parts) - 1), 0, -1):
            target = self._table.find(".".join(parts[:end]), parts[end])
            if isinstance(target, LeftOut):
                return Missing(self._sentence(target.remedy), self._nearest(parts), named=True)
            if isinstance(target, Target):
                rest = parts[end + 1 :]
                path = rest if target.name is None else (*target.name.split("."), *rest)
                if isinstance(found := _look(target.module, path, ours=False), Found):
                    return found
        unknown = f"Treadle has nothing in the place of `{'.'.join(parts)}`; write what the code needs of it."
        return Missing(unknown, self._nearest(parts), certain=depth > 1 or parts[0] != "lightning")

    def _sentence(self, remedy: str) -> str:
        """Return a remedy as a sentence, with the names that Treadle has for those of Lightning in it."""

        def treadles(match: re.Match[str]) -> str:
            found = self._in_table(tuple(match[0].split(".")))
            return found.dotted if isinstance(found, Found) else match[0]

        told = _OF_LIGHTNING.sub(treadles, remedy)
        return f"{told[:1].upper()}{told[1:].rstrip('.')}."

    def _depth(self, parts: tuple[str, ...]) -> int:
        """Return how many parts name a module that the table knows."""
        for end in range(len(parts), 0, -1):
            if self._table.key(".".join(parts[:end])) is not None:
                return end
        return 0

    def _nearest(self, parts: tuple[str, ...]) -> Found | None:
        for end in range(self._depth(parts), 0, -1):
            if home := self._table.home(".".join(parts[:end])):
                return Found(home, parts[end:])
        return None


def _look(module: str, path: tuple[str, ...], *, ours: bool) -> Found | Missing:
    """Look whether a module of Treadle has an attribute, and that one the next of the path.

    Args:
        module: The module's name.
        path: The attributes. Those of anything but modules and classes are known only when the program runs.
        ours: Whether every submodule counts, because the name is one of Treadle's. A name of Lightning's that happens
            to be that of a folder of Treadle's is not found by that.
    """
    try:
        value: Any = importlib.import_module(module)
    except ImportError:  # of an extra that is not installed here
        return Found(module, path)
    for at, name in enumerate(path):
        if not isinstance(value, ModuleType | type):
            break
        below = f"{module}.{name}"
        if at == 0 and not (inspect.isclass(value) or isinstance(vars(value).get(name, value), type)):
            if _is_module(below) and not callable(vars(value).get(name)):
                public = ours or name in getattr(value, "__all__", ())
                return _look(below, path[1:], ours=ours) if public else _none(below)
        try:
            value = getattr(value, name)
        except ModuleNotFoundError:  # an extra
            break
        except (AttributeError, TreadleError) as e:
            if isinstance(value, type) and any(name in getattr(b, "__annotations__", ()) for b in value.__mro__):
                break
            return _none(".".join((module, *path)), str(e) if "on purpose" in str(e) else "")
    return Found(module, path)


def _none(dotted: str, reason: str = "") -> Missing:
    return Missing(reason or f"Treadle has no `{dotted}`.")


def _is_module(dotted: str) -> bool:
    try:
        return importlib.util.find_spec(dotted) is not None
    except ImportError:
        return False


def _follows(module: str, submodule: str) -> bool:
    """Whether ``import module`` is enough to reach a submodule, in a process that has imported nothing else."""
    for name in submodule.removeprefix(f"{module}.").split("."):
        there = importlib.import_module(module)
        module = f"{module}.{name}"
        if module in _imported_by(there):
            continue
        try:
            if not isinstance(vars(there)["__getattr__"](name), ModuleType):
                return False
        except (KeyError, AttributeError, ImportError):
            return False
    return True


@functools.cache
def _imported_by(module: ModuleType) -> set[str]:
    """Return the modules that a module imports from when it is imported itself, by its source."""
    body = ast.parse(inspect.getsource(module)).body
    return {node.module for node in body if isinstance(node, ast.ImportFrom) and node.module}


@functools.cache
def names() -> Names:
    """Return the names by the table of the installed package."""
    return Names(table(), older())
