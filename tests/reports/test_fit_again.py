"""A second ``fit`` on one trainer: with the same module it goes on, with another one it begins anew.

Tests of ``treadle.trainer.continuation``, ``treadle.trainer.fitting``, ``treadle.trainer.view``,
``treadle.loops.fit``, ``treadle.loops.epoch``, ``treadle_fabric.loggers.run_folder``.
"""

from __future__ import annotations

import csv
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.processes import run_in_ranks
from tests.trainer.models import Net, loader, trainer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

import treadle as L
from treadle.callbacks import EarlyStopping, ModelCheckpoint
from treadle.loggers import CSVLogger, TensorBoardLogger


class Noting(Net):
    """Notes epoch, batch, learning rate and first sample of every batch, and has dropout and a momentum-free SGD."""

    def __init__(self) -> None:
        super().__init__(lr=0.1)
        self.seen: list[tuple[int, int, int, float]] = []
        self.rates: list[float] = []
        self.events: list[str] = []

    def loss(self, batch: Tensor) -> Tensor:
        return torch.nn.functional.dropout(self(batch / 10), 0.5, training=True).square().mean()

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.seen.append((self.current_epoch, batch_idx, self.global_step, float(batch[0, 0])))
        self.rates.append(self.optimizers().param_groups[0]["lr"])
        return super().training_step(batch, batch_idx)

    def on_train_epoch_start(self) -> None:
        self.events.append(f"start {self.current_epoch}")

    def on_train_epoch_end(self) -> None:
        self.events.append(f"end {self.current_epoch}")

    def configure_optimizers(self) -> Any:
        self.events.append("configure")
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

    def take(self) -> list[tuple[int, int, int, float]]:
        seen, self.seen = self.seen, []
        return seen


def shuffled(n: int = 8) -> DataLoader[Tensor]:
    return loader(n, shuffle=True)


def weights(module: torch.nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def rows(logger: CSVLogger) -> list[dict[str, str]]:
    with open(Path(logger.log_dir) / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_counters_rates_callbacks_and_rows_go_on(tmp_path: Path) -> None:
    """The numbers are those of Lightning 2.6.6 with the same module."""
    module, logger = Noting(), CSVLogger(tmp_path)
    saving = ModelCheckpoint(monitor="val_loss", save_top_k=2, save_last=True)
    run = trainer(
        tmp_path, max_epochs=2, logger=logger, callbacks=saving, enable_checkpointing=True, log_every_n_steps=2
    )
    run.fit(module, loader(8), loader(2))
    assert (run.current_epoch, run.global_step) == (2, 8)
    module.take(), module.rates.clear(), module.events.clear()
    best = dict(saving.best_k_models)
    run.should_stop = True  # what an earlier stop left
    run.max_epochs = 3
    run.fit(module, loader(8), loader(2))
    assert module.take() == [(2, i, 8 + i, 2.0 * i) for i in range(4)]
    assert module.rates == [0.1] * 4  # the optimizer and its scheduler are new
    assert module.events == ["configure", "start 2", "end 2"]
    assert (run.current_epoch, run.global_step, run.should_stop) == (3, 12, False)
    assert [int(row["step"]) for row in rows(logger)] == [1, 3, 5, 7, 9, 11]
    assert logger.version == 0
    assert len(saving.best_k_models) == 2
    assert set(best) & set(saving.best_k_models)  # the ranking went on
    newest = torch.load(saving.last_model_path, weights_only=True)
    assert (newest["epoch"], newest["global_step"]) == (2, 12)


@pytest.mark.parametrize("evaluated", [False, True])
def test_two_fits_are_one_long_fit(tmp_path: Path, evaluated: bool) -> None:
    torch.manual_seed(5)
    whole = Noting()
    trainer(tmp_path, max_epochs=4).fit(whole, shuffled(), loader(4))
    torch.manual_seed(5)
    module = Noting()
    run = trainer(tmp_path, max_epochs=1)
    for epochs in range(1, 5):
        run.fit_loop.max_epochs = epochs
        run.fit(module, shuffled(), loader(4))
        if evaluated:  # draws random numbers of its own
            run.validate(module, shuffled(), verbose=False)
            run.test(Noting(), shuffled(), verbose=False)
    assert module.seen == whole.seen
    # Each fit begins with a new scheduler, so the weights differ; a test below compares them without one.
    assert module.rates == [0.1] * 16


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("how", ["max_steps", "should_stop", "interrupt", "error"])
def test_a_stop_in_the_middle_of_an_epoch_goes_on_at_the_next_batch(tmp_path: Path, how: str, accumulate: int) -> None:
    class Plain(Noting):
        stop_at: int | None = None

        def on_train_batch_end(self, outputs: Any, batch: Tensor, batch_idx: int) -> None:
            if self.trainer.fit_progress.batches == self.stop_at:
                self.stop_at = None
                if how == "should_stop":
                    self.trainer.should_stop = True
                elif how == "interrupt":
                    os.kill(os.getpid(), signal.SIGINT)
                elif how == "error":
                    raise RuntimeError("boom")

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    torch.manual_seed(5)
    whole = Plain()
    by_epoch: list[float] = []

    class Means(L.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            by_epoch.append(float(trainer.callback_metrics["mean"]))

    def logging(module: Plain) -> Plain:
        step = module.training_step

        def training_step(batch: Tensor, batch_idx: int) -> Any:
            loss = step(batch, batch_idx)
            module.log("mean", loss, on_step=False, on_epoch=True)
            return loss

        module.training_step = training_step  # type: ignore[method-assign]
        return module

    settings = {"max_epochs": 3, "accumulate_grad_batches": accumulate}
    trainer(tmp_path, callbacks=Means(), **settings).fit(logging(whole), shuffled(16))
    expected, by_epoch[:] = list(by_epoch), []
    torch.manual_seed(5)
    module = logging(Plain())
    run = trainer(tmp_path, callbacks=Means(), **settings)
    if how == "max_steps":
        run.max_steps = 4
    else:
        module.stop_at = 11
    try:
        run.fit(module, shuffled(16))
    except RuntimeError as error:
        assert str(error) == "boom"
    except SystemExit:
        assert how == "interrupt"
    run.validate(module, shuffled(), verbose=False)  # changes nothing
    run.max_steps = -1
    run.fit(module, shuffled(16))
    assert module.seen == whole.seen
    assert (run.current_epoch, run.global_step) == (3, trainer_steps(accumulate))
    for one, other in zip(weights(module), weights(whole)):
        assert torch.equal(one, other)
    assert by_epoch[-1] == expected[-1]


def trainer_steps(accumulate: int) -> int:
    return 3 * -(-8 // accumulate)


def test_random_numbers_that_the_program_seeds_in_between_are_used(tmp_path: Path) -> None:
    def orders(seed: int | None) -> list[float]:
        torch.manual_seed(1)
        module, run = Noting(), trainer(tmp_path)
        run.fit(module, shuffled(32))
        module.take()
        if seed is not None:
            torch.manual_seed(seed)
        run.max_epochs = 2
        run.fit(module, shuffled(32))
        return [first for *_, first in module.take()]

    assert orders(2) == orders(2)
    assert orders(2) != orders(3)
    assert orders(None) == orders(None)


def test_nothing_left_to_do_is_told(tmp_path: Path) -> None:
    module, run = Noting(), trainer(tmp_path)
    run.fit(module, loader())
    before = weights(module)
    with pytest.warns(UserWarning, match=r"nothing is left to do.*raise `trainer\.max_epochs`.*make a new Trainer"):
        run.fit(module, loader())
    assert run.global_step == 4
    assert all(map(torch.equal, before, weights(module)))
    run.max_epochs = 2
    run.fit(module, loader())
    assert run.global_step == 8


def test_a_checkpoint_wins(tmp_path: Path) -> None:
    module, run = Noting(), trainer(tmp_path, max_epochs=2)
    run.fit(module, loader())
    path = tmp_path / "two.ckpt"
    run.save_checkpoint(path)
    run.max_epochs = 5
    run.fit(module, loader())
    assert run.current_epoch == 5
    module.take()
    run.max_epochs = 3
    run.fit(module, loader(), ckpt_path=path)
    assert {epoch for epoch, *_ in module.take()} == {2}
    assert (run.current_epoch, run.global_step) == (3, 12)


@pytest.mark.parametrize(
    ("steps", "accumulate", "evaluate"),
    [(3, 1, ""), (4, 1, ""), (6, 1, ""), (3, 2, ""), (4, 2, ""), (6, 2, ""), (3, 2, "test"), (8, 1, "predict")],
)
def test_a_checkpoint_written_after_a_fit_goes_on_where_the_fit_stopped(
    tmp_path: Path, steps: int, accumulate: int, evaluate: str
) -> None:
    def fit(max_steps: int, ckpt_path: Path | None = None) -> tuple[Noting, Any]:
        L.seed_everything(4, verbose=False)
        model = Noting()
        run = trainer(tmp_path, max_epochs=9, max_steps=max_steps, accumulate_grad_batches=accumulate)
        run.fit(model, shuffled(14), ckpt_path=ckpt_path)
        return model, run

    long, _ = fit(10)
    short, run = fit(steps)
    if evaluate:
        getattr(run, evaluate)(short, loader(4))
        assert len(run.optimizers) == len(run.lr_scheduler_configs) == 1
    run.save_checkpoint(tmp_path / "after.ckpt")
    resumed, _ = fit(10, tmp_path / "after.ckpt")
    assert short.seen + resumed.seen == long.seen
    assert all(map(torch.equal, weights(resumed), weights(long)))


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_a_checkpoint_that_a_hook_of_an_evaluation_saves_is_of_the_fit(tmp_path: Path, stage: str) -> None:
    def save(self: L.Callback, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.save_checkpoint(tmp_path / "hook.ckpt")

    hook_of = {"validate": "on_validation_end", "test": "on_test_end", "predict": "on_predict_end"}
    Saves = type("Saves", (L.Callback,), {hook_of[stage]: save})
    run = trainer(tmp_path, max_epochs=9, max_steps=3, callbacks=[Saves()])
    run.fit(module := Noting(), loader())
    run.save_checkpoint(tmp_path / "before.ckpt")
    getattr(run, stage)(module, loader(4))
    before, hook = (torch.load(tmp_path / f"{name}.ckpt") for name in ("before", "hook"))
    assert hook["optimizer_states"] == before["optimizer_states"] != []
    assert hook["treadle"]["progress"] == before["treadle"]["progress"]
    assert (
        hook["treadle"]["changes"]["training"] == before["treadle"]["changes"]["training"] == {"": True, "layer": True}
    )


def test_a_checkpoint_of_another_module_that_was_evaluated_has_no_optimizers(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_epochs=1)
    run.fit(Noting(), loader())
    run.validate(other := Noting(), loader(4))
    run.save_checkpoint(tmp_path / "other.ckpt")
    saved = torch.load(tmp_path / "other.ckpt")
    assert saved["optimizer_states"] == run.optimizers == []
    assert torch.equal(saved["state_dict"]["layer.weight"], other.layer.weight)


def test_auto_resume_wins(tmp_path: Path) -> None:
    module = Noting()
    run = trainer(tmp_path, auto_resume=True, enable_checkpointing=True)
    run.fit(module, loader())
    newest = run.checkpoint_callback.best_model_path
    run.max_epochs = 2
    run.fit(module, loader())
    assert run.ckpt_path == newest
    assert run.global_step == 8


def test_cross_validation_on_one_trainer(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    saving, stopping = ModelCheckpoint(monitor="val_loss"), EarlyStopping("val_loss", patience=1, min_delta=10)
    run = trainer(
        tmp_path, max_epochs=5, logger=[logger, TensorBoardLogger(tmp_path / "board")],
        callbacks=[saving, stopping], enable_checkpointing=True, log_every_n_steps=1,
    )  # fmt: skip
    alone: list[tuple[list[Any], dict[str, Tensor]]] = []
    kept = []
    for fold in range(3):
        module = Noting()
        torch.manual_seed(fold)
        run.fit(module, shuffled(), loader(4))
        kept.append((module, run.global_step, dict(saving.best_k_models), logger.version, stopping.stopped_epoch))
        assert len(rows(logger)) == 8
        other = Noting()
        torch.manual_seed(fold)
        trainer(tmp_path, max_epochs=5, callbacks=EarlyStopping("val_loss", patience=1, min_delta=10)).fit(
            other, shuffled(), loader(4)
        )
        alone.append((other.seen, other.state_dict()))
    assert [version for *_, version, _ in kept] == [0, 1, 2]
    assert [stopped for *_, stopped in kept] == [1, 1, 1]  # each fold was patient from its beginning
    for fold, ((module, step, best, version, _), (seen, state)) in enumerate(zip(kept, alone)):
        assert step == 8, fold
        assert module.seen == seen
        assert all(torch.equal(state[name], value) for name, value in module.state_dict().items())
        assert len(best) == 1
        path = Path(next(iter(best)))
        assert path.exists()
        assert f"version_{version}" in path.parts
    assert sorted(p.name for p in (tmp_path / "board" / "lightning_logs").iterdir()) == [
        "version_0",
        "version_1",
        "version_2",
    ]


def test_a_version_that_the_user_named_stays(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, version="mine")
    run = trainer(tmp_path, logger=logger, log_every_n_steps=1)
    run.fit(Noting(), loader())
    with pytest.warns(UserWarning, match="of an earlier run in it is now called"):
        run.fit(Noting(), loader())
    assert logger.version == "mine"


@pytest.mark.parametrize("name", ["max_epochs", "max_steps", "min_epochs", "min_steps"])
def test_bounds_are_checked_when_they_are_set(tmp_path: Path, name: str) -> None:
    run = trainer(tmp_path, max_epochs=4, max_steps=40)
    for owner in (run, run.fit_loop):
        for wrong in (1.5, "3", True, -2):
            with pytest.raises(ValueError, match=name):
                setattr(owner, name, wrong)
        setattr(owner, name, 3)
        assert getattr(run, name) == getattr(run.fit_loop, name) == 3
        setattr(owner, name, 2)
    with pytest.warns(UserWarning, match="min_epochs=9 is more than max_epochs"):
        run.min_epochs = 9


@pytest.mark.parametrize("name", ["current_epoch", "batch_idx", "batch_progress", "max_epoch"])
def test_what_the_loop_view_cannot_set_is_not_lost_without_a_word(tmp_path: Path, name: str) -> None:
    run = trainer(tmp_path)
    for owner in (run.fit_loop, run.fit_loop.epoch_loop):
        with pytest.raises(AttributeError):
            setattr(owner, name, 3)


def test_the_loop_view_counts_as_lightning_does(tmp_path: Path) -> None:
    heard: list[Any] = []

    class Looking(L.Callback):
        def look(self, hook: str, trainer: Any) -> None:
            loop = trainer.fit_loop
            batches, epochs = loop.epoch_loop.batch_progress, loop.epoch_progress
            heard.append(
                (hook, tuple(epochs.current), tuple(batches.current), batches.total.ready, batches.is_last_batch,
                 loop.epoch_loop.batch_idx, loop.epoch_loop.global_step)
            )  # fmt: skip

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            self.look("epoch start", trainer)

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            self.look("batch start", trainer)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.look("batch end", trainer)

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            self.look("epoch end", trainer)

    run = trainer(tmp_path, max_epochs=2, callbacks=Looking())
    run.fit(Net(), loader(4))
    assert heard[6:] == [
        ("epoch start", (2, 2, 1, 1), (0, 0, 0, 0), 2, False, -1, 2),
        ("batch start", (2, 2, 1, 1), (1, 1, 0, 0), 3, False, 0, 2),
        ("batch end", (2, 2, 1, 1), (1, 1, 1, 0), 3, False, 0, 3),
        ("batch start", (2, 2, 1, 1), (2, 2, 1, 1), 4, True, 1, 3),
        ("batch end", (2, 2, 1, 1), (2, 2, 2, 1), 4, True, 1, 4),
        ("epoch end", (2, 2, 2, 1), (2, 2, 2, 2), 4, True, 1, 4),
    ]
    assert not run.fit_loop.restarting
    assert run.fit_loop.epoch_loop.total_batch_idx == 3
    assert tuple(run.fit_loop.epoch_progress.current) == (2, 2, 2, 2)


def test_two_ranks_go_on_with_the_samples_that_are_left(tmp_path: Path) -> None:
    run_in_ranks(on_two_ranks, tmp_path)
    seen = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for epoch in range(2):
        samples = [s for rank in seen for at, _, first in rank for s in first if at == epoch]
        assert sorted(samples) == [float(i) for i in range(16)]


class Sharing(Net):
    """Notes the samples of every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, int, list[float]]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.seen.append((self.current_epoch, batch_idx, batch[:, 0].tolist()))
        return super().training_step(batch, batch_idx)


def on_two_ranks(folder: Path) -> None:
    module, run = Sharing(), trainer(folder, strategy="ddp", devices=2, max_epochs=2, max_steps=3)
    run.fit(module, shuffled(16))
    run.max_steps = -1
    run.fit(module, shuffled(16))
    assert (run.global_step, run.current_epoch) == (8, 2)
    torch.save(module.seen, folder / f"{run.global_rank}.pt")


STOPS = ["on_train_epoch_start", "on_train_batch_start", "on_after_backward", "on_train_batch_end", "on_validation_end"]


@pytest.mark.filterwarnings("ignore:The training loader .DataLoader. draws from the global")
@pytest.mark.parametrize("hook", STOPS)
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_in_any_hook_and_its_validation_change_no_number(
    tmp_path: Path, hook: str, accumulate: int, stream: bool
) -> None:
    """A stop is followed by a validation that is not due otherwise, whose loader draws random numbers."""

    class Stopping(L.Callback):
        calls = 0

    def stop(self: Any, trainer: L.Trainer, *args: Any) -> None:
        if not trainer.sanity_checking:
            self.calls += 1
            trainer.should_stop |= self.calls == 2

    setattr(Stopping, hook, stop)

    def batches() -> DataLoader[Tensor]:
        return DataLoader(Drawing(), 2) if stream else shuffled()

    settings = {"accumulate_grad_batches": accumulate, "val_check_interval": 1.0 if stream else 3, "max_epochs": 3}
    runs = []
    for callbacks in ([], [Stopping()]):
        torch.manual_seed(3)
        module, run = Unscheduled(), trainer(tmp_path, callbacks=callbacks, **settings)
        run.fit(module, batches(), loader(4))
        if callbacks:
            assert run.global_step < runs[0][1].global_step
            run.fit(module, batches(), loader(4))
        runs.append((module, run))
    (whole, one), (module, other) = runs
    assert module.seen == whole.seen
    assert (other.global_step, other.current_epoch) == (one.global_step, 3)
    assert all(map(torch.equal, weights(module), weights(whole)))


class Unscheduled(Noting):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), self.lr)


class Drawing(IterableDataset[Tensor]):
    """Draws its samples from the global generator."""

    def __iter__(self) -> Iterator[Tensor]:
        return (10 * torch.rand(4) for _ in range(8))


@pytest.mark.parametrize("hook", ["on_train_start", "on_train_epoch_start"])
def test_a_group_that_a_hook_adds_is_not_added_to_an_optimizer_that_has_it(tmp_path: Path, hook: str) -> None:
    """The second ``configure_optimizers`` finds the layer trainable, and the hook that adds it is called again."""

    class Finetuned(Net):
        def __init__(self) -> None:
            super().__init__()
            self.back = torch.nn.Linear(4, 4).requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.back(x))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], self.lr)

    def unfreeze(self: Any, trainer: L.Trainer, module: Any) -> None:
        if hook == "on_train_start" or trainer.current_epoch == 1:
            module.back.requires_grad_(True)
            module.optimizers().add_param_group({"params": list(module.back.parameters())})

    run = trainer(tmp_path, max_epochs=2, max_steps=5, callbacks=type("Unfreezing", (L.Callback,), {hook: unfreeze})())
    run.fit(module := Finetuned(), loader())
    run.max_steps = -1
    run.fit(module, loader())
    assert run.global_step == 8
    assert [len(group["params"]) for group in run.optimizers[0].param_groups] == [4]


def test_ranks_meet_where_nothing_is_left_to_do(tmp_path: Path) -> None:
    """Rank 0 hosts the store, and must not end before the other ranks have connected to it."""
    run_in_ranks(nothing_to_do, tmp_path, timeout=30)


class Late(L.Callback):
    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_rank == 1:
            time.sleep(0.5)  # rank 0 has nothing else to do, and would end


def nothing_to_do(folder: Path) -> None:
    trainer(folder, strategy="ddp", devices=2, max_epochs=0, callbacks=Late()).fit(Net(), loader())


def test_ranks_that_were_interrupted_at_different_batches_do_not_go_on(tmp_path: Path) -> None:
    run_in_ranks(interrupted_ranks, tmp_path, timeout=30)


class Interrupts(L.Callback):
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            raise KeyboardInterrupt


def interrupted_ranks(folder: Path) -> None:
    module, run = Net(), trainer(folder, strategy="ddp", devices=2, callbacks=Interrupts())
    with pytest.raises(SystemExit):
        run.fit(module, loader(16))
    assert run.interrupted
    with pytest.raises(ValueError, match="its ranks may be at different batches.*pass `ckpt_path`"):
        run.fit(module, loader(16))
