"""The source files of both packages, for the tests that read them."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"treadle_fabric": ROOT / "fabric" / "treadle_fabric", "treadle": ROOT / "trainer" / "treadle"}

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@functools.cache
def files() -> dict[str, Path]:
    """Dotted module name -> file, for every module of both packages; the shim's are packages of their own."""
    found = {}
    for package, folder in PACKAGES.items():
        for file in sorted(folder.rglob("*.py")):
            if "shim" in file.parts:
                continue
            parts = file.relative_to(folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = file
    return found


@functools.cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


def functions(file: Path) -> Iterator[FunctionNode]:
    return (node for node in ast.walk(tree(file)) if isinstance(node, FunctionNode))


def where(file: Path, node: ast.AST | None = None) -> str:
    """``fabric/treadle_fabric/fabric.py:12``, which terminals and editors open."""
    return f"{file.relative_to(ROOT)}:{node.lineno}" if node is not None else str(file.relative_to(ROOT))


def is_public(module: str) -> bool:
    return not any(part.startswith("_") for part in module.split("."))


@functools.cache
def modules() -> dict[str, ModuleType]:
    return {name: importlib.import_module(name) for name in files()}


@functools.cache
def classes() -> tuple[type, ...]:
    """Every class written in one of the packages, the nested ones left out."""
    return tuple(
        thing
        for name, module in modules().items()
        for thing in vars(module).values()
        if inspect.isclass(thing) and thing.__module__ == name
    )
