"""A run goes on in another layout than it was saved in.

Tests of ``treadle.checkpoint.exact``, ``treadle.checkpoint.elastic``,
``treadle_fabric.strategies.states.sharded_state``.
"""

from __future__ import annotations

import shutil
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.pipelining
from tests.equality.layouts import LAYOUTS
from tests.equality.model import SAMPLES, once, result, run_rows, trainer_fit
from tests.processes import run_in_ranks

pytestmark = pytest.mark.timeout(900)  # the first test waits until all have run
NAMES = [
    "single", "ddp2", "fsdp2_policy", "fsdp2_full", "tensor2", "pipeline2", "fsdp3", "hybrid4", "tensor2_fsdp2",
    "sequence2_fsdp2", "pipeline2_fsdp2",
]  # fmt: skip
TABLE = {layout.name: layout for layout in LAYOUTS if layout.name in NAMES}
SAVED = {"step": 3, "accumulation": 2}  # after which batch: where an optimizer steps, and in an accumulation
QUICK = ["single", "ddp2", "fsdp2_policy", "tensor2"]
PAIRS = [(a, b) for i, a in enumerate(QUICK) for b in (a, QUICK[(i + 1) % len(QUICK)])]
OTHER_PAIRS = [pair for pair in product(NAMES, NAMES) if pair not in PAIRS]
Runs = dict[str, Any]
"""What each run gave: unbroken ones, by layout; resumed ones, by the layouts before and after, and the moment."""


def run_pairs(pairs: list[tuple[str, str]], folder: Path) -> None:
    """Train in each layout without a break; and go on from each checkpoint of these, in the other layout of a pair."""

    def launch(rows: dict[str, list[tuple[str, Any]]]) -> None:
        for processes in sorted({TABLE[name].processes for name in rows}):
            mine = [row for name in rows for row in rows[name] if TABLE[name].processes == processes]
            run_in_ranks(run_rows, mine, folder, devices=processes, timeout=800)

    def fit(name: str, run: str, **arguments: Any) -> Any:
        layout = TABLE[name]
        arguments |= {"shuffle": True, "run_folder": folder / run}
        return run, partial(trainer_fit, layout.strategy(), layout.processes, **arguments)

    def saving(name: str, run: str, batch: int) -> Any:
        return fit(name, run, save_at=(batch, str(folder / run / "last.ckpt")))

    begun = dict.fromkeys(a for a, _ in pairs)
    launch({a: [saving(a, f"{a}-{moment}", at) for moment, at in SAVED.items()] for a in begun})
    resumed: dict[str, list[tuple[str, Any]]] = {b: [] for _, b in pairs}
    for (a, b), moment in product(pairs, SAVED):
        run = f"{a}-{b}-{moment}"
        shutil.copytree(folder / f"{a}-{moment}", folder / run)  # with rows of later batches than the checkpoint's
        resumed[b].append(fit(b, run, resumes=True))
    launch(resumed)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return once(tmp_path_factory, "transitions", partial(run_pairs, PAIRS))


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return once(tmp_path_factory, "other_transitions", partial(run_pairs, OTHER_PAIRS))


@pytest.mark.parametrize("moment", SAVED)
@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_the_run_goes_on(before: str, after: str, moment: str, found: Runs) -> None:
    check(before, after, moment, found)


@pytest.mark.faults
@pytest.mark.parametrize("moment", SAVED)
@pytest.mark.parametrize(("before", "after"), OTHER_PAIRS)
def test_the_run_goes_on_in_any_other_layout(before: str, after: str, moment: str, others: Runs) -> None:
    check(before, after, moment, others)


def check(before: str, after: str, moment: str, found: Runs) -> None:
    unbroken, resumed = result(found, f"{before}-{moment}"), result(found, f"{before}-{after}-{moment}")
    done = SAVED[moment] + 1
    for name, tensor in unbroken["saved"].items():
        assert torch.equal(resumed["restored"][name], tensor), name
    if before == after:
        assert resumed["losses"] == unbroken["losses"][done:]
        for kind in ("weights", "average"):
            assert all(torch.equal(resumed[kind][name], weight) for name, weight in unbroken[kind].items())
        assert resumed["rows"] == unbroken["rows"]
    assert resumed["losses"] == pytest.approx(unbroken["losses"][done:], rel=1e-5)
    assert resumed["rates"] == unbroken["rates"][done:]
    for name in ("loss_epoch", "metric"):
        assert resumed["logged"][name] == pytest.approx(unbroken["logged"][name], rel=1e-5)
    assert plain(resumed["rows"]) == [pytest.approx(row, rel=1e-5) for row in plain(unbroken["rows"])]
    for kind in ("weights", "average"):
        passes = resumed[kind].pop("frozen.passes")
        assert passes == done * TABLE[before].passes + (6 - done) * TABLE[after].passes
        for name, weight in resumed[kind].items():
            torch.testing.assert_close(weight, unbroken[kind][name], rtol=1e-5, atol=1e-5)
    seen = sorted(i for batch in (*unbroken["samples"][:done], *resumed["samples"]) for i in batch)
    assert seen == list(range(SAMPLES)), Path(before).name


def plain(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    """Rows of metrics.csv without what pipelines log besides."""
    return [{name: value for name, value in row.items() if name != "train_loss"} for row in rows]
