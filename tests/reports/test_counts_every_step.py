"""Optimizer steps are counted wherever they are made, before anyone looks.

Users of Lightning reported checkpoints that hold the weights of a later step than their name says, ``global_step`` that
stays 0, and runs that ``max_steps`` does not end, because an optimizer stepped in another hook than ``training_step``.

Tests of ``treadle.run.steps``, ``treadle.run.progress``, ``treadle.loops.epoch``.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.trainer.models import Net, loader, trainer
from torch import Tensor
from torch.optim import SGD, Optimizer

import treadle as L
from treadle.callbacks import ModelCheckpoint

pytestmark = pytest.mark.filterwarnings("ignore:.*this fit will run with no optimizer")


class Manual(Net):
    """Manual optimization that steps once a batch, in the hook ``at``, through ``kind`` of optimizer."""

    def __init__(self, at: str = "training_step", kind: str = "wrapped") -> None:
        super().__init__(lr=0.1)
        self.automatic_optimization = False
        self.at, self.kind = at, kind
        self.steps: list[int] = []

    def configure_optimizers(self) -> Any:
        self.own = SGD(self.parameters(), lr=0.1)
        return None if self.kind == "not returned" else self.own

    def make_step(self, hook: str) -> None:
        if hook == self.at:
            optimizer: Any = self.optimizers() if self.kind == "wrapped" else self.own
            optimizer.step()
            self.steps.append(self.global_step)

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        self.own.zero_grad()
        self.manual_backward(self.loss(batch))
        self.make_step("training_step")

    def on_after_backward(self) -> None:
        self.make_step("on_after_backward")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.make_step("on_train_batch_start")

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.make_step("on_train_batch_end")

    def on_train_epoch_start(self) -> None:
        self.make_step("on_train_epoch_start")

    def on_train_epoch_end(self) -> None:
        self.make_step("on_train_epoch_end")

    def on_train_start(self) -> None:
        self.make_step("on_train_start")


def weight(model: L.LightningModule) -> Tensor:
    return model.layer.weight.detach().clone()  # type: ignore[union-attr, operator, no-any-return]


@pytest.mark.parametrize("kind", ["wrapped", "returned", "not returned"])
@pytest.mark.parametrize("at", ["training_step", "on_after_backward", "on_train_batch_start", "on_train_batch_end"])
def test_a_step_counts_in_every_hook_and_with_every_optimizer(tmp_path: Path, at: str, kind: str) -> None:
    model = Manual(at, kind)
    run = trainer(tmp_path, max_epochs=4, max_steps=6)
    run.fit(model, loader())
    assert run.global_step == 6, "max_steps ends the run"
    assert model.steps == [1, 2, 3, 4, 5, 6], "a step is counted before the next line of the hook"


@pytest.mark.parametrize("kind", ["wrapped", "returned", "not returned"])
@pytest.mark.parametrize("at", ["training_step", "on_train_batch_end"])
def test_a_checkpoint_has_the_weights_of_the_step_in_its_name(tmp_path: Path, at: str, kind: str) -> None:
    seen: dict[int, Tensor] = {}

    class Watching(Manual):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            super().on_train_batch_end(outputs, batch, batch_idx)
            seen[len(self.steps)] = weight(self)

    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1, save_last=True)
    trainer(tmp_path, enable_checkpointing=True, callbacks=saving, max_epochs=2).fit(Watching(at, kind), loader())
    names = sorted(path.name for path in tmp_path.glob("*.ckpt"))
    assert names == ["last.ckpt", "step=2.ckpt", "step=4.ckpt", "step=6.ckpt", "step=8.ckpt"]
    for step in (2, 4, 6, 8):
        saved = torch.load(tmp_path / f"step={step}.ckpt")
        assert saved["global_step"] == step
        assert torch.equal(saved["state_dict"]["layer.weight"], seen[step])


@pytest.mark.parametrize("at", ["on_train_epoch_start", "on_train_epoch_end"])
def test_a_step_between_two_epochs_counts(tmp_path: Path, at: str) -> None:
    model = Manual(at)
    saving = ModelCheckpoint(tmp_path, save_last=True)
    run = trainer(tmp_path, enable_checkpointing=True, callbacks=saving, max_epochs=3)
    run.fit(model, loader())
    assert run.global_step == 3 and model.steps == [1, 2, 3]
    assert torch.load(tmp_path / "last.ckpt")["global_step"] == 3
    run = trainer(tmp_path, max_epochs=4, max_steps=2)
    run.fit(Manual(at), loader())
    assert run.global_step == 2


def test_saves_by_step_see_a_step_between_two_epochs(tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    model = Manual("on_train_epoch_end")
    trainer(tmp_path, enable_checkpointing=True, callbacks=saving, max_epochs=3).fit(model, loader())
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["step=1.ckpt", "step=2.ckpt", "step=3.ckpt"]
    assert torch.equal(torch.load(tmp_path / "step=3.ckpt")["state_dict"]["layer.weight"], weight(model))


def test_steps_at_the_end_of_an_epoch_and_in_its_batches_both_count(tmp_path: Path) -> None:
    class Both(Manual):
        def on_train_epoch_end(self) -> None:
            self.own.step()

    run = trainer(tmp_path, max_epochs=2)
    run.fit(Both(), loader())
    assert run.global_step == 2 * (4 + 1)


def test_a_step_before_the_first_epoch_counts(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_epochs=1)
    run.fit(Manual("on_train_start"), loader())
    assert run.global_step == 1


def test_several_steps_at_a_batch_count_once(tmp_path: Path) -> None:
    class Often(Manual):
        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            for _ in range(3):
                super().training_step(batch, batch_idx)
                self.own.step()

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.own.step()

    run = trainer(tmp_path)
    run.fit(Often(), loader())
    assert run.global_step == 4
    run.save_checkpoint(tmp_path / "end.ckpt")
    assert torch.load(tmp_path / "end.ckpt")["treadle"]["progress"]["optimizer_steps"] == 4 * 7


def test_callbacks_and_hooks_of_automatic_optimization_may_step(tmp_path: Path) -> None:
    class Stepping(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            trainer.optimizers[0].step()

    class Again(Net):
        def on_before_zero_grad(self, optimizer: Optimizer) -> None:
            optimizer.step()

    run = trainer(tmp_path, callbacks=Stepping(), accumulate_grad_batches=2, max_epochs=2)
    run.fit(Net(), loader())
    assert run.global_step == 2 * (2 + 1)
    run = trainer(tmp_path)
    run.fit(Again(), loader())
    assert run.global_step == 4


def test_optimizers_of_something_else_do_not_count(tmp_path: Path) -> None:
    class Attack(Net):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            noise = torch.zeros_like(batch, requires_grad=True)
            inner = SGD([noise], lr=0.1)
            self.loss(batch + noise).backward()
            inner.step()
            return super().training_step((batch + noise).detach(), batch_idx)

    run = trainer(tmp_path, accumulate_grad_batches=2)
    run.fit(Attack(), loader())
    assert run.global_step == 2


class SuperStep(SGD):
    """A class whose step calls the step of its base class: torch reports two."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Around(Optimizer):
    """Wraps another optimizer, and has none of the hooks of torch's optimizers."""

    def __init__(self, inner: Optimizer) -> None:
        self.inner, self.calls = inner, 0

    param_groups = property(lambda self: self.inner.param_groups)
    state = property(lambda self: self.inner.state)
    defaults = property(lambda self: self.inner.defaults)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def step(self, closure: Any = None) -> Any:
        self.calls += 1
        return self.inner.step(closure)


def plain(model: Any) -> Optimizer:
    return SGD(model.parameters(), lr=0.1)


def super_step(model: Any) -> Optimizer:
    return SuperStep(model.parameters(), lr=0.1)


def around(model: Any) -> Optimizer:
    return Around(plain(model))


def of_closures(model: Any) -> Optimizer:
    return torch.optim.LBFGS(model.parameters(), max_iter=3)


@pytest.mark.parametrize("make", [plain, super_step, around, of_closures])
@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("automatic", [True, False])
def test_one_step_is_one_optimizer_step(
    tmp_path: Path, make: Any, precision: str, scheduled: bool, automatic: bool
) -> None:
    if make is of_closures and (precision == "16-mixed" or not automatic):
        pytest.skip("torch has no such scaler, and the module calls the closure itself")

    class Model(Net):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = automatic

        def configure_optimizers(self) -> Any:
            optimizer = make(self)
            if scheduled and make is not around:  # puts another `step` into the place of the optimizer's
                return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]
            return optimizer

        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            loss = self.loss(batch)
            if not automatic:
                self.manual_backward(loss)
                self.optimizers().step()
                self.optimizers().zero_grad()
            return loss

    run = trainer(tmp_path, precision=precision, max_epochs=2)
    run.fit(Model(), loader())
    run.save_checkpoint(tmp_path / "end.ckpt")
    assert run.global_step == 8
    progress = torch.load(tmp_path / "end.ckpt")["treadle"]["progress"]
    assert progress["optimizer_steps"] == 8 and progress["step"] == 8


def test_a_step_that_the_scaler_leaves_out_counts_and_one_that_is_not_finite_does_not(tmp_path: Path) -> None:
    def diverges(batch: Tensor, batch_idx: int) -> Tensor:
        return batch * float("inf") if batch_idx == 1 else batch

    class Automatic(Net):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            return self.loss(diverges(batch, batch_idx))

    class ByHook(Automatic):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            optimizer.step(closure=optimizer_closure)

    class ByHand(Manual):
        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            super().training_step(diverges(batch, batch_idx), batch_idx)

    for make in (Automatic, ByHook, ByHand):
        run = trainer(tmp_path, precision="16-mixed")
        run.fit(make(), loader())
        assert run.global_step == 4, "the batch had a step, which the scaler left out"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run = trainer(tmp_path, on_nonfinite="skip")
            run.fit(make(), loader())
        assert run.global_step == 3


def test_an_optimizer_step_hook_that_does_not_step_does_not_count(tmp_path: Path) -> None:
    class EverySecond(Net):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            if batch_idx % 2:
                optimizer.step(closure=optimizer_closure)
            else:
                optimizer_closure()

    run = trainer(tmp_path)
    run.fit(EverySecond(), loader())
    assert run.global_step == 2


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_optimizers_keep_no_trace_of_a_fit(tmp_path: Path, precision: Any) -> None:
    from torch.optim.optimizer import _global_optimizer_post_hooks

    hooks = {**_global_optimizer_post_hooks}
    model = Manual()
    shared = SGD(model.parameters(), lr=0.1)
    model.configure_optimizers = lambda: setattr(model, "own", shared) or shared  # type: ignore[method-assign, func-returns-value]
    runs = [trainer(tmp_path, precision=precision) for _ in range(2)]
    for run in runs:
        run.fit(model, loader())
    assert [run.global_step for run in runs] == [4, 4]
    for other in (copy.deepcopy(shared), pickle.loads(pickle.dumps(shared)), shared):
        other.step()
    assert [run.global_step for run in runs] == [4, 4], "a step outside of fit counts nowhere"
    with pytest.raises(ZeroDivisionError):

        class Failing(Manual):
            def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
                raise ZeroDivisionError

        trainer(tmp_path, precision=precision).fit(Failing(), loader())
    assert not _global_optimizer_post_hooks.keys() - hooks.keys()


def test_a_copy_of_an_optimizer_that_is_made_in_training_is_of_its_own(tmp_path: Path) -> None:
    class Copying(Manual):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            copy.deepcopy(self.optimizers()).optimizer.step()

    run = trainer(tmp_path)
    with pytest.warns(UserWarning, match="No optimizer stepped"):
        run.fit(Copying("never"), loader())
    assert run.global_step == 0


# Nothing saved yet is not step 0


class Still(Net):
    """Learns without an optimizer: its buffer counts batches."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        self.seen += 1

    def configure_optimizers(self) -> Any:
        return None


@pytest.mark.parametrize("save_last", [True, False])
def test_a_run_without_steps_saves_each_epoch(tmp_path: Path, save_last: bool) -> None:
    saving = ModelCheckpoint(tmp_path, "{epoch}", save_last=save_last, save_top_k=-1)
    run = trainer(tmp_path, enable_checkpointing=True, callbacks=saving, max_epochs=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.fit(Still(), loader(), loader(2))
    names = sorted(path.name for path in tmp_path.glob("*.ckpt"))
    assert names == ["epoch=0.ckpt", "epoch=1.ckpt", "epoch=2.ckpt", *(["last.ckpt"] if save_last else [])]
    for epoch in range(3):
        assert torch.load(tmp_path / f"epoch={epoch}.ckpt")["state_dict"]["seen"] == 4 * (epoch + 1)
    if save_last:
        assert torch.load(tmp_path / "last.ckpt")["state_dict"]["seen"] == 12


# An epoch without a step


def test_an_epoch_of_manual_optimization_without_a_step_is_told_once(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_epochs=3, reload_dataloaders_every_n_epochs=1)
    with pytest.warns(UserWarning, match="No optimizer stepped in epoch 0, in 4 batches") as told:
        run.fit(Manual("never"), loader())
    assert len([w for w in told if "No optimizer stepped" in str(w.message)]) == 1


@pytest.mark.parametrize("at", ["training_step", "on_train_batch_end", "on_train_epoch_start", "on_train_epoch_end"])
def test_an_epoch_with_a_step_is_not_told(tmp_path: Path, at: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer(tmp_path, max_epochs=2, limit_val_batches=0).fit(Manual(at), loader())
        trainer(tmp_path, max_epochs=2, limit_val_batches=0, limit_train_batches=0).fit(Manual("never"), loader())


def test_a_module_without_optimizers_is_not_told(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer(tmp_path).fit(Manual("never", "not returned"), loader())
    assert not [w for w in told if "No optimizer stepped" in str(w.message)]
