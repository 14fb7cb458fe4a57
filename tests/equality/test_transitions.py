"""A run goes on in another layout than it was saved in.

Tests of ``treadle.checkpoint.exact``, ``treadle.checkpoint.elastic``,
``treadle_fabric.strategies.states.sharded_state``.
"""

from __future__ import annotations

from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint
import torch.distributed.fsdp
from tests.equality.layouts import LAYOUTS
from tests.equality.model import SAMPLES, result, results, run_rows, trainer_fit
from tests.processes import run_in_ranks

pytestmark = pytest.mark.timeout(900)  # the first test waits for all runs

NAMES = ["single", "ddp2", "fsdp2_policy", "fsdp2_full", "tensor2", "fsdp3", "hybrid4", "tensor2_fsdp2"]
BESIDE_PIPELINES = ["single", "ddp2", "fsdp2_policy", "tensor2_fsdp2", "pipeline2_fsdp2"]
SAVED = {"step": 3, "accumulation": 2}  # after which batch: where an optimizer steps, and in an accumulation
PAIRS = [*product(NAMES, NAMES), ("pipeline2", "pipeline2"), ("pipeline2_fsdp2", "pipeline2_fsdp2")]
PAIRS += [*product(["pipeline2"], BESIDE_PIPELINES), *product(BESIDE_PIPELINES, ["pipeline2"])]
NAMES += ["pipeline2", "pipeline2_fsdp2"]
TABLE = {layout.name: layout for layout in LAYOUTS if layout.name in NAMES}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each run gave: unbroken ones, by layout; resumed ones, by the layouts before and after, and the moment."""
    folder = tmp_path_factory.mktemp("transitions")

    def launch(rows: dict[str, list[tuple[str, Any]]]) -> None:
        for processes in sorted({TABLE[name].processes for name in rows}):
            mine = [row for name in rows for row in rows[name] if TABLE[name].processes == processes]
            run_in_ranks(run_rows, mine, folder, devices=processes, timeout=300)

    def fit(name: str, **arguments: Any) -> Any:
        layout = TABLE[name]
        return partial(trainer_fit, layout.strategy(), layout.processes, shuffle=True, **arguments)

    def checkpoint(name: str, moment: str) -> str:
        return str(folder / f"{name}-{moment}.ckpt")

    launch(
        {
            a: [(f"{a}-{m}", fit(a, save_at=(at, checkpoint(a, m)))) for m, at in SAVED.items()]
            for a in NAMES
            if any(a == before for before, _ in PAIRS)
        }
    )
    resumed: dict[str, list[tuple[str, Any]]] = {name: [] for name in NAMES}
    for (a, b), moment in product(PAIRS, SAVED):
        resumed[b].append((f"{a}-{b}-{moment}", fit(b, ckpt_path=checkpoint(a, moment))))
    launch(resumed)
    return dict(results(folder))


@pytest.mark.parametrize("moment", SAVED)
@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_the_run_goes_on(before: str, after: str, moment: str, found: dict[str, Any]) -> None:
    unbroken, resumed = result(found, f"{before}-{moment}"), result(found, f"{before}-{after}-{moment}")
    done = SAVED[moment] + 1
    if before == after:
        assert resumed["losses"] == unbroken["losses"][done:]
        assert all(torch.equal(resumed["weights"][name], weight) for name, weight in unbroken["weights"].items())
    unbroken["weights"] = {
        name: weight
        for name, weight in unbroken["weights"].items()
        if TABLE[before].counts(name) and TABLE[after].counts(name)
    }
    assert resumed["losses"] == pytest.approx(unbroken["losses"][done:], rel=1e-5)
    assert resumed["logged"] == pytest.approx(unbroken["logged"], rel=1e-5)
    for name, weight in unbroken["weights"].items():
        torch.testing.assert_close(resumed["weights"][name], weight, rtol=1e-5, atol=1e-5)
    seen = sorted(i for batch in (*unbroken["samples"][:done], *resumed["samples"]) for i in batch)
    assert seen == list(range(SAMPLES)), Path(before).name
