"""Names of Lightning that are left out on purpose: docs/differences.md lists them, and the error for using one says so.

Tests of ``treadle_fabric.errors``, ``treadle.loggers``, ``treadle_fabric.strategies``.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

import treadle as L
from treadle_fabric import Fabric, LeftOutError

DIFFERENCES = Path(__file__).parents[2] / "docs" / "differences.md"
PLACES = {"treadle_fabric.strategies": "DataParallelStrategy", "treadle.loggers": "LitLogger"}


@pytest.mark.parametrize("module", PLACES)
def test_a_name_that_is_left_out_is_told_when_it_is_imported(module: str) -> None:
    home, name = importlib.import_module(module), PLACES[module]
    assert f"\n| `{name}` | " in DIFFERENCES.read_text()
    with pytest.raises(LeftOutError, match=rf"{module}\.{name} is left out on purpose: .*other|use strategy='ddp'"):
        exec(f"from {module} import {name}")
    assert not hasattr(home, name)
    with pytest.raises(AttributeError, match="is left out on purpose"):
        getattr(home, name)
    with pytest.raises(ImportError, match="cannot import name 'Nonsense'"):
        exec(f"from {module} import Nonsense")


PATHS = """treadle.accelerators treadle.loggers treadle.plugins treadle.plugins.environments treadle.plugins.io
    treadle.plugins.precision treadle.profilers treadle.strategies treadle.utilities.model_summary
    treadle_fabric.accelerators treadle_fabric.plugins treadle_fabric.plugins.environments treadle_fabric.strategies"""


@pytest.mark.parametrize("path", PATHS.split())
def test_what_a_module_has_can_be_imported_from_it(path: str) -> None:
    home = importlib.import_module(path)
    for name in home.__all__:
        assert getattr(home, name) is not None


@pytest.mark.parametrize("argument", [{"strategy": "deepspeed_stage_4"}, {"strategy": "dp"}, {"accelerator": "tpuv"}])
def test_a_name_that_no_engine_has(argument: dict[str, Any]) -> None:
    for make in (L.Trainer, Fabric):
        with pytest.raises(ValueError, match=r"is unknown\. (There is: |Did you mean )"):
            make(**argument)
