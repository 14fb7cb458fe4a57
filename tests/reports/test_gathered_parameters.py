"""Gathered parameters and the parts of the ranks are one model: what is changed in either, holds.

Users of FSDP reported generators that were not trained, discriminators that were, and weights of yesterday: what they
froze, unfroze or stepped inside of a ``training_step`` was a part, and what ran next were parameters gathered before.

Others met torch's own errors, where what they passed on was a DTensor: to ``all_gather``, to a second trainer.

Tests of ``treadle_fabric.strategies.sharding.engine``, ``treadle_fabric.coordination.as_tensors`` and
``treadle_fabric.fabric``.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.fsdp
import torch.distributed.tensor  # the forks inherit what takes a second to import
from tests.processes import run_in_ranks
from tests.trainer.models import trainer
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.utils.data import DataLoader, TensorDataset

import treadle as L
from treadle_fabric import FSDPStrategy, MisconfigurationException

pytestmark = pytest.mark.timeout(110)


def batches(world_size: int = 1) -> Any:
    samples = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(samples), batch_size=8 // world_size)


class Gan(L.LightningModule):
    """Two networks that learn from each other, in one ``training_step``; ``freezes`` says how one is frozen."""

    def __init__(self, freezes: str = "toggled") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.freezes = freezes
        self.generator = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4))
        self.critic = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))

    def only(self, network: nn.Module, optimizer: Any) -> None:
        if self.freezes == "toggled":
            self.toggle_optimizer(optimizer)
        elif self.freezes == "modules":
            for each in (self.generator, self.critic):
                each.requires_grad_(each is network)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        real = batch[0]
        for_generator, for_critic = self.optimizers()
        if self.freezes == "nothing" and batch_idx:  # with the gradients of the last batch, before anything else
            for_generator.step()
            for_generator.zero_grad()
        self.only(self.critic, for_critic)
        loss = softplus(-self.critic(real)).mean() + softplus(self.critic(self.generator(real.flip(1)).detach())).mean()
        self.learn(for_critic, loss)
        self.only(self.generator, for_generator)
        loss = softplus(-self.critic(self.generator(real.flip(1)))).mean()
        if self.freezes == "nothing":
            self.manual_backward(loss)
            for_critic.zero_grad()
        else:
            self.learn(for_generator, loss)

    def learn(self, optimizer: Any, loss: Tensor) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        if self.freezes == "toggled":
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(each.parameters(), lr=0.2) for each in (self.generator, self.critic)]


class FreezesLate(L.LightningModule):
    """Freezes a layer in the second step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.below, self.above = nn.Linear(4, 4), nn.Linear(4, 2)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if batch_idx:
            self.below.requires_grad_(False)
        return self.above(self.below(batch[0]).tanh()).square().mean()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.above(self.below(batch[0]).tanh()).square().mean(), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.2)


class Halves(L.Callback):
    """Validates with half of each weight: a callback that averages weights exchanges them so."""

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.kept = [p.detach().clone() for p in pl_module.parameters()]
        for p in pl_module.parameters():
            p.data.mul_(0.5)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        for p, kept in zip(pl_module.parameters(), self.kept, strict=True):
            p.data.copy_(kept)


def trained(
    tmp_path: Path, module: L.LightningModule, world_size: int = 1, strategy: Any = "auto"
) -> dict[str, Tensor]:
    """Train, validate between the steps, and return the whole weights and the metric."""
    fits = trainer(
        tmp_path, max_epochs=2, devices=world_size, strategy=strategy, callbacks=[Halves()], val_check_interval=2
    )
    validates = isinstance(module, FreezesLate)
    fits.fit(module, batches(world_size), batches(world_size) if validates else None)
    state = {name: p.full_tensor() if world_size > 1 else p for name, p in module.state_dict().items()}
    return {**state, **fits.callback_metrics}


class Penalized(FreezesLate):
    """Its loss depends on a gradient, or on each parameter."""

    def __init__(self, by: str) -> None:
        super().__init__()
        self.by = by

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        samples = batch[0].clone().requires_grad_(True)
        loss = self.above(self.below(samples).tanh()).square().mean()
        if self.by == "gradient":
            return loss + torch.autograd.grad(loss, samples, create_graph=True)[0].square().mean()
        return loss + sum(0.01 * p.square().sum() for p in self.parameters())


class InHooks(L.LightningModule):
    """Accumulates by ``no_sync`` of what runs it, and is run in a hook: by ``trainer.model``, or by itself."""

    def __init__(self, by_itself: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.automatic_optimization, self.by_itself = False, by_itself
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        last, optimizer = batch_idx % 2 == 1, self.optimizers()
        alone = last or self.trainer.world_size == 1
        with contextlib.nullcontext() if alone else self.trainer.model.no_sync():
            self.manual_backward(self(batch[0]).square().mean())
        if last:
            optimizer.step()
            optimizer.zero_grad()

    def on_train_epoch_end(self) -> None:
        with torch.no_grad():
            self.log("seen", (self if self.by_itself else self.trainer.model)(torch.ones(1, 4)).sum())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.2)


MODULES = [InHooks, lambda: Gan("toggled"), lambda: Gan("modules"), lambda: Gan("nothing"), FreezesLate]
STRATEGIES = [
    lambda: FSDPStrategy(policy=lambda module: False),
    lambda: FSDPStrategy(policy={nn.Linear}, sharding_strategy="SHARD_GRAD_OP"),
]


def test_parts_and_gathered_parameters_are_one_model(tmp_path: Path) -> None:
    expected = [trained(tmp_path, make()) for make in MODULES]
    run_in_ranks(_check, tmp_path, expected)


def test_processes_that_start_in_fit_build_modules_there(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="DDPStrategy starts its processes in `fit`.*configure_model"):
        trainer(tmp_path, devices=2, strategy="ddp_fork").init_module()


def _check(tmp_path: Path, expected: list[dict[str, Tensor]]) -> None:
    _compare(tmp_path, expected)
    _pass_on(tmp_path)
    _refuse(tmp_path)


def _refuse(tmp_path: Path) -> None:
    """Say what cannot be; the first has ended in a segmentation fault."""
    trainer(tmp_path, devices=2, strategy=STRATEGIES[0]()).fit(Penalized("gradient"), batches(2))
    for by, said in [
        ("gradient", "create_graph=True in a backward pass"),
        ("parameters", "selves: 'below'"),
    ]:
        with pytest.raises(MisconfigurationException, match=said):
            trainer(tmp_path, devices=2, strategy=FSDPStrategy(policy={nn.Linear})).fit(Penalized(by), batches(2))
    with pytest.raises(
        MisconfigurationException, match=r"in 'layers.0' \(Linear\), .*outside of.*call trainer.model\("
    ):
        trainer(tmp_path, devices=2, strategy=STRATEGIES[0]()).fit(InHooks(by_itself=True), batches(2))


def _pass_on(tmp_path: Path) -> None:
    """Build a module for the trainer, gather numbers of its parameters, and give it to a trainer of another kind."""
    fits = trainer(tmp_path, devices=2, strategy=FSDPStrategy(policy={nn.Linear}))
    with fits.init_module(empty_init=True):
        module = FreezesLate()
    assert module.above.weight.is_meta
    fits.fit(module, batches(2))
    norm = module.above.weight.detach().norm()
    whole = module.above.weight.full_tensor().norm()  # type: ignore[operator]
    torch.testing.assert_close(module.all_gather({"norm": norm})["norm"], torch.stack([whole, whole]))
    torch.testing.assert_close(fits.fabric.all_reduce(norm), whole)
    for strategy in ("ddp", "auto"):
        with pytest.raises(MisconfigurationException, match="of FreezesLate are shared out over processes, as a strat"):
            trainer(tmp_path, devices=2, strategy=strategy).validate(module, batches(2), verbose=False)


def _compare(tmp_path: Path, expected: list[dict[str, Tensor]]) -> None:
    for sharded in STRATEGIES:
        for make, values in zip(MODULES, expected, strict=True):
            torch.testing.assert_close(trained(tmp_path, make(), 2, sharded()), values, rtol=0, atol=1e-5)
