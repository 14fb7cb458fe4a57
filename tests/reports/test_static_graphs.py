"""``static_graph=True`` and ``gradient_as_bucket_view=True`` train what one process trains, or are refused.

Users of Lightning reported assertions of torch's reducer, and ranks that parted without a word: where a run of a
static graph began with an accumulation, in manual optimization, and where gradients that are views came into other
buckets.

Tests of ``treadle_fabric.strategies.data_parallel.ddp_engine`` and ``treadle_fabric.strategies.ddp``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.processes import run_in_ranks
from tests.reports.two_layers import weights
from tests.trainer.models import loader, trainer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import treadle as L
from treadle_fabric import DDPStrategy, Fabric, MisconfigurationException

pytestmark = pytest.mark.timeout(110)


class Deep(L.LightningModule):
    """Two layers, one of them checkpointed and used twice, and one that no loss ever depends on."""

    def __init__(self, reentrant: bool | None = None, manual: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.reentrant, self.manual = reentrant, manual
        self.below, self.above, self.unused = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(3, 3)
        self.automatic_optimization = not manual

    def forward(self, x: Tensor) -> Tensor:
        x = (x / 10).requires_grad_()
        for _ in range(1 if self.reentrant else 2):  # torch runs the hooks of each reentrant part by itself
            x = self.below(x) if self.reentrant is None else checkpoint(self.below, x, use_reentrant=self.reentrant)
        return self.above(x.tanh())

    def loss(self, batch: Tensor) -> Tensor:
        return self(batch).square().mean() + self(batch + 1).square().mean()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        if not self.manual:
            return self.loss(batch)
        optimizer = self.optimizers()
        for _ in range(self.manual):
            self.manual_backward(self.loss(batch))
        if self.manual == 1 or batch_idx % 2:
            optimizer.step()
            optimizer.zero_grad()
        return None

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


class Used(Deep):
    """Every parameter is used, and a layer is unfrozen in an accumulation."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Identity()
        self.below.requires_grad_(False)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            self.below.requires_grad_(True)


class Idle(Deep):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        return None if batch_idx == 2 else self.loss(batch)


STATIC, VIEW = {"static_graph": True}, {"gradient_as_bucket_view": True}
CASES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "static": (Deep, STATIC, {}),
    "static, accumulated": (Deep, STATIC, {"accumulate_grad_batches": 3}),
    "static, checkpointed": (lambda: Deep(False), {**STATIC, **VIEW}, {"accumulate_grad_batches": 2}),
    "static, reentrant": (lambda: Deep(True), STATIC, {}),
    "static, unused allowed": (Deep, {**STATIC, "find_unused_parameters": True}, {}),
    "static, manual": (lambda: Deep(manual=1), STATIC, {}),
    "static, changed": (Used, STATIC, {"accumulate_grad_batches": 4}),
    "view": (Deep, {**VIEW, "find_unused_parameters": True}, {}),
    "view, manual": (lambda: Deep(manual=2), {**VIEW, "find_unused_parameters": True}, {}),
    "view, changed": (Used, VIEW, {"accumulate_grad_batches": 4, "gradient_clip_val": 0.5}),
}


def trained(folder: Path, world: int, case: str) -> list[float]:
    make, given, arguments = CASES[case]
    strategy = "auto" if world == 1 else DDPStrategy(**given)
    trainer(folder, devices=world, strategy=strategy, **arguments).fit(model := make(), loader(32, 4 // world))
    return weights(model)


def by_hand(world: int, accumulate: int = 1, **given: Any) -> list[float]:
    """A hand-written loop with two forward passes a step, and gradients that are set to zeros."""
    strategy = "auto" if world == 1 else DDPStrategy(**given)
    fabric = Fabric(accelerator="cpu", devices=world, strategy=strategy)
    fabric.launch()
    model, optimizer = fabric.setup(module := Deep(False), module.configure_optimizers())
    for i, batch in enumerate(fabric.setup_dataloaders(loader(32, 4 // world))):
        last = i % accumulate == accumulate - 1
        with fabric.no_backward_sync(model, enabled=not last):
            fabric.backward(model(batch).square().mean() + model(batch + 1).square().mean())
        if last:
            fabric.clip_gradients(model, optimizer, max_norm=1)
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
    return weights(module)


BY_HAND: dict[str, dict[str, Any]] = {
    "static": STATIC,
    "static, accumulated": {"accumulate": 4, **STATIC, **VIEW},
    "view": {**VIEW, "find_unused_parameters": True},
}


def refused(folder: Path, model: L.LightningModule, **given: Any) -> str:
    try:
        trainer(folder, devices=2, strategy=DDPStrategy(**given)).fit(model, loader(16, 2))
    except MisconfigurationException as error:
        return str(error)
    return ""


def run_rank(folder: Path) -> None:
    out: dict[str, Any] = {case: trained(folder, 2, case) for case in CASES}
    out.update({f"{case}, by hand": by_hand(2, **given) for case, given in BY_HAND.items()})
    out["twice"] = refused(folder, Deep(manual=2), **STATIC)
    out["idle"] = refused(folder, Idle(), **STATIC)
    (folder / f"{os.environ['LOCAL_RANK']}.json").write_text(json.dumps(out))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    run_in_ranks(run_rank, folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_the_ranks_train_what_one_process_trains(ranks: Any, tmp_path: Path, case: str) -> None:
    zero, one = (found[case] for found in ranks)
    assert zero == one
    assert zero == pytest.approx(trained(tmp_path, 1, case), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("case", BY_HAND)
def test_a_hand_written_loop_too(ranks: Any, case: str) -> None:
    zero, one = (found[f"{case}, by hand"] for found in ranks)
    assert zero == one
    assert zero == pytest.approx(by_hand(1, BY_HAND[case].get("accumulate", 1)), rel=1e-5, abs=1e-7)


def test_what_is_no_static_graph_is_refused(ranks: Any) -> None:
    for found in ranks:
        assert "static_graph=True, and a second backward pass in one step" in found["twice"]
    for rank, found in enumerate(ranks):
        assert f"no loss on rank {rank} in this step" in found["idle"]
