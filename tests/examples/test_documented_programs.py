"""Programs in the documentation run as they are."""

from __future__ import annotations

import re
import runpy
import sqlite3
from pathlib import Path

import pytest
from tests.processes import ROOT


def test_the_optuna_program(capsys: pytest.CaptureFixture[str]) -> None:
    program = re.search(r"## Optuna\n.*?```python\n(.*?)```", (ROOT / "docs/tuning.md").read_text(), re.DOTALL)
    assert program is not None
    Path("search.py").write_text(program[1])
    runpy.run_path("search.py", run_name="__main__")
    found = re.search(r"best lr ([\d.]+), loss ([\d.e-]+)", capsys.readouterr().out)
    assert found is not None and 0.1 < float(found[1]) <= 1 and float(found[2]) < 0.1
    study = sqlite3.connect("line.db")
    states = [state for (state,) in study.execute("select state from trials")]
    study.close()
    assert len(states) == 12 and set(states) == {"PRUNED", "COMPLETE"}
