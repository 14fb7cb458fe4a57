"""What fit computes, against the loop written out by hand.

Tests of ``treadle.loops.fit``, ``treadle.loops.epoch``, ``treadle.loops.stopping``, ``treadle.loops.schedulers``,
``treadle.loops.step.automatic``, ``treadle.loops.step.gradients``, ``treadle.loops.step.preparation``,
``treadle.loops.step.backward``, ``treadle.loops.step.clipping``, ``treadle.loops.step.manual``,
``treadle.module.steps.arguments``, ``treadle.trainer.trainer``, ``treadle.trainer.session``,
``treadle.trainer.fitting``, ``treadle.trainer.assembly``, ``treadle.data.find``, ``treadle.data.transfer``,
``treadle.run.run``.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.trainer.models import Net, Samples, loader, trainer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

import treadle as L
from treadle_fabric import CSVLogger, MisconfigurationException, TensorBoardLogger


def by_hand(batches: Any, epochs: int = 1, accumulate: int = 1, clip: float | None = None, value: bool = False) -> Net:
    """The same training, as a plain loop."""
    model = Net()
    optimizer = model.configure_optimizers()
    for _ in range(epochs):
        items = list(batches)
        for start in range(0, len(items), accumulate):
            window = items[start : start + accumulate]
            optimizer.zero_grad()
            for batch in window:
                loss = model.loss(batch)
                (loss / len(window) if len(window) > 1 else loss).backward()
            if clip is not None and value:
                torch.nn.utils.clip_grad_value_(model.parameters(), clip)
            elif clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
    return model


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


class Stream(IterableDataset[Tensor]):
    """Samples without a length."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __iter__(self) -> Iterator[Tensor]:
        yield from (Samples(self.n)[i] for i in range(self.n))


@pytest.mark.parametrize(
    ("trainer_args", "hand"),
    [
        ({}, {}),
        ({"max_epochs": 3}, {"epochs": 3}),
        ({"accumulate_grad_batches": 2}, {"accumulate": 2}),
        ({"accumulate_grad_batches": 3}, {"accumulate": 3}),
        ({"gradient_clip_val": 0.1}, {"clip": 0.1}),
        ({"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}, {"clip": 0.1, "value": True}),
        (
            {"accumulate_grad_batches": 4, "gradient_clip_val": 0.1, "max_epochs": 2},
            {"accumulate": 4, "clip": 0.1, "epochs": 2},
        ),
    ],
)  # fmt: skip
def test_the_weights_are_those_of_the_loop_by_hand(tmp_path: Path, trainer_args: Any, hand: Any) -> None:
    model = Net()
    trainer(tmp_path, **trainer_args).fit(model, loader(14))
    assert same(model, by_hand(loader(14), **hand))


def test_the_tail_of_an_epoch_of_unknown_length_is_normalized_by_what_was_accumulated(tmp_path: Path) -> None:
    stream = DataLoader(Stream(14), batch_size=2)
    model = Net()
    run = trainer(tmp_path, accumulate_grad_batches=4)
    run.fit(model, stream)
    assert run.num_training_batches == math.inf
    assert run.global_step == 2
    for mine, theirs in zip(model.parameters(), by_hand(loader(14), accumulate=4).parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_hook_that_is_overridden_without_change_changes_nothing(tmp_path: Path) -> None:
    class Overriding(Net):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

        def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

        def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
            super().backward(loss, *args, **kwargs)

        def configure_gradient_clipping(
            self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
        ) -> None:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    model = Overriding()
    trainer(tmp_path, accumulate_grad_batches=3, gradient_clip_val=0.1).fit(model, loader(14))
    assert same(model, by_hand(loader(14), accumulate=3, clip=0.1))


def test_lbfgs_evaluates_the_loss_several_times_a_step(tmp_path: Path) -> None:
    class Quasi(Net):
        evaluations = 0

        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            self.evaluations += 1
            return self.loss(batch)

        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=4)

    model, plain = Quasi(), Net()
    trainer(tmp_path).fit(model, loader(4))
    optimizer = torch.optim.LBFGS(plain.parameters(), lr=0.1, max_iter=4)
    for batch in loader(4):

        def closure(batch: Tensor = batch) -> Tensor:
            optimizer.zero_grad()
            loss = plain.loss(batch)
            loss.backward()
            return loss

        optimizer.step(closure)
    assert model.evaluations > 2
    assert same(model, plain)


def test_lbfgs_evaluates_all_batches_of_an_accumulation(tmp_path: Path) -> None:
    class Quasi(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=4)

    model, plain = Quasi(), Net()
    run = trainer(tmp_path, accumulate_grad_batches=2)
    run.fit(model, loader(10))  # the third accumulation has one batch
    optimizer, batches = torch.optim.LBFGS(plain.parameters(), lr=0.1, max_iter=4), [*loader(10)]
    for window in (batches[:2], batches[2:4], batches[4:]):

        def closure(window: list[Tensor] = window) -> Tensor:
            optimizer.zero_grad()
            total = torch.zeros(())
            for batch in window:
                loss = plain.loss(batch) / len(window)
                loss.backward()
                total = total + loss.detach()
            return total

        optimizer.step(closure)
    assert run.global_step == 3
    assert same(model, plain)


@pytest.mark.parametrize(("saved_after", "goes_on"), [(1, False), (2, True), (3, False), (5, True)])
def test_an_accumulation_of_lbfgs_is_not_resumed_in_the_middle(tmp_path: Path, saved_after: int, goes_on: bool) -> None:
    """A checkpoint has no batches, and an evaluation without the earlier ones would be of another loss."""

    class Quasi(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=4)

    class Saving(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx + 1 == saved_after and not trainer.current_epoch:
                trainer.save_checkpoint(tmp_path / "mid.ckpt")

    def fit(model: Net, *callbacks: L.Callback, path: Path | None = None) -> Net:
        run = trainer(tmp_path, accumulate_grad_batches=2, max_epochs=2, callbacks=[*callbacks])
        run.fit(model, loader(10), ckpt_path=path)
        return model

    whole = fit(Quasi(), Saving())
    if goes_on:
        assert same(fit(Quasi(), path=tmp_path / "mid.ckpt"), whole)
        return
    told = rf"at batch {saved_after} of epoch 0, after 1 batch\(es\) of an accumulation: LBFGS .* Resume from"
    with pytest.raises(MisconfigurationException, match=told):
        fit(Quasi(), path=tmp_path / "mid.ckpt")


@pytest.mark.parametrize(
    ("args", "step", "epoch"),
    [
        ({"max_epochs": 2}, 8, 2),
        ({"max_epochs": 2, "max_steps": 3}, 3, 1),
        ({"max_epochs": -1, "max_steps": 6}, 6, 2),
        ({"max_epochs": 0}, 0, 0),
        ({"max_epochs": 1, "limit_train_batches": 3}, 3, 1),
        ({"max_epochs": 1, "limit_train_batches": 0.5}, 2, 1),
        ({"max_epochs": 5, "limit_train_batches": 0}, 0, 0),
        ({"fast_dev_run": True}, 1, 1),
        ({"fast_dev_run": 3}, 3, 1),
        ({"overfit_batches": 2, "max_epochs": 3}, 6, 3),
    ],
)
def test_durations_and_limits(tmp_path: Path, args: Any, step: int, epoch: int) -> None:
    run = trainer(tmp_path, **args)
    run.fit(Net(), loader(8))
    assert (run.global_step, run.current_epoch) == (step, epoch)


def test_a_trial_run_takes_what_a_module_does_with_its_logger_and_writes_nothing(tmp_path: Path) -> None:
    class Draws(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.logger.experiment.add_scalar("own", 1.0, batch_idx)
            self.logger.log_metrics({"own": 1.0}, step=batch_idx)
            self.loggers[0].log_text("said", "words", batch_idx)
            return super().training_step(batch, batch_idx)

    for logger in (True, CSVLogger(tmp_path), [CSVLogger(tmp_path), TensorBoardLogger(tmp_path)]):
        run = trainer(tmp_path, fast_dev_run=True, logger=logger)
        run.fit(Draws(), loader(8))
        assert len(run.loggers) == 1
    assert trainer(tmp_path, fast_dev_run=True, logger=False).loggers == []
    with pytest.raises(MisconfigurationException, match="pass a Logger"):
        trainer(tmp_path, fast_dev_run=True, logger="csv")
    assert os.listdir(tmp_path) == []


def test_should_stop_is_heeded_but_not_before_the_minimum(tmp_path: Path) -> None:
    class Stopping(Net):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.trainer.should_stop = True

    for args, steps in (({}, 1), ({"min_steps": 3}, 3), ({"min_epochs": 2}, 8), ({"min_epochs": 1, "min_steps": 6}, 6)):
        run = trainer(tmp_path, max_epochs=9, **args)
        run.fit(Stopping(), loader(8))
        assert run.global_step == steps, args


def test_max_time_stops(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_epochs=-1, max_time={"seconds": 1})
    run.fit(Net(), loader(8))
    assert run.global_step > 4


def test_validation_runs_when_it_should_and_restores_every_mode(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    class Frozen(Net):
        def __init__(self) -> None:
            super().__init__()
            self.frozen = torch.nn.Dropout().eval()

        def on_validation_start(self) -> None:
            assert not self.training
            assert not torch.is_grad_enabled()
            if not self.trainer.sanity_checking:
                seen.append((self.current_epoch, self.global_step))

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            assert self.training and torch.is_grad_enabled()
            if self.global_step:
                assert self.frozen.training is (self.global_step == 0)

        def on_train_start(self) -> None:
            self.frozen.eval()

    with pytest.warns(UserWarning, match=r"Found 1 module\(s\) in eval mode at the start of training.*: frozen"):
        trainer(tmp_path, max_epochs=2, val_check_interval=2).fit(Frozen(), loader(10), loader(4))
    assert seen == [(0, 2), (0, 4), (1, 7), (1, 9)]


@pytest.mark.alone  # the two batches before the third have to take less than a second
def test_validation_by_time(tmp_path: Path) -> None:
    seen: list[int] = []

    class Timed(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 2:
                time.sleep(1.1)  # longer than the shortest interval that the text form can give
            return self.loss(batch)

        def on_validation_start(self) -> None:
            seen.append(self.global_step)

    args = {"val_check_interval": "00:00:00:01", "check_val_every_n_epoch": None, "num_sanity_val_steps": 0}
    trainer(tmp_path).fit(Net(), loader(4))  # what is imported at first use takes no time below
    trainer(tmp_path, **args).fit(Timed(), loader(8), loader(4))
    assert seen == [3]


@pytest.mark.alone  # an epoch has to take less than the interval
def test_the_time_between_validations_goes_on_where_loaders_are_made_anew(tmp_path: Path) -> None:
    epochs: list[int] = []

    class Timed(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            time.sleep(0.02)
            return self.loss(batch)

        def on_validation_start(self) -> None:
            epochs.append(self.current_epoch)

    args = {"val_check_interval": timedelta(seconds=0.2), "check_val_every_n_epoch": None, "num_sanity_val_steps": 0}
    trainer(tmp_path).fit(Net(), loader(4))  # what is imported at first use takes no time below
    trainer(tmp_path, max_epochs=6, reload_dataloaders_every_n_epochs=1, **args).fit(Timed(), loader(8), loader(4))
    assert epochs and 0 not in epochs  # each takes half as long


@pytest.mark.parametrize("batches", [0, 2.5, True])
def test_an_accumulation_that_is_none_is_refused_when_a_callback_sets_it(tmp_path: Path, batches: Any) -> None:
    with pytest.raises(L.MisconfigurationException, match="accumulate_grad_batches"):
        trainer(tmp_path).accumulate_grad_batches = batches


def test_the_shuffle_is_off_when_overfitting(tmp_path: Path) -> None:
    seen: list[float] = []

    class Watching(Net):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            seen.extend(batch[:, 0].tolist())
            return self.loss(batch)

    with pytest.warns(UserWarning, match="requested to overfit but enabled train dataloader shuffling"):
        trainer(tmp_path, overfit_batches=2, max_epochs=2).fit(Watching(), loader(8, shuffle=True))
    assert seen == [0, 1, 2, 3] * 2


def test_several_training_loaders_come_together(tmp_path: Path) -> None:
    seen: list[Any] = []

    class Both(Net):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
            seen.append((len(batch["a"]), len(batch["b"])))
            return self.loss(batch["a"]) + self.loss(batch["b"])

    run = trainer(tmp_path)
    run.fit(Both(), {"a": loader(8), "b": loader(3, batch_size=1)})
    assert run.num_training_batches == 4
    assert seen == [(2, 1)] * 4


def test_a_step_that_asks_for_the_iterator_gets_it(tmp_path: Path) -> None:
    seen: list[Any] = []

    class Drawing(Net):
        def training_step(self, dataloader_iter: Iterator[Any]) -> Any:
            batch, batch_idx, dataloader_idx = next(dataloader_iter)
            seen.append((batch_idx, dataloader_idx, batch[0, 0].item()))
            return self.loss(batch)

    run = trainer(tmp_path)
    run.fit(Drawing(), loader(8))
    assert seen == [(0, 0, 0.0), (1, 0, 2.0), (2, 0, 4.0), (3, 0, 6.0)]
    assert run.global_step == 4


def test_a_step_that_asks_for_the_iterator_knows_the_last_batch(tmp_path: Path) -> None:
    stepped: list[int] = []
    validated: list[int] = []

    class Drawing(Net):
        def training_step(self, dataloader_iter: Iterator[Any]) -> Any:
            return self.loss(next(dataloader_iter)[0])

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            stepped.append(self.trainer.fit_progress.batch)

        def on_validation_start(self) -> None:
            validated.append(self.global_step)

        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]

    run = trainer(tmp_path, max_epochs=2, accumulate_grad_batches=3, num_sanity_val_steps=0)
    run.fit(Drawing(lr=1.0), loader(8), loader(4))
    assert stepped == [2, 3, 2, 3]  # the fourth batch of an epoch is a window of its own
    assert validated == [2, 4]
    assert run.optimizers[0].param_groups[0]["lr"] == 0.25


def test_the_sanity_check_leaves_training_as_it_is(tmp_path: Path) -> None:
    drawn: list[list[float]] = []

    class Draws(Net):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            drawn[-1].append(torch.rand(()).item())
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> Any:
            torch.rand(())

    for steps in (0, 2):
        drawn.append([])
        torch.manual_seed(1)
        trainer(tmp_path, num_sanity_val_steps=steps, limit_val_batches=2).fit(Draws(), loader(8), loader(8))
    assert len(drawn[0]) == 4
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_batch_without_loss_is_skipped_under_a_scaler(tmp_path: Path, clip: float | None) -> None:
    class Skips(Net):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            return None if batch_idx % 2 == 0 else super().training_step(batch, batch_idx)

    def weights(precision: str) -> Tensor:
        model = Skips()
        trainer(tmp_path, precision=precision, gradient_clip_val=clip).fit(model, loader(8))
        return model.layer.weight.detach()

    torch.testing.assert_close(weights("16-mixed"), weights("32-true"), rtol=1e-3, atol=1e-3)


def test_after_fit_the_gradients_are_the_users_again(tmp_path: Path) -> None:
    model = Net()
    trainer(tmp_path, precision="16-mixed").fit(model, loader(8))
    model.zero_grad()
    loss = model.loss(torch.ones(2, 4))
    expected = torch.autograd.grad(loss, model.layer.weight, retain_graph=True)
    loss.backward()
    assert torch.equal(model.layer.weight.grad, expected[0])  # not scaled, not refused


def test_a_step_may_take_the_batch_alone(tmp_path: Path) -> None:
    class Alone(Net):
        def training_step(self, batch: Tensor) -> Any:  # type: ignore[override]
            return self.loss(batch)

    model = Alone()
    trainer(tmp_path).fit(model, loader(14))
    assert same(model, by_hand(loader(14)))


def test_manual_optimization_with_two_optimizers_counts_batches_and_toggles(tmp_path: Path) -> None:
    class Two(Net):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            first, second = self.optimizers()
            with self.toggled_optimizer(first):
                assert not self.layer.bias.requires_grad
                first.zero_grad()
                self.manual_backward(self.loss(batch))
                self.clip_gradients(first, 0.1, "norm")
                first.step()
            assert self.layer.bias.requires_grad
            if batch_idx % 2:
                second.zero_grad()
                self.manual_backward(self.loss(batch))
                second.step()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([self.layer.weight], 0.1), torch.optim.SGD([self.layer.bias], 0.1)

    run = trainer(tmp_path)
    model = Two()
    run.fit(model, loader(8))
    assert run.global_step == 4
    assert not torch.equal(model.layer.bias, Net().layer.bias)


def test_loaders_are_asked_for_anew_every_n_epochs(tmp_path: Path) -> None:
    asked: list[str] = []

    class Data(L.LightningDataModule):
        def train_dataloader(self) -> Any:
            asked.append("train")
            return loader(4)

        def val_dataloader(self) -> Any:
            asked.append("val")
            return loader(2)

    trainer(tmp_path, max_epochs=4, reload_dataloaders_every_n_epochs=2).fit(Net(), datamodule=Data())
    assert asked == ["val", "train", "train", "val"], "validation loaders when the epoch validates"


def test_an_error_is_raised_unchanged_after_everybody_heard_of_it(tmp_path: Path) -> None:
    heard: list[Any] = []
    error = RuntimeError("broken batch")

    class Failing(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 2:
                raise error
            return super().training_step(batch, batch_idx)

    class Listening(L.Callback):
        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            heard.append((exception, trainer.global_step))

    class Data(L.LightningDataModule):
        def train_dataloader(self) -> Any:
            return loader(8)

        def on_exception(self, exception: BaseException) -> None:
            heard.append(exception)

    class Logger(CSVLogger):
        def finalize(self, status: str) -> None:
            heard.append(status)
            super().finalize(status)

    run = trainer(tmp_path, callbacks=Listening(), logger=Logger(tmp_path))
    with pytest.raises(RuntimeError) as caught:
        run.fit(Failing(), datamodule=Data())
    assert caught.value is error
    assert heard == [(error, 2), error, "failed"]
    assert run.interrupted
    run.fit(Net(), loader(4))  # and it can go on
    assert run.state.status == "finished"


def test_an_interrupt_ends_the_run_with_its_state(tmp_path: Path) -> None:
    heard: list[type] = []

    class Interrupted(Net):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                os.kill(os.getpid(), signal.SIGINT)

        def on_train_end(self) -> None:
            raise AssertionError("the end was not reached")

    class Listening(L.Callback):
        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            heard.append(type(exception))

    run = trainer(tmp_path, callbacks=Listening(), max_epochs=3, logger=True)
    with pytest.raises(SystemExit) as ended:
        run.fit(Interrupted(), loader(8))
    assert ended.value.code == 1
    assert run.interrupted
    assert run.global_step == 2
    assert heard == [KeyboardInterrupt]
    run.save_checkpoint(tmp_path / "state.ckpt")
    assert torch.load(tmp_path / "state.ckpt", weights_only=True)["global_step"] == 2


@pytest.mark.parametrize("stage", ["fit", "validate", "predict", "stream"])
@pytest.mark.parametrize("hook", ["configure_callbacks", "prepare_data", "setup", "configure_model", "teardown"])
@pytest.mark.parametrize("prompt", [False, True])
def test_an_interrupt_around_the_batches_ends_the_run_in_good_order(
    tmp_path: Path, stage: str, hook: str, prompt: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends the program, too, but for one that a person types."""
    reached: list[str] = []

    def interrupt(*args: Any, **kwargs: Any) -> list[Any]:
        os.kill(os.getpid(), signal.SIGINT)
        return []

    class Marking(L.Callback):
        def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
            reached.append("the end")

    module = type("Interrupted", (Net,), {hook: interrupt})()
    run = trainer(tmp_path, callbacks=Marking())
    if prompt:
        monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    with nullcontext() if prompt else pytest.raises(SystemExit):
        if stage == "fit":
            assert run.fit(module, loader(8)) is None
        elif stage == "validate":
            assert bool(run.validate(module, loader(8), verbose=False)) == (hook == "teardown")
        elif stage == "predict":
            assert bool(run.predict(module, loader(8))) == (hook == "teardown")
        else:
            list(run.predict(module, loader(8), return_predictions="stream"))
    assert run.interrupted
    assert reached == ["the end"] * (hook == "teardown")
    run.fit(Net(), loader(4))  # and the trainer can be used again
    assert run.state.status == "finished"


def test_an_error_in_on_exception_does_not_hide_the_first(tmp_path: Path) -> None:
    told: list[str] = []

    class Fails(L.Callback):
        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            raise KeyError("the second")

    class Listens(L.Callback):
        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            told.append(str(exception))

    class Logs(CSVLogger):
        def finalize(self, status: str) -> None:
            told.append(status)

    class Bad(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise ValueError("the first")

    run = trainer(tmp_path, callbacks=[Fails(), Listens()], logger=Logs(tmp_path))
    with pytest.warns(UserWarning, match="the second"), pytest.raises(ValueError, match="the first"):
        run.fit(Bad(), loader(4))
    assert told == ["the first", "failed"]


def test_sigterm_after_the_last_batch_is_not_lost(tmp_path: Path) -> None:
    class Terminated(Net):
        def on_train_end(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    run = trainer(tmp_path)
    with pytest.raises(SystemExit) as caught:
        run.fit(Terminated(), loader(4))
    assert caught.value.code == 143
    assert run.received_sigterm


def test_sigterm_is_noted_in_fit_only(tmp_path: Path) -> None:
    found: list[Any] = []

    class Looks(Net):
        def on_test_start(self) -> None:
            found.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    trainer(tmp_path).test(Looks(), loader(4), verbose=False)
    assert found == [before]


def test_sigterm_ends_the_run_between_two_batches_with_status_143(tmp_path: Path) -> None:
    finished: list[int] = []

    class Terminated(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().training_step(batch, batch_idx)

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            finished.append(batch_idx)

    run = trainer(tmp_path, max_epochs=3)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        run.fit(Terminated(), loader(8))
    assert caught.value.code == 143
    assert finished == [0, 1]
    assert run.received_sigterm
    assert signal.getsignal(signal.SIGTERM) is before


def test_anomalies_are_located(tmp_path: Path) -> None:
    class Bad(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return (self(batch) * 0.0 - 1.0).sqrt().sum()

    with pytest.warns(UserWarning, match="Error detected"), pytest.raises(RuntimeError, match="nan values"):
        trainer(tmp_path, detect_anomaly=True).fit(Bad(), loader(4))
    assert not torch.is_anomaly_enabled()


def test_deterministic_is_set_for_the_run_only(tmp_path: Path) -> None:
    seen: list[bool] = []

    class Watching(Net):
        def on_train_start(self) -> None:
            seen.append(torch.are_deterministic_algorithms_enabled())

    trainer(tmp_path, deterministic=True).fit(Watching(), loader(4))
    assert seen == [True]
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("inference_mode", [True, False])
def test_evaluation_runs_under_inference_mode_or_no_grad(tmp_path: Path, inference_mode: bool) -> None:
    seen: list[tuple[bool, bool]] = []

    class Watching(Net):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            seen.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))

    trainer(tmp_path, inference_mode=inference_mode).validate(Watching(), loader(2), verbose=False)
    assert seen == [(inference_mode, False)]


def test_a_model_that_was_trained_goes_on_training(tmp_path: Path) -> None:
    model = Net()
    trainer(tmp_path).fit(model, loader(14))
    trainer(tmp_path).fit(model, loader(14))
    assert same(model, by_hand(loader(14), epochs=2))


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true", "16-true", "bf16-mixed", "16-mixed"])
def test_every_precision_trains(tmp_path: Path, precision: str) -> None:
    model = Net()
    seen: list[torch.dtype] = []

    class Watching(L.Callback):
        def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
            seen.append(pl_module(torch.ones(2, 4, dtype=pl_module.dtype)).dtype)

    trainer(tmp_path, precision=precision, callbacks=Watching(), gradient_clip_val=1.0).fit(model, loader(8))
    weight = {"64-true": torch.float64, "bf16-true": torch.bfloat16, "16-true": torch.float16}
    assert model.layer.weight.dtype == weight.get(precision, torch.float32)
    assert not torch.equal(model.layer.weight.float(), Net().layer.weight)
