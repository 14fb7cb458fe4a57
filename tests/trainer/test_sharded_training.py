"""Training where each rank holds a part of the parameters: its numbers are those of one process.

Tests of ``treadle_fabric.strategies.sharding.engine``, ``treadle.numbers``, ``treadle.trainer.trials``.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint
import torch.distributed.fsdp  # heavy; forked ranks have it
from tests.processes import run_in_ranks
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import treadle as L
from treadle.callbacks import BackboneFinetuning, BatchSizeFinder
from treadle.tuner import Tuner
from treadle.utilities.grads import grad_norm
from treadle_fabric import NonFiniteError
from treadle_fabric.strategies import FSDPStrategy

SAMPLES = torch.randn(16, 5, generator=torch.Generator().manual_seed(1))
WEIGHTS = [3.0, 1.0, 0.0, 2.0, 5.0, 1.0, 1.0, 4.0]


class Net(L.LightningModule):
    """Two layers that ranks share out; it notes losses and norms of gradients."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 3)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        self.norms: list[dict[str, float]] = []

    def loss(self, batch: Any) -> Tensor:
        return self.second(self.first(batch[0]).tanh()).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.norms.append({name: float(norm) for name, norm in grad_norm(self, 2).items()})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class Weighted(Net):
    """Losses with weights."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        share, shares = self.trainer.strategy.data_parallel_rank, self.trainer.strategy.data_parallel_size
        mine = [sum(WEIGHTS[batch_idx * 2 + i] for i in ([0, 1] if shares == 1 else [share]))]
        if shares == 1:
            parts = [(w, self.loss([batch[0][i::2]])) for i, w in enumerate(WEIGHTS[batch_idx * 2 :][:2])]
            return {"loss": sum(w * loss for w, loss in parts) / max(mine[0], 1e-9), "weight": mine[0]}
        return {"loss": self.loss(batch), "weight": mine[0]}


def trainer(ranks: int, **arguments: Any) -> L.Trainer:
    strategy: dict[str, Any] = {"strategy": FSDPStrategy(policy={nn.Linear})} if ranks > 1 else {}
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "max_epochs": 2}
    quiet["enable_checkpointing"] = False
    return L.Trainer(accelerator="cpu", devices=ranks, num_sanity_val_steps=0, **strategy, **quiet | arguments)


def data(ranks: int) -> DataLoader[Any]:
    return DataLoader(TensorDataset(SAMPLES), batch_size=4 // ranks)


def whole(module: nn.Module) -> dict[str, Tensor]:
    found = {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in module.state_dict().items()}
    return {name: t.clone() for name, t in found.items()}


def close(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-5, atol=1e-6, msg=name)


def _numbers() -> None:
    for kind, more in (
        (Net, {"gradient_clip_val": 0.05}),
        (Net, {"accumulate_grad_batches": 3, "gradient_clip_val": 0.05, "on_nonfinite": "raise"}),
        (Weighted, {"accumulate_grad_batches": 2}),
    ):
        alone, together = kind(), kind()
        trainer(1, **more).fit(alone, data(1))
        trainer(2, **more).fit(together, data(2))
        close(whole(together), whole(alone))
        for mine, theirs in zip(together.norms, alone.norms, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-4), more


def test_clipping_weights_and_norms() -> None:
    run_in_ranks(_numbers)


class Idle(Net):
    """Has nothing to learn from at some batches of rank 1, before or after its layers have run."""

    after = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch) if self.after else None
        if self.trainer.global_rank == 1 and batch_idx in (0, 2):
            return None
        return self.loss(batch) if loss is None else loss


class IdleAfter(Idle):
    after = True


def _idle() -> None:
    found = []
    for kind in (IdleAfter, Idle):
        for more in ({}, {"accumulate_grad_batches": 2}):
            module = kind()
            trainer(2, **more).fit(module, data(2))
            found.append(whole(module))
    close(found[0], found[2])
    close(found[1], found[3])


def test_a_rank_with_nothing_to_learn_from_takes_part() -> None:
    run_in_ranks(_idle)


class Loads(Net):
    """Has a loader of its own, whose batch size a search may set."""

    batch_size = 2

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(SAMPLES), batch_size=self.batch_size)


def _searches() -> None:
    plain = Loads()
    trainer(2).fit(plain)
    before = Loads()
    Tuner(trainer(2)).lr_find(before, num_training=12, update_attr=False)
    assert type(before.first) is nn.Linear and torch.equal(before.first.weight, Loads().first.weight)
    trainer(2).fit(before)  # sharded anew
    within = Loads()
    trainer(2, callbacks=[BatchSizeFinder(max_trials=1, init_val=2)]).fit(within)
    for other in (before, within):
        assert all(torch.equal(value, whole(plain)[name]) for name, value in whole(other).items())


def test_a_search_leaves_nothing_behind() -> None:
    run_in_ranks(_searches)


class Broken(Net):
    """Its loss is NaN in one batch of rank 1."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        broken = batch_idx == 1 and self.trainer.global_rank == 1
        return self.loss(batch) * (math.nan if broken else 1.0)


def _nonfinite() -> None:
    skipping = trainer(2, on_nonfinite="skip", max_epochs=1)
    skipping.fit(module := Broken(), data(2))
    assert skipping.global_step == 3 and all(bool(each.isfinite().all()) for each in whole(module).values())
    with pytest.raises(NonFiniteError, match="The loss is nan at epoch 0, batch_idx 1, global_step 1, rank 1"):
        trainer(2, on_nonfinite="raise").fit(Broken(), data(2))
    # a part of the model that is frozen at first
    fine = BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False)
    trainer(2, callbacks=[fine], max_epochs=3).fit(unfrozen := Behind(), data(2))
    trainer(1, callbacks=[BackboneFinetuning(1, verbose=False)], max_epochs=3).fit(alone := Behind(), data(1))
    close(whole(unfrozen), whole(alone))
    assert not torch.equal(whole(unfrozen)["backbone.weight"], whole(Behind())["backbone.weight"])


class Behind(Net):
    """A net behind a backbone."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(5, 5)
        with torch.no_grad():
            self.backbone.weight.copy_(torch.eye(5))
            self.backbone.bias.zero_()

    def loss(self, batch: Any) -> Tensor:
        return super().loss([self.backbone(batch[0])])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.1)


def test_what_is_not_finite_and_what_is_frozen() -> None:
    run_in_ranks(_nonfinite)
