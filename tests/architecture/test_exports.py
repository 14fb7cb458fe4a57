"""The public surface: what a package exports is there, once, and explained."""

from __future__ import annotations

import ast
import inspect
from typing import Any, Protocol

import pytest
from tests.architecture.sources import PACKAGES, FunctionNode, classes, files, is_public, modules, tree, where

EXPORTING = sorted(name for name, file in files().items() if is_public(name) and file.name == "__init__.py")


@pytest.mark.parametrize("package", [*PACKAGES])
def test_packages_are_typed(package: str) -> None:
    assert (PACKAGES[package] / "py.typed").is_file()


def re_exports(name: str) -> bool:
    """Whether the package's own file imports anything of the packages, and so re-exports it."""
    return any(
        isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PACKAGES
        for node in tree(files()[name]).body
    )


def exports(name: str) -> list[str]:
    """``__all__``, or where a package has none, what it imports as itself: ``from x import Y as Y``."""
    module = modules()[name]
    return list(getattr(module, "__all__", ())) or [
        alias.asname
        for node in ast.walk(tree(files()[name]))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name
    ]


@pytest.mark.parametrize("name", EXPORTING)
def test_exports_resolve(name: str) -> None:
    """Each name is there once and documented. (Ruff's RUF022 keeps ``__all__`` sorted.)"""
    module, exported = modules()[name], exports(name)
    assert exported or not re_exports(name), f"{name} imports, but exports nothing: give it an __all__"
    assert len(exported) == len(set(exported)), f"twice in {name}.__all__"
    missing = [each for each in exported if not hasattr(module, each)]
    assert not missing, f"in {name}.__all__, but not there: {missing}"
    undocumented = [
        each
        for each in exported
        if (inspect.isclass(thing := getattr(module, each)) or inspect.isroutine(thing)) and not inspect.getdoc(thing)
    ]
    assert not undocumented, f"exported by {name} without a docstring: {undocumented}"


@pytest.mark.parametrize("name", EXPORTING)
def test_exports_are_explicit(name: str) -> None:
    """A re-export is imported by name, so that readers and type checkers see where it comes from."""
    stars = [
        where(files()[name], node)
        for node in ast.walk(tree(files()[name]))
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names)
    ]
    assert not stars


def test_modules_export_only_what_they_define() -> None:
    bad = [
        f"{name}.{each}"
        for name, module in modules().items()
        for each in getattr(module, "__all__", ())
        if not hasattr(module, each)
    ]
    assert not bad, f"in an __all__, but not there: {bad}"


def is_overload(node: FunctionNode) -> bool:
    return any(ast.unparse(decorator).endswith("overload") for decorator in node.decorator_list)


def test_public_functions_and_classes_have_docstrings() -> None:
    bad = [
        f"{where(file, node)} {node.name}"
        for name, file in files().items()
        if is_public(name)
        for node in tree(file).body
        if isinstance(node, ast.ClassDef | FunctionNode)
        and not node.name.startswith("_")
        and not (isinstance(node, FunctionNode) and is_overload(node))
        and ast.get_docstring(node) is None
    ]
    assert not bad, "\n".join(["no docstring:", *bad])


def documented(cls: type, name: str, attribute: Any) -> bool:
    """By its own docstring or by that of a base class, whose contract it fulfils, or by another package's manual."""
    return bool(inspect.getdoc(attribute)) or any(
        inspect.getdoc(vars(base)[name]) or base.__module__.partition(".")[0] not in PACKAGES
        for base in cls.__mro__[1:]
        if name in vars(base)
    )


def test_public_methods_have_docstrings() -> None:
    bad = [
        f"{cls.__module__}.{cls.__qualname__}.{name}"
        for cls in classes()
        if is_public(cls.__module__) and not cls.__name__.startswith("_") and Protocol not in cls.__bases__
        for name, attribute in vars(cls).items()
        if not name.startswith("_")
        and (inspect.isfunction(attribute) or isinstance(attribute, property | classmethod | staticmethod))
        and not documented(cls, name, attribute)
    ]
    assert not bad, "\n".join(["no docstring, and no base class has one:", *bad])
