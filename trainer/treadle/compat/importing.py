"""Imports of Lightning give Treadle: a finder, and modules that look their names up in the table."""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from treadle.compat.absent import stand_in
from treadle.compat.messages import govern_messages
from treadle.names.older import older
from treadle.names.table import LIGHTNING, PACKAGES, LeftOut, Target, table
from treadle_fabric import LeftOutError, MisconfigurationException, MissingPackageError, left_out

__all__ = ["SHIM", "replace_lightning"]

SHIM: Final = Path(__file__).parent / "shim"
"""The folder that, in front of Python's search path, makes ``import lightning`` import Treadle."""


def replace_lightning() -> None:
    """Make ``import lightning``, ``pytorch_lightning`` and ``lightning_fabric`` import Treadle from now on.

    For notebooks and tests, in place of ``treadle run``: call it before anything imports Lightning. The processes that
    this one starts inherit it, and a Lightning that is installed is neither used nor changed. Programs are told that
    the version is 2.6.6, by ``lightning.__version__`` and by ``importlib.metadata``. A second call does nothing.

    Raises:
        MisconfigurationException: Lightning itself is imported already.
    """
    # A package whose import is under way is the shim's, which calls this function; its place is taken below.
    there = {name: sys.modules[name] for name in PACKAGES if name in sys.modules}
    for name, module in there.items():
        if not isinstance(module, _Module) and not _of_shim(module):
            raise MisconfigurationException(
                f"{name} is imported already, from {module.__file__}, and Treadle cannot take its place any more: call"
                " replace_lightning() before all imports of Lightning and of libraries that use it, or start the"
                " program with `treadle run`."
            )
    if _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)
        govern_messages()
    _put_first(SHIM)
    for name in there:
        if not isinstance(sys.modules[name], _Module):
            del sys.modules[name]
            importlib.import_module(name)


def _of_shim(module: ModuleType) -> bool:
    return module.__file__ is not None and SHIM in Path(module.__file__).parents


def _put_first(folder: Path) -> None:
    """Put a folder at the front of the search paths of this process and of those that it starts."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    inherited = os.environ.get("PYTHONPATH", "")
    if str(folder) not in inherited.split(os.pathsep):
        os.environ["PYTHONPATH"] = os.pathsep.join(part for part in (str(folder), inherited) if part)


class _Finder:
    """Finds the modules of Lightning that the table knows, before a Lightning that is installed is found."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: Any = None) -> Any:
        if name.partition(".")[0] not in PACKAGES:
            return None
        known = table()
        if remedy := known.instead(name):
            raise LeftOutError(f"{name} is left out on purpose: {remedy}")  # by no name, or Python would drop the text
        if known.key(name) is None:
            if told := _of_lightning_1(name):
                raise LeftOutError(told)
            return None
        file = SHIM.joinpath(*name.split("."), "__init__.py")
        spec = importlib.machinery.ModuleSpec(name, _Loader(), origin=str(file), is_package=True)
        spec.has_location = True
        spec.submodule_search_locations = [str(file.parent)]
        return spec


class _Loader(importlib.abc.Loader):
    """Makes the modules that the finder has found."""

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        if module.__name__ in PACKAGES:  # as Lightning's, they bring everything along
            importlib.import_module(table().home(module.__name__) or "treadle")


_replaced: dict[tuple[str, str], Any] = {}  # what attributes of Treadle were that programs have set


class _Module(ModuleType):
    """A module of Lightning: each of its attributes is looked up in Treadle when it is asked for.

    It keeps nothing itself, so what a program sets on it, ``monkeypatch`` for example, is set in the module of Treadle
    that has the name, and is seen by the code there and under all other names. Such an attribute, when deleted, is
    what it was before, as of a module whose attributes ``__getattr__`` finds.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name, f"Treadle, by the names of {name} {LIGHTNING}.")
        inside = table().inside(name)
        missing = {each: remedy for each, remedy in table().left_out(name).items() if each not in inside}
        vars(self)["__getattr__"] = left_out(name, missing, functools.partial(_look_up, self))

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__version__":
            return  # which the import system sets to the module of that name
        place = None if _of_import_system(self, name) else _place(self, name)
        if place is None:
            super().__setattr__(name, value)
        else:
            _replaced.setdefault((place[0].__name__, place[1]), getattr(*place))
            setattr(*place, value)

    def __delattr__(self, name: str) -> None:
        place = None if name in vars(self) else _place(self, name)
        if place is None:
            super().__delattr__(name)
        elif (key := (place[0].__name__, place[1])) in _replaced:
            setattr(*place, _replaced.pop(key))
        else:
            delattr(*place)

    def __dir__(self) -> list[str]:
        return sorted({*vars(self), *_public(self), *table().submodules(self.__name__)})


def _of_import_system(module: ModuleType, name: str) -> bool:
    """Whether an attribute is a submodule, or one of those such as ``__spec__`` that every module has."""
    return name.startswith("__") or f"{module.__name__}.{name}" in sys.modules


def _look_up(module: ModuleType, name: str) -> Any:
    """An attribute of a module of Lightning, from Treadle."""
    if name == "__all__":
        return _public(module)
    if name == "__version__" and table().key(module.__name__) in PACKAGES.values():
        return LIGHTNING
    try:
        place = _place(module, name)
    except MissingPackageError as e:  # as with Lightning, importing the name needs no package of others
        return stand_in(name, e)
    if place is not None:
        return getattr(*place)
    found = _find(module.__name__, name)
    if isinstance(found, LeftOut):
        return _absent(str(table().key(module.__name__)), name, found.remedy)
    if name in table().names(module.__name__) and found is not None:
        return importlib.import_module(found.module)
    if name in table().submodules(module.__name__):  # as attributes, too, of a package that alone was imported
        return importlib.import_module(f"{module.__name__}.{name}")
    told = "" if name.startswith("__") else _of_lightning_1(f"{module.__name__}.{name}")
    raise AttributeError(told or f"module {module.__name__!r} has no attribute {name!r}")


def _of_lightning_1(name: str) -> str:
    """What a program is told that asks for a name of Lightning 1; empty: it was none."""
    parts = tuple(name.split("."))
    if (today := older().today(parts)) != parts:
        return f"{name} is of Lightning 1. Lightning 2 has it as {'.'.join(today)}."
    remedy = older().removed(parts)
    return f"{name} is of Lightning 1, and Lightning 2 has it no more: {remedy}." if remedy else ""


def _place(module: ModuleType, name: str) -> tuple[ModuleType, str] | None:
    """The module of Treadle that has an attribute of one of Lightning's, and what it is called there."""
    found = _find(module.__name__, name)
    if not isinstance(found, Target) or found.name is None or (found.name == name and name.startswith("__")):
        return None
    home = sys.modules.get(found.module) or importlib.import_module(found.module)
    there = getattr(home, found.name, None)
    if there is None and not hasattr(home, found.name):
        return None
    if isinstance(there, ModuleType) and there.__name__.startswith(home.__name__):
        return None  # a part of Treadle that is called like this by chance
    return home, found.name


@functools.cache
def _absent(key: str, name: str, remedy: str) -> Any:
    """What stands for a name of what is inside of Lightning only; the same in all packages."""
    return stand_in(name, LeftOutError(f"lightning.{key}.{name} is left out on purpose: {remedy}"))


@functools.cache
def _find(module: str, name: str) -> Target | LeftOut | None:
    return table().find(module, name)


def _public(module: ModuleType) -> list[str]:
    """The names that ``import *`` takes from a module of Lightning."""
    known = table()
    names = set(known.names(module.__name__))
    if (home := known.home(module.__name__)) is not None:
        names.update(getattr(importlib.import_module(home), "__all__", ()))
    return sorted(name for name in names if not name.startswith("_") and name not in known.left_out(module.__name__))
