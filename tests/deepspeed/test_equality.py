"""ZeRO on two processes gives the losses and weights of one process, in a hand-written loop and under the Trainer.

Tests of ``treadle_fabric.strategies.zero.state``, ``treadle_fabric.strategies.zero.partitioned``.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.deepspeed.model import ZERO, fabric_loop, trainer_fit
from tests.equality.layouts import Layout
from tests.equality.model import once, result, run_rows
from tests.processes import run_in_ranks

pytestmark = [pytest.mark.deepspeed, pytest.mark.timeout(300)]
PROGRAMS = {"fabric": fabric_loop, "trainer": trainer_fit}
TOLERANCES = {"32-true": (1e-5, 1e-5), "bf16-mixed": (2e-2, 0.1)}
SINGLE = Layout("single", 1, lambda: "auto")
ROWS = [
    (layout, precision, program)
    for layout in ZERO
    for precision in (("32-true", "bf16-mixed") if layout.name in ("deepspeed2", "deepspeed3") else ("32-true",))
    for program in PROGRAMS
]


def name_of(row: tuple[Layout, str, str]) -> str:
    return f"{row[0].name}-{row[1]}-{row[2]}"


def run_all(folder: Path) -> None:
    alone = [(SINGLE, precision, program) for precision in TOLERANCES for program in PROGRAMS]
    for rows, processes in ((alone, 1), (ROWS, 2)):
        calls = [(name_of(row), partial(PROGRAMS[row[2]], row[0], row[1])) for row in rows]
        print(run_in_ranks(run_rows, calls, folder, devices=processes, timeout=240))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return once(tmp_path_factory, "zero_equality", run_all)


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_losses_and_weights_are_those_of_one_process(row: Any, found: dict[str, Any]) -> None:
    layout, precision, program = row
    mine, single = result(found, name_of(row)), result(found, name_of((SINGLE, precision, program)))
    of_loss, of_weight = TOLERANCES[precision]
    assert mine["losses"] == pytest.approx(single["losses"], rel=of_loss)
    assert len(mine["losses"]) == 6
    for name in ("steps", "rates"):
        assert mine.get(name) == single.get(name)
    if program == "trainer":
        assert mine["steps"] == [0, 1, 1, 2, 2, 3]
        assert mine["val_loss"] == pytest.approx(single["val_loss"], rel=2e-2)  # the last batch is filled up
    assert mine["weights"].keys() == single["weights"].keys()
    for name, weight in single["weights"].items():
        difference = torch.linalg.vector_norm((mine["weights"][name] - weight).double())
        assert difference <= of_weight * max(torch.linalg.vector_norm(weight.double()), 1), name
