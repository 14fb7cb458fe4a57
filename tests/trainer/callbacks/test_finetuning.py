"""BaseFinetuning and BackboneFinetuning: what is frozen, when it trains, and that a resumed run goes on exactly.

Tests of ``treadle.callbacks.finetuning`` and of what ``treadle.run.changes`` keeps of norms.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.processes import run_in_ranks
from tests.trainer.models import loader, trainer
from torch import Tensor, nn

import treadle as L
from treadle.callbacks import BackboneFinetuning, BaseFinetuning, ModelPruning


class Classifier(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.backbone = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Sequential(nn.Tanh(), nn.Linear(3, 3)))
        self.head = nn.Linear(3, 1)
        self.rates: list[list[float]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.rates.append([group["lr"] for group in self.trainer.optimizers[0].param_groups])
        return self.head(self.backbone(batch / 10 + torch.rand_like(batch))).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val", self.head(self.backbone(batch)).mean())

    def configure_optimizers(self) -> Any:
        trainable = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trainable, lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)]


def everything(run: L.Trainer, model: Classifier) -> dict[str, Any]:
    """All that a resumed run must have as the run that was never stopped."""
    return {
        **model.state_dict(),
        "optimizer": run.optimizers[0].state_dict(),
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "modes": {name: m.training for name, m in model.named_modules()},
        "norm": model.backbone[1].track_running_stats,
        "callbacks": [c.state_dict() for c in run.callbacks],
        "rates": model.rates[-4:],
    }


def assert_same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def fit(path: Path, callback: L.Callback, *, max_steps: int = -1, ckpt_path: Any = None, **kwargs: Any) -> Any:
    torch.manual_seed(1)
    arguments = {"max_epochs": 4, "num_sanity_val_steps": 0, "callbacks": callback, **kwargs}
    run, model = trainer(path, max_steps=max_steps, **arguments), Classifier()
    run.fit(model, loader(8, shuffle=True), loader(4), ckpt_path=ckpt_path)
    return run, model


def backbone(train_bn: bool) -> BackboneFinetuning:
    return BackboneFinetuning(1, lambda epoch: 1.5, train_bn=train_bn)


class Stepwise(BaseFinetuning):
    """Unfreezes one layer after the other, and counts its calls."""

    calls = 0

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.backbone, train_bn=False)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        self.calls += 1
        optimizer.param_groups[0]["lr"] *= 1.1
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.backbone[2], optimizer)
        if epoch == 2:
            self.unfreeze_and_add_param_group(pl_module.backbone[:2], optimizer, lr=0.01)

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.calls = state_dict["calls"]


MAKE = {"norm trains": lambda: backbone(True), "norm is frozen": lambda: backbone(False), "stepwise": Stepwise}


@pytest.mark.parametrize("kind", MAKE)
def test_a_resumed_run_goes_on_exactly(tmp_path: Path, kind: str) -> None:
    whole = everything(*fit(tmp_path, MAKE[kind]()))
    for steps in (2, 4, 6, 11):  # before the unfreezing, between two epochs, in the epoch of the unfreezing, later
        stopped, _ = fit(tmp_path, MAKE[kind](), max_steps=steps)
        stopped.save_checkpoint(path := tmp_path / f"{steps}.ckpt")
        assert_same(everything(*fit(tmp_path, MAKE[kind](), ckpt_path=path)), whole)


@pytest.mark.parametrize("pruned_first", [True, False])
def test_a_pruned_backbone_goes_on_exactly(tmp_path: Path, pruned_first: bool) -> None:
    def callbacks() -> Any:
        both = [ModelPruning("l1_unstructured", amount=0.2, parameter_names=["weight"]), backbone(True)]
        return both if pruned_first else both[::-1]

    whole = fit(tmp_path, callbacks())[1].state_dict()
    for steps in (3, 6, 9):  # before there are masks, in the epoch of the unfreezing, later
        stopped, _ = fit(tmp_path, callbacks(), max_steps=steps)
        stopped.save_checkpoint(path := tmp_path / f"{steps}.ckpt")
        assert_same(fit(tmp_path, callbacks(), ckpt_path=path)[1].state_dict(), whole)


class Saving(L.Callback):
    """Saves after a batch."""

    def __init__(self, batches: int, path: Path) -> None:
        self.batches, self.path = batches, path

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.fit_progress.batches == self.batches:
            trainer.save_checkpoint(self.path)


def test_a_run_saved_within_an_accumulation_goes_on_exactly(tmp_path: Path) -> None:
    path, arguments = tmp_path / "a.ckpt", {"accumulate_grad_batches": 3}
    saving: Any = {"callbacks": [backbone(False), Saving(6, path)], **arguments}  # in the epoch of the unfreezing
    run, model = fit(tmp_path, backbone(False), **saving)
    run.callbacks.pop()
    assert_same(everything(*fit(tmp_path, backbone(False), ckpt_path=path, **arguments)), everything(run, model))


def test_the_backbone_trains_from_its_epoch_on_with_a_rate_of_its_own(tmp_path: Path) -> None:
    _, model = fit(tmp_path, BackboneFinetuning(2, lambda epoch: float(epoch)), max_epochs=5)
    by_epoch = [model.rates[4 * epoch] for epoch in range(5)]
    assert [rates[0] for rates in by_epoch] == [0.1, 0.1, 0.05, 0.05, 0.025]
    assert [len(rates) for rates in by_epoch] == [1, 1, 2, 2, 2]
    assert by_epoch[2][1] == pytest.approx(0.005)
    assert by_epoch[3][1] == pytest.approx(0.005 * 4)  # `lambda_func` counts from 1
    assert by_epoch[4][1] == pytest.approx(0.025)  # not more than the head's
    _, other = fit(tmp_path, BackboneFinetuning(0, backbone_initial_lr=0.5, should_align=False), max_epochs=2)
    assert [rates[1] for rates in other.rates[::4]] == [0.5, 1.0]


def test_frozen_batch_norm_stays_as_it_is(tmp_path: Path) -> None:
    seen: list[bool] = []

    class Restless(Classifier):
        def on_train_epoch_start(self) -> None:
            self.train()

        def on_validation_model_train(self) -> None:
            self.train()

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            seen.append(self.backbone[1].training)
            return super().training_step(batch, batch_idx)

    model = Restless()
    before = {name: value.clone() for name, value in model.backbone[1].state_dict().items()}
    run = trainer(tmp_path, max_epochs=3, val_check_interval=2, callbacks=BackboneFinetuning(1, train_bn=False))
    run.fit(model, loader(8), loader(4))
    assert seen == [False] * 12
    assert_same(dict(model.backbone[1].state_dict()), before)
    assert model.backbone[0].weight.requires_grad and not model.backbone[1].weight.requires_grad
    held = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}


def test_a_second_fit_unfreezes_for_its_own_optimizer(tmp_path: Path) -> None:
    run, model = fit(tmp_path, backbone(True), max_steps=6)
    run.max_steps = -1
    run.fit(model, loader(8, shuffle=True), loader(4))
    assert model.backbone[0].weight.requires_grad
    assert len(model.rates[6]) == 2


def test_of_several_optimizers_one_has_the_backbone(tmp_path: Path) -> None:
    class Two(Classifier):
        automatic_optimization = False

        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            super().training_step(batch, batch_idx)

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD([p], lr=0.1 * (i + 1)) for i, p in enumerate(self.head.parameters())]

        def on_train_epoch_end(self) -> None:
            self.optimizers()[0].step()

    callback = BackboneFinetuning(1)
    run = trainer(tmp_path, max_epochs=4, callbacks=callback)
    run.fit(model := Two(), loader(4))
    first, second = run.optimizers
    assert [len(o.param_groups) for o in (first, second)] == [2, 1]
    assert first.param_groups[1]["lr"] == callback.previous_backbone_lr == pytest.approx(0.04)
    assert model.backbone[0].weight.requires_grad


def test_helpers() -> None:
    model = Classifier().backbone
    linear, norm, (tanh, last) = model[0], model[1], model[2]
    assert BaseFinetuning.flatten_modules([model, [last]]) == [linear, norm, tanh, last]
    assert BaseFinetuning.flatten_modules(nn.ModuleDict({"a": linear, "b": model[2]})) == [linear, tanh, last]
    BaseFinetuning.freeze(model, train_bn=True)
    assert norm.training and list(BaseFinetuning.filter_params(model)) == [norm.weight, norm.bias]
    BaseFinetuning.freeze(model, train_bn=False)
    assert not norm.training and not norm.track_running_stats and not list(BaseFinetuning.filter_params(model))
    assert len(list(BaseFinetuning.filter_params(model, train_bn=False, requires_grad=False))) == 4
    BaseFinetuning.make_trainable(model)
    assert norm.training and norm.track_running_stats and len(list(BaseFinetuning.filter_params(model))) == 6
    BaseFinetuning.freeze_module(linear)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.warns(UserWarning, match="Of the 2 parameters to unfreeze, 2 already exist within another group"):
        BaseFinetuning.unfreeze_and_add_param_group(linear, optimizer)
    assert len(optimizer.param_groups) == 1
    optimizer = torch.optim.SGD(last.parameters(), 0.1)
    BaseFinetuning.unfreeze_and_add_param_group([linear, last], optimizer)
    assert optimizer.param_groups[1]["params"] == [*linear.parameters()]
    assert optimizer.param_groups[1]["lr"] == pytest.approx(0.01)


def test_what_is_refused(tmp_path: Path) -> None:
    class Headless(L.LightningModule):
        def training_step(self, batch: Tensor, batch_idx: int) -> None: ...

        def configure_optimizers(self) -> None: ...

    with pytest.raises(L.MisconfigurationException, match="Headless.backbone is missing"):
        trainer(tmp_path, callbacks=BackboneFinetuning()).fit(Headless(), loader(2))
    with pytest.raises(L.MisconfigurationException, match="has no `freeze_before_training`"):
        trainer(tmp_path, callbacks=BaseFinetuning()).fit(Headless(), loader(2))
    with pytest.raises(L.MisconfigurationException, match="lambda_func=2"):
        BackboneFinetuning(lambda_func=2)  # type: ignore[arg-type]
    with pytest.raises(L.MisconfigurationException, match="unfreeze_backbone_at_epoch"):
        BackboneFinetuning(unfreeze_backbone_at_epoch=-1)


def in_ranks(path: Path) -> None:
    arguments: Any = {"devices": 2, "strategy": "ddp", "max_epochs": 4}
    run, model = fit(path, backbone(False), **arguments)
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert_same(*run.strategy.all_gather(weights))
    assert not model.backbone[1].training and model.backbone[0].weight.grad is not None
    assert_same(model.backbone[1].running_mean, torch.zeros(3))
    stopped, _ = fit(path, backbone(False), max_steps=3, **arguments)  # in the epoch of the unfreezing
    stopped.save_checkpoint(path / "a.ckpt")
    assert_same(everything(*fit(path, backbone(False), ckpt_path=path / "a.ckpt", **arguments)), everything(run, model))


@pytest.mark.timeout(110)
def test_the_ranks_train_one_model(tmp_path: Path) -> None:
    run_in_ranks(in_ranks, tmp_path)
