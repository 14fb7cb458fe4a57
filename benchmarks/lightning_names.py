"""Lists the modules of the installed Lightning, and their names, in ``tests/data/lightning-VERSION-names.json``.

The environment of the benchmarks has Lightning: ``.venv-bench/bin/python benchmarks/lightning_names.py``. The file has
names only. For each module, without the name of its package as in ``trainer/treadle/names/names.toml``:

    own      classes, functions and values that the module defines
    others   what it imports from other modules of Lightning, and so can be imported from it
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("lightning", "lightning_fabric", "lightning_utilities", "pytorch_lightning")


def main() -> None:
    spec = importlib.util.find_spec("lightning")
    assert spec is not None and spec.submodule_search_locations, "Lightning is not installed here"
    root = Path(spec.submodule_search_locations[0])
    listed = {}
    for file in sorted([*root.glob("*.py"), *(root / "fabric").rglob("*.py"), *(root / "pytorch").rglob("*.py")]):
        parts = file.relative_to(root).with_suffix("").parts
        key = ".".join(part for part in parts if part != "__init__")
        own, others = names(ast.parse(file.read_text(encoding="utf-8")))
        listed[key] = {"own": sorted(own), "others": sorted(others - own)}
    version = importlib.metadata.version("lightning")
    out = Path(__file__).parents[1] / "tests/data" / f"lightning-{version}-names.json"
    lines = [f"{json.dumps(key)}: {json.dumps(value, separators=(',', ':'))}" for key, value in sorted(listed.items())]
    out.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    print(f"{out}: {len(listed)} modules")


def names(tree: ast.Module) -> tuple[set[str], set[str]]:
    """The names that a module defines, and those that it imports from others of Lightning."""
    own: set[str] = set()
    others: set[str] = set()
    for node in statements(tree.body):
        match node:
            case ast.FunctionDef() | ast.ClassDef() | ast.AsyncFunctionDef():
                own.add(node.name)
            case ast.Assign():
                stored = [each for target in node.targets for each in ast.walk(target) if isinstance(each, ast.Name)]
                own |= {each.id for each in stored if isinstance(each.ctx, ast.Store)}
            case ast.AnnAssign(target=ast.Name(id=name)):
                own.add(name)
            case ast.ImportFrom() if (node.module or "").partition(".")[0] in PACKAGES:
                others |= {alias.asname or alias.name for alias in node.names}
    return own - {"__all__"}, others - {"*"}


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a module, those under its conditions included."""
    for node in body:
        yield node
        match node:
            case ast.If(body=inner, orelse=other) if "TYPE_CHECKING" not in ast.unparse(node.test):
                yield from statements([*inner, *other])
            case ast.Try():
                handled = [each for handler in node.handlers for each in handler.body]
                yield from statements([*node.body, *handled, *node.orelse, *node.finalbody])
            case ast.With(body=inner):
                yield from statements(inner)


if __name__ == "__main__":
    main()
