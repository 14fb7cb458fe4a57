"""Who may import whom, and who may ask about whom."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.architecture.sources import PACKAGES, ROOT, files, modules, tree, where

CONCRETE_STRATEGY = re.compile(r"\w+Strategy$")
VAGUE_NAMES = {"common", "helper", "helpers", "misc", "util", "utilities", "utils"}


def test_import_contracts() -> None:
    """The layer order in pyproject.toml; every module has its layer there."""
    linter = Path(sys.executable).with_name("lint-imports")
    if not linter.exists():
        pytest.fail("lint-imports is not installed beside this interpreter; `make test` installs it")
    roots = os.pathsep.join(str(folder.parent) for folder in PACKAGES.values())
    result = subprocess.run(
        [linter, "--no-cache"], cwd=ROOT, env={**os.environ, "PYTHONPATH": roots}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr


def imports(file: Path) -> list[tuple[ast.AST, str, str | None]]:
    """(node, module, name) of each import, those inside functions and under TYPE_CHECKING too."""
    found: list[tuple[ast.AST, str, str | None]] = []
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            found += [(node, alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(node, "." * node.level + (node.module or ""), alias.name) for alias in node.names]
    return found


def test_the_runtime_never_imports_the_trainer() -> None:
    bad = [
        where(file, node)
        for name, file in files().items()
        if name.split(".")[0] == "treadle_fabric"
        for node, module, _ in imports(file)
        if module.split(".")[0] == "treadle"
    ]
    assert not bad, f"treadle_fabric imports treadle at {bad}"


def test_the_trainer_uses_only_the_public_runtime() -> None:
    bad = []
    for user, file in files().items():
        if user.split(".")[0] != "treadle":
            continue
        for node, module, name in imports(file):
            if module.split(".")[0] != "treadle_fabric":
                continue
            is_package = files()[module].name == "__init__.py" if module in files() else False
            if not is_package or (name is not None and name not in modules()[module].__all__):
                bad.append(f"{where(file, node)}: {module}.{name}")
    assert not bad, f"not exported by treadle_fabric or one of its packages (in the __all__ of an __init__): {bad}"


def names_in(node: ast.AST) -> set[str]:
    return {
        n.id if isinstance(n, ast.Name) else n.attr for n in ast.walk(node) if isinstance(n, ast.Name | ast.Attribute)
    }


def strategy_questions(source: ast.Module) -> list[ast.AST]:
    """Places that ask for a concrete strategy: isinstance, issubclass, ``type(x) is X``, ``case X():``."""
    found: list[ast.AST] = []
    for node in ast.walk(source):
        asked: set[str] = set()
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) == 2:
            asked = names_in(node.args[1]) if node.func.id in {"isinstance", "issubclass"} else set()
        elif isinstance(node, ast.Compare):
            asked = set().union(*(names_in(side) for side in [node.left, *node.comparators]))
        elif isinstance(node, ast.MatchClass):
            asked = names_in(node.cls)
        if any(CONCRETE_STRATEGY.match(name) for name in asked):
            found.append(node)
    return found


def test_strategies_declare_and_nobody_asks_for_their_class() -> None:
    bad = [
        where(file, node)
        for name, file in files().items()
        if not name.startswith("treadle_fabric.strategies.")
        for node in strategy_questions(tree(file))
    ]
    assert not bad, f"asks for a concrete strategy instead of a capability it declares: {bad}"


@pytest.mark.parametrize(
    ("code", "asks"),
    [
        ("isinstance(s, DDPStrategy)", True),
        ("isinstance(s, (strategies.FSDPStrategy, int))", True),
        ("type(s) is SingleDeviceStrategy", True),
        ("match s:\n    case DDPStrategy(): pass", True),
        ("isinstance(s, Strategy)", False),
        ("DDPStrategy(devices)", False),
    ],
)
def test_a_question_for_a_strategy_is_found(code: str, asks: bool) -> None:
    assert bool(strategy_questions(ast.parse(code))) is asks


def defines_nothing(folder: Path) -> bool:
    """Whether a folder has nothing but re-exports, at a path that Lightning's users type."""
    trees = [ast.parse(file.read_text()) for file in folder.glob("*.py")]
    defined = (ast.FunctionDef, ast.ClassDef)
    return bool(trees) and not any(isinstance(node, defined) for tree in trees for node in ast.walk(tree))


def test_no_folder_for_things_without_a_place() -> None:
    bad = [
        str(path.relative_to(ROOT))
        for folder in PACKAGES.values()
        for path in folder.rglob("*")
        if path.stem in VAGUE_NAMES and path.suffix in {"", ".py"} and not defines_nothing(path)
    ]
    assert not bad, f"name the concept instead: {bad}"
