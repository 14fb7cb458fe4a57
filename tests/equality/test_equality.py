"""The same seeds and global batches give the losses and weights of one process, in every layout and precision.

Tests of ``treadle_fabric.strategies.fsdp``, ``treadle_fabric.strategies.model_parallel``,
``treadle_fabric.strategies.sharding.sharding``, ``treadle_fabric.strategies.sharding.engine``,
``treadle_fabric.strategies.sharding.shard``, ``treadle_fabric.strategies.sharding.replicated``.
"""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.pipelining
from tests.equality.layouts import LAYOUTS, Layout
from tests.equality.model import fabric_loop, once, result, run_rows, trainer_fit
from tests.processes import run_in_ranks

pytestmark = pytest.mark.timeout(900)  # the first test waits until all have run
# How far losses, which are float32, and weights may be from those of one process. Where a gradient is near zero, AdamW
# makes a whole step of the rounding of a precision.
TOLERANCES = {
    "32-true": (1e-5, 1e-5),
    "64-true": (1e-6, 1e-12),
    "bf16-mixed": (2e-2, 0.1),
    "bf16-true": (5e-2, 0.1),
    "16-mixed": (5e-3, 2e-2),
    "fp8-mixed": (6e-2, 0.1),  # a rank has the scale of its own samples
    "fp8-true": (6e-2, 0.1),
}
PROGRAMS = {"fabric": fabric_loop, "trainer": trainer_fit}
OTHER_PRECISIONS = {
    "64-true": {"ddp2", "fsdp2"},
    "bf16-mixed": {"ddp2", "fsdp2_policy", "tensor2", "sequence2", "pipeline2"},
    "bf16-true": {"ddp2", "fsdp2_policy"},
    "16-mixed": {"ddp2", "fsdp2_policy"},
}
if find_spec("torchao"):
    import torchao.float8  # noqa: F401 # for the forks

    OTHER_PRECISIONS |= {"fp8-mixed": {"ddp2", "fsdp2_policy", "tensor2"}, "fp8-true": {"fsdp2_policy"}}


def precisions(layout: Layout) -> list[str]:
    return ["32-true", *(p for p, names in OTHER_PRECISIONS.items() if layout.name in names or layout.name == "single")]


ROWS = [
    (layout, precision, program)
    for layout in LAYOUTS
    for precision in precisions(layout)
    for program in PROGRAMS
    if layout.processes != 3
]


def row_name(layout: Layout, precision: str, program: str) -> str:
    return f"{layout.name}-{precision}-{program}"


def run_all(folder: Path) -> None:
    """The rows of one number of processes run one after the other in the same processes."""
    for processes in sorted({layout.processes for layout, _, _ in ROWS}):
        rows = [
            (row_name(*row), partial(PROGRAMS[row[2]], row[0].strategy(), processes, row[1]))
            for row in ROWS
            if row[0].processes == processes
        ]
        print(run_in_ranks(run_rows, rows, folder, devices=processes, timeout=240))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each row gave."""
    return once(tmp_path_factory, "equality", run_all)


@pytest.mark.parametrize("row", ROWS, ids=[row_name(*row) for row in ROWS])
def test_losses_and_weights_are_those_of_one_process(row: Any, found: dict[str, Any]) -> None:
    layout, precision, program = row
    mine, single = result(found, row_name(*row)), result(found, f"single-{precision}-{program}")
    of_loss, of_weight = TOLERANCES[precision]
    assert len(mine["losses"]) == 6
    assert mine["losses"] == pytest.approx(single["losses"], rel=of_loss)
    assert mine["weights"].keys() == single["weights"].keys()
    assert mine["weights"]["frozen.passes"] == 6 * layout.passes
    for name, weight in single["weights"].items():
        if name == "frozen.passes":
            continue
        difference = torch.linalg.vector_norm((mine["weights"][name] - weight).double())
        assert difference <= of_weight * max(torch.linalg.vector_norm(weight.double()), 1), name


def test_both_programs_are_the_same_training(found: dict[str, Any]) -> None:
    fabric, trainer = (result(found, f"single-32-true-{program}") for program in PROGRAMS)
    assert fabric["losses"] == trainer["losses"]
    assert all(torch.equal(fabric["weights"][name], trainer["weights"][name]) for name in fabric["weights"])
    assert len(set(fabric["losses"])) == 6
