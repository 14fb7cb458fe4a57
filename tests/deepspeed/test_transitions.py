"""A run goes on from a checkpoint of DeepSpeed, and under DeepSpeed from every other one.

Tests of ``treadle_fabric.strategies.zero.state``, ``treadle_fabric.strategies.zero.accumulating``,
``treadle_fabric.strategies.zero.writing``, ``treadle_fabric.checkpoint.zero.ours``,
``treadle_fabric.checkpoint.zero.partitions``.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint
import torch.distributed.fsdp

from tests.deepspeed.model import PLAIN, ZERO, go_on, trainer_fit
from tests.equality.layouts import Layout
from tests.equality.model import once, result, run_rows
from tests.processes import run_in_ranks

pytestmark = [pytest.mark.deepspeed, pytest.mark.timeout(300)]
SINGLE = Layout("single", 1, lambda: "auto")
TABLE = {layout.name: layout for layout in (SINGLE, *PLAIN, *ZERO[:3])}
STEP, WITHIN = 3, 2  # after which batch a checkpoint is saved: where an optimizer steps, and in an accumulation
PAIRS = [(a, b) for a in TABLE for b in TABLE if "deepspeed" in a + b]


def run_all(folder: Path) -> None:
    for processes in (1, 2):
        rows = [
            (f"{name}-{at}", partial(trainer_fit, layout, save_at=(at, folder / f"{name}-{at}.ckpt")))
            for name, layout in TABLE.items()
            if layout.processes == processes
            for at in (STEP, WITHIN)
        ]
        run_in_ranks(run_rows, rows, folder, devices=processes, timeout=200)
    for processes in (1, 2):
        rows = [
            (f"{a}-{b}-{at}", partial(go_on, TABLE[b], folder / f"{a}-{at}.ckpt"))
            for a, b in PAIRS
            if TABLE[b].processes == processes
            for at in ((STEP, WITHIN) if a == b or (a, b) in REFUSED else (STEP,))
        ]
        run_in_ranks(run_rows, rows, folder, devices=processes, timeout=250)


REFUSED = [("deepspeed2", "deepspeed3"), ("deepspeed3", "single"), ("ddp2", "deepspeed2")]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return once(tmp_path_factory, "zero_transitions", run_all)


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_the_run_goes_on(before: str, after: str, found: dict[str, Any]) -> None:
    unbroken, resumed = result(found, f"{before}-{STEP}"), result(found, f"{before}-{after}-{STEP}")
    assert "refused" not in resumed, resumed
    assert resumed["losses"] == pytest.approx(unbroken["losses"][STEP + 1 :], rel=1e-5)
    for name in ("steps", "rates"):
        assert resumed[name] == unbroken[name][STEP + 1 :]
    for name, weight in unbroken["weights"].items():
        torch.testing.assert_close(resumed["weights"][name], weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [layout.name for layout in ZERO[:3]])
@pytest.mark.parametrize("at", [STEP, WITHIN])
def test_in_the_same_layout_every_bit_is_the_same(name: str, at: int, found: dict[str, Any]) -> None:
    unbroken, resumed = result(found, f"{name}-{at}"), result(found, f"{name}-{name}-{at}")
    assert "refused" not in resumed, resumed
    assert resumed["losses"] == unbroken["losses"][at + 1 :]
    assert all(torch.equal(resumed["weights"][n], weight) for n, weight in unbroken["weights"].items())


@pytest.mark.parametrize(("before", "after"), REFUSED)
def test_gradients_of_a_begun_accumulation_need_the_layout_that_they_have(
    before: str, after: str, found: dict[str, Any]
) -> None:
    refused = result(found, f"{before}-{after}-{WITHIN}")["refused"]
    assert "CheckpointMismatchError" in refused
    assert "1 of the 2 batches" in refused
    assert "where the optimizer steps" in refused
