"""Names of Lightning that are still to come: docs/differences.md lists them, and the error for using one says so.

Tests of ``treadle_fabric.errors``, ``treadle_fabric.resolve``, ``treadle.strategies``.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

import treadle as L
from treadle_fabric import Fabric, NotAvailableYetError

DIFFERENCES = Path(__file__).parents[2] / "docs" / "differences.md"
LISTED = {
    module: re.findall(r"`(\w+)`", names)
    for module, names in re.findall(r"^\| `(treadle[\w.]*)` \| (.*) \|$", DIFFERENCES.read_text(), re.MULTILINE)
}


@pytest.mark.parametrize("module", LISTED)
def test_a_listed_name_is_told_when_it_is_imported(module: str) -> None:
    home = importlib.import_module(module)
    assert LISTED[module]
    for name in LISTED[module]:
        with pytest.raises(NotAvailableYetError, match=rf"{module}\.{name} is not available yet"):
            exec(f"from {module} import {name}")
        assert not hasattr(home, name)
        with pytest.raises(AttributeError, match="is not available yet"):
            getattr(home, name)
    with pytest.raises(ImportError, match="cannot import name 'Nonsense'"):
        exec(f"from {module} import Nonsense")


def test_the_list_is_whole() -> None:
    root = Path(L.__file__).parents[2]
    lacking = {
        ".".join(path.relative_to(root).with_suffix("").parts[1:]).removesuffix(".__init__")
        for path in [*root.glob("fabric/**/*.py"), *root.glob("trainer/**/*.py")]
        if re.search(r"not_yet\(\s*__name__,(?!\s*set\(\))", path.read_text())  # others leave names out for good
    }
    assert lacking == LISTED.keys()


@pytest.mark.parametrize("path", [m for m in LISTED if "." in m])
def test_what_a_module_has_can_be_imported_from_it(path: str) -> None:
    home = importlib.import_module(path)
    for name in getattr(home, "__all__", ()):
        assert getattr(home, name) is not None


@pytest.mark.parametrize(
    "argument",
    [
    ],
)
def test_engines_that_are_not_here_yet(argument: dict[str, Any]) -> None:
    for make in (L.Trainer, Fabric):
        with pytest.raises(ValueError, match=r"is not available yet\. There is: "):
            make(**argument)
