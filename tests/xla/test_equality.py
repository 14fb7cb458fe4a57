"""On devices of XLA the same seeds and global batches give the losses and weights of one process on the CPU.

Tests of ``treadle_fabric.strategies.single_xla``, ``treadle_fabric.strategies.xla``,
``treadle_fabric.strategies.xla_fsdp``, ``treadle_fabric.precision.xla``: `make test-xla`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint

from tests.equality.model import Block, fabric_loop, once, result, run_rows, trainer_fit
from tests.processes import run_in_ranks
from treadle_fabric.strategies import XLAFSDPStrategy

pytestmark = [pytest.mark.xla, pytest.mark.timeout(1800)]

PROGRAMS = {"fabric": fabric_loop, "trainer": trainer_fit}
LAYOUTS: dict[str, tuple[int, Callable[[], Any]]] = {
    "auto": (1, lambda: "auto"),
    "xla1": (1, lambda: "xla"),
    "fsdp1": (1, lambda: "xla_fsdp"),
    "xla2": (2, lambda: "xla"),
    "fsdp2": (2, lambda: "xla_fsdp"),
    "fsdp2_policy": (2, lambda: XLAFSDPStrategy(auto_wrap_policy={Block})),
    "fsdp2_recompute": (
        2,
        lambda: XLAFSDPStrategy(auto_wrap_policy={Block}, activation_checkpointing_policy={Block}),
    ),
    "fsdp2_full": (2, lambda: XLAFSDPStrategy(state_dict_type="full")),
}
ROWS = [
    *((layout, "32-true", program) for layout in ("auto", "xla2", "fsdp2") for program in PROGRAMS),
    *((layout, "32-true", "trainer") for layout in ("xla1", "fsdp1", "fsdp2_policy", "fsdp2_full")),
    ("fsdp2_recompute", "32-true", "fabric"),
    ("auto", "bf16-true", "trainer"),
    ("xla2", "bf16-true", "fabric"),
]
TOLERANCES = {"32-true": (1e-5, 1e-5), "bf16-true": (5e-2, 0.1)}


def on_cpu(found: Any) -> Any:
    if isinstance(found, dict):
        return {name: on_cpu(each) for name, each in found.items()}
    return found.cpu() if isinstance(found, torch.Tensor) else found


def on_xla(program: str, strategy: Callable[[], Any], processes: int, precision: str) -> Any:
    return on_cpu(PROGRAMS[program](strategy(), processes, precision, accelerator="tpu"))


def run_all(folder: Path) -> None:
    precisions = {precision for _, precision, _ in ROWS}
    single = [(f"cpu-{p}-{name}", partial(PROGRAMS[name], "auto", 1, p)) for p in precisions for name in PROGRAMS]
    run_in_ranks(run_rows, single, folder, devices=1, timeout=300)
    for processes in (2, 1):
        rows = [
            ("-".join(row), partial(on_xla, row[2], LAYOUTS[row[0]][1], processes, row[1]))
            for row in ROWS
            if LAYOUTS[row[0]][0] == processes
        ]
        print(run_in_ranks(run_rows, rows, folder, devices=processes, timeout=900))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each row gave."""
    return once(tmp_path_factory, "xla_equality", run_all)


@pytest.mark.parametrize("row", ROWS, ids="-".join)
def test_losses_and_weights_are_those_of_the_cpu(row: tuple[str, str, str], found: dict[str, Any]) -> None:
    _, precision, program = row
    mine, single = result(found, "-".join(row)), result(found, f"cpu-{precision}-{program}")
    of_loss, of_weight = TOLERANCES[precision]
    assert len(mine["losses"]) == 6
    apart = max(abs(a - b) / abs(b) for a, b in zip(mine["losses"], single["losses"], strict=True))
    print(f"losses are {apart:.1e} apart")
    assert apart <= of_loss
    assert mine["weights"].keys() == single["weights"].keys()
    assert mine["weights"]["frozen.passes"] == 6
    for name, weight in single["weights"].items():
        if name != "frozen.passes":
            difference = torch.linalg.vector_norm((mine["weights"][name] - weight).double())
            assert difference <= of_weight * max(torch.linalg.vector_norm(weight.double()), 1), name
