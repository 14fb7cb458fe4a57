"""The table of names: where Treadle has what a module of Lightning has. It is data, in ``names.toml``."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from typing import Any, Final, NamedTuple

__all__ = ["LIGHTNING", "PACKAGES", "LeftOut", "Table", "Target", "table"]

LIGHTNING: Final = "2.6.6"  # the version that the table describes, and that programs are told

PACKAGES: Final[Mapping[str, str]] = {
    "lightning": "",
    "pytorch_lightning": "pytorch",
    "lightning_fabric": "fabric",
}
"""Lightning's top-level packages, and what each is in the table."""


_INSIDE = "it is a part of how Lightning works inside, and Treadle works in another way."


class Target(NamedTuple):
    """Where Treadle has a name: an attribute of a module, or, with the name None, the module itself."""

    module: str
    name: str | None


class LeftOut(NamedTuple):
    """A name that Treadle does not have."""

    remedy: str


class Table:
    """Lightning's modules and names, and Treadle's.

    Args:
        entries: The parsed content of ``names.toml``.
    """

    def __init__(self, entries: Mapping[str, Mapping[str, Any]]) -> None:
        self._entries = entries
        inside: dict[str, set[str]] = {}
        for key in (key for key, entry in entries.items() if key and not _is_left_out(entry)):
            package, _, name = key.rpartition(".")
            inside.setdefault(package, set()).add(name)
        self._submodules = {package: frozenset(names) for package, names in inside.items()}

    def key(self, module: str) -> str | None:
        """What the table calls a module: ``pytorch_lightning.callbacks`` is ``pytorch.callbacks``.

        Returns:
            None where the module is not one of Lightning's that the table knows.
        """
        package, _, rest = module.partition(".")
        if package not in PACKAGES:
            return None
        key = ".".join(part for part in (PACKAGES[package], rest) if part)
        return key if key in self._entries else None

    def home(self, module: str) -> str | None:
        """Return the module of Treadle that has the names of one of Lightning's; None: there is none."""
        key = self.key(module)
        return None if key is None else self._entries[key].get("home")

    def instead(self, module: str) -> str | None:
        """Return what to use instead of a module that Treadle does not have; None: it has the module."""
        entry = self._entry(module)
        return entry.get("instead") if _is_left_out(entry) else None

    def names(self, module: str) -> Mapping[str, str]:
        """Return the names of a module of Lightning that Treadle has elsewhere than in the module's home."""
        names: Mapping[str, str] = self._entry(module).get("names", {})
        return names

    def left_out(self, module: str) -> Mapping[str, str]:
        """Return the names of a module of Lightning that Treadle does not have, and what to use instead of each."""
        entry = self._entry(module)
        return {**dict.fromkeys(self.inside(module), self._remedy(module)), **entry.get("left_out", {})}

    def inside(self, module: str) -> Sequence[str]:
        """Return those of :meth:`left_out` that are inside of Lightning only, and are imported for annotations."""
        inside: Sequence[str] = self._entry(module).get("inside", ())
        return inside

    def submodules(self, module: str) -> frozenset[str]:
        """Return the names, in a module of Lightning, of the modules in it that Treadle has."""
        key = self.key(module)
        return frozenset() if key is None else self._submodules.get(key, frozenset())

    def _remedy(self, module: str) -> str:
        """What to use instead of what is inside of a module only."""
        while module:
            if remedy := self._entry(module).get("instead"):
                return str(remedy)
            module = module.rpartition(".")[0]
        return _INSIDE

    def _entry(self, module: str) -> Mapping[str, Any]:
        key = self.key(module)
        return {} if key is None else self._entries[key]

    def find(self, module: str, name: str) -> Target | LeftOut | None:
        """Find an attribute of a module of Lightning.

        Args:
            module: A dotted name, for example "pytorch_lightning.callbacks".
            name: An attribute: a class, a function, a value or a submodule.

        Returns:
            Where Treadle has it, or that it is left out. None: the table does not know the name. An attribute of the
            module's home is returned without a look at whether the home has it.
        """
        key = self.key(module)
        if key is None:
            return None
        entry = self._entries[key]
        if place := entry.get("names", {}).get(name):
            home, _, attribute = place.partition(":")
            return Target(home, attribute or None)
        if remedy := self.left_out(module).get(name):
            return LeftOut(remedy)
        if self.key(f"{module}.{name}") is not None and (submodule := self.home(f"{module}.{name}")):
            return Target(submodule, None)
        return Target(entry["home"], name) if entry.get("home") else None

    def modules(self) -> Iterator[str]:
        """Yield what the table calls each module of Lightning."""
        yield from self._entries


def _is_left_out(entry: Mapping[str, Any]) -> bool:
    """Whether Treadle does not have a module."""
    return entry.keys() == {"instead"}


@functools.cache
def table() -> Table:
    """Return the table of the installed package."""
    import tomllib  # for those who ask

    with resources.files("treadle.names").joinpath("names.toml").open("rb") as file:
        return Table(tomllib.load(file))
