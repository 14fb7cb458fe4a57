"""The order of the hooks of whole runs, as text files to read: ``hook_orders/*.txt``, one file a scenario.

Each scenario is a small real run whose callback, module, data module, optimizer, schedulers, logger and checkpoint
files write down every call. A line is one call. Lines are indented that happen within a call, or between a hook
``on_..._start`` and its ``on_..._end``. An optimizer changes the weights at the end of its ``step``. A line
``... these 20 lines with batch 1, 2`` says that the 20 lines above it follow again for these batches, and nothing else.

``TREADLE_WRITE_GOLDEN=1 pytest tests/trainer/test_hook_order.py`` writes all files anew. Read what changed, line by
line: it is what users see.
"""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.trainer.hook_calls import as_text, forget
from tests.trainer.models import loader, trainer
from tests.trainer.recorded import (
    MemoryLogger,
    Model,
    ModelWithLoaders,
    RecordedCallback,
    RecordedData,
    RecordedFiles,
    RecordedModel,
    RecordedModelWithLoaders,
    RecordedStopping,
    StraightModel,
    checkpoint,
    module_like,
)

import treadle as L
from treadle.callbacks import ModelCheckpoint

pytestmark = pytest.mark.filterwarnings("ignore:You have overridden `.*` in both")  # all hooks, to see their order

GOLDEN = Path(__file__).parent / "hook_orders"
WRITE = bool(os.environ.get("TREADLE_WRITE_GOLDEN"))


def fit(tmp_path: Path, model: Any = None, data: Any = None, callbacks: Any = None, **kwargs: Any) -> L.Trainer:
    """A fit of recording objects; ``ckpt_path`` and loaders go to fit, other ``kwargs`` to the Trainer.

    Without loaders the data come from a recording data module with two batches of training and one of validation.
    """
    run = {name: kwargs.pop(name) for name in ("ckpt_path", "train_dataloaders") if name in kwargs}
    if data is None and "train_dataloaders" not in run and not isinstance(model, ModelWithLoaders):
        data = RecordedData()
    callbacks = [RecordedCallback()] if callbacks is None else callbacks
    fitting = trainer(tmp_path, callbacks=callbacks, plugins=[RecordedFiles()], **kwargs)
    fitting.fit(model or RecordedModel(), datamodule=data, **run)
    return fitting


def data_of(batches: int) -> Any:
    data = RecordedData()
    data.batches = batches
    return data


def with_step_result(model: Any, step_result: Callable[[Any, int], Any]) -> Any:
    """``model``, whose ``training_step`` returns ``step_result(loss, batch_idx)``."""
    model.step_result = step_result
    return model


def stopping_at(last: int, model: Any) -> Any:
    """``model``, which asks the trainer to stop in each batch from ``last`` on."""

    def step_result(loss: Any, batch_idx: int) -> Any:
        if batch_idx >= last:
            model.trainer.should_stop = True
        return loss

    return with_step_result(model, step_result)


def failing_at(failing: int, model: Any) -> Any:
    def step_result(loss: Any, batch_idx: int) -> Any:
        if batch_idx == failing:
            raise ZeroDivisionError("in the step")
        return loss

    return with_step_result(model, step_result)


SCENARIOS: dict[str, Callable[[Path], object]] = {}


def scenario(run: Callable[[Path], object]) -> Callable[[Path], object]:
    """A run whose calls are compared with the file of its name; its docstring is the first line of that file."""
    SCENARIOS[run.__name__] = run
    return run


def check(name: str) -> None:
    """Compare the calls so far with a golden file, or write the file."""
    path = GOLDEN / f"{name}.txt"
    text = f"{inspect.getdoc(SCENARIOS[name])}\n\n{as_text()}"
    if WRITE:
        GOLDEN.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return
    golden = path.read_text(encoding="utf-8") if path.exists() else ""
    lines = difflib.unified_diff(golden.splitlines(), text.splitlines(), path.name, "this run", lineterm="")
    difference = "\n".join(lines)
    assert not difference, f"the hooks are called in another order:\n{difference}"


# ------------------------------------------------------------------------------------------------ a fit


@scenario
def fit_two_epochs(tmp_path: Path) -> None:
    """Fit of two epochs with two batches and a validation each; the module and the data module override every hook."""
    fit(tmp_path, max_epochs=2)


@scenario
def fit_straight_line(tmp_path: Path) -> None:
    """Fit of one epoch; the module overrides no hook of the step and of the transfer, as most modules."""
    fit(tmp_path, StraightModel())


@scenario
def fit_with_loaders_of_the_module(tmp_path: Path) -> None:
    """Fit of one epoch without a data module: the module defines the loaders, so its transfer hooks are called."""
    fit(tmp_path, RecordedModelWithLoaders())


@scenario
def fit_without_validation(tmp_path: Path) -> None:
    """Fit of one epoch with a loader that is given to fit: nothing to validate, and so no sanity check."""
    fit(tmp_path, train_dataloaders=loader(4))


@scenario
def fit_without_sanity_check(tmp_path: Path) -> None:
    """Fit of one epoch with num_sanity_val_steps=0."""
    fit(tmp_path, num_sanity_val_steps=0)


@scenario
def fit_several_validation_loaders(tmp_path: Path) -> None:
    """Fit of one epoch with two loaders of validation."""
    data = RecordedData()
    data.val_loaders = 2
    fit(tmp_path, data=data)


@scenario
def fit_several_training_loaders(tmp_path: Path) -> None:
    """Fit of one epoch with two training loaders, which make one batch."""
    fit(tmp_path, train_dataloaders={"a": loader(4), "b": loader(2)})


@scenario
def fit_validation_in_mid_epoch(tmp_path: Path) -> None:
    """Fit of one epoch with four batches and val_check_interval=0.5."""
    fit(tmp_path, data=data_of(4), val_check_interval=0.5)


@scenario
def fit_all_at_once(tmp_path: Path) -> None:
    """Fit of one epoch with 4 batches: validation each 2 batches, accumulation over 2, three schedulers (each step,
    each epoch, plateau), early stopping, checkpoints of the best and of each step, gradient clipping, a logger."""
    model = RecordedModel()
    model.schedulers = ("step", "epoch", "plateau")
    best = checkpoint("best", tmp_path, "best-{step}", monitor="val_loss")
    steps = checkpoint("steps", tmp_path, "last", every_n_train_steps=1, enable_version_counter=False)
    callbacks = [best, steps, RecordedStopping("val_loss"), RecordedCallback()]
    fit(
        tmp_path,
        model,
        data_of(4),
        callbacks,
        val_check_interval=0.5,
        accumulate_grad_batches=2,
        gradient_clip_val=0.5,
        enable_checkpointing=True,
        logger=MemoryLogger(),
        log_every_n_steps=1,
    )


@scenario
def fit_fast_dev_run(tmp_path: Path) -> None:
    """Fit with fast_dev_run=True: one batch of each loader, no sanity check, no checkpoint, no logger."""
    callbacks = [checkpoint("checkpoint", tmp_path), RecordedCallback()]
    fit(tmp_path, None, data_of(4), callbacks, fast_dev_run=True, enable_checkpointing=True, logger=MemoryLogger())
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------ the step


@scenario
def step_accumulation(tmp_path: Path) -> None:
    """Fit of five batches with accumulate_grad_batches=2; the last batch steps alone."""
    fit(tmp_path, train_dataloaders=loader(10), accumulate_grad_batches=2)


@scenario
def step_accumulation_straight_line(tmp_path: Path) -> None:
    """Fit of five batches with accumulate_grad_batches=2; the module overrides no hook of the step."""
    fit(tmp_path, StraightModel(), train_dataloaders=loader(10), accumulate_grad_batches=2)


@scenario
def step_closure(tmp_path: Path) -> None:
    """Fit of one batch with L-BFGS, which evaluates the closure twice."""
    model = RecordedModel()
    model.lbfgs = True
    fit(tmp_path, model, train_dataloaders=loader(2))


@scenario
def step_closure_straight_line(tmp_path: Path) -> None:
    """Fit of one batch with L-BFGS, which evaluates the closure twice; the module overrides no hook of the step."""
    model = StraightModel()
    model.lbfgs = True
    fit(tmp_path, model, train_dataloaders=loader(2))


class StepsEverySecondTime(Model):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        if batch_idx % 2 == 0:
            optimizer.step(closure=optimizer_closure)
        else:
            optimizer_closure()


@scenario
def step_own_optimizer_step(tmp_path: Path) -> None:
    """Fit of four batches; optimizer_step is overridden: batch 1 and 3 only run the closure."""
    fit(tmp_path, module_like(StepsEverySecondTime)(), train_dataloaders=loader(8))


@scenario
def step_without_loss(tmp_path: Path) -> None:
    """Fit of two batches whose training_step returns None: no backward."""
    with pytest.warns(UserWarning, match="or no loss, for all 2 batches"):
        fit(tmp_path, with_step_result(RecordedModel(), lambda loss, batch_idx: None), train_dataloaders=loader(4))


@scenario
def step_without_loss_straight_line(tmp_path: Path) -> None:
    """Fit of two batches whose training_step returns None; the module overrides no hook of the step."""
    with pytest.warns(UserWarning, match="or no loss, for all 2 batches"):
        fit(tmp_path, with_step_result(StraightModel(), lambda loss, batch_idx: None), train_dataloaders=loader(4))


class Manual(Model):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        found = self.optimizers()
        for optimizer in found if isinstance(found, list) else [found]:
            loss = self.loss(batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()


@scenario
def step_manual(tmp_path: Path) -> None:
    """Fit of two batches with manual optimization."""
    fit(tmp_path, module_like(Manual)(), train_dataloaders=loader(4))


@scenario
def step_manual_two_optimizers(tmp_path: Path) -> None:
    """Fit of two batches with manual optimization of two optimizers."""
    model = module_like(Manual)()
    model.optimizers_made = 2
    fit(tmp_path, model, train_dataloaders=loader(4))


@scenario
def schedulers_by_epoch(tmp_path: Path) -> None:
    """Fit of two epochs with a scheduler that steps each epoch: at the last batch, before its on_train_batch_end."""
    model = RecordedModel()
    model.schedulers = ("epoch",)
    fit(tmp_path, model, train_dataloaders=loader(4), max_epochs=2)


@scenario
def schedulers_by_metric(tmp_path: Path) -> None:
    """Fit of one epoch with a plateau scheduler: after the module's on_train_epoch_end and before the checkpoint."""
    model = RecordedModel()
    model.schedulers = ("plateau",)
    saving = checkpoint("checkpoint", tmp_path, save_on_train_epoch_end=True)
    fit(tmp_path, model, callbacks=[saving, RecordedCallback()], enable_checkpointing=True)


# ------------------------------------------------------------------------------------------------ ways to end


@scenario
def end_stopped_in_mid_epoch(tmp_path: Path) -> None:
    """Fit of up to three epochs with four batches; the first batch asks to stop: validation follows at once."""
    fit(tmp_path, stopping_at(0, RecordedModel()), data_of(4), max_epochs=3)


@scenario
def end_stopped_in_last_batch(tmp_path: Path) -> None:
    """Fit of up to three epochs with two batches; the second batch asks to stop."""
    fit(tmp_path, stopping_at(1, RecordedModel()), max_epochs=3)


@scenario
def end_stopped_before_min_epochs(tmp_path: Path) -> None:
    """Fit with min_epochs=2 and max_epochs=3; each batch asks to stop."""
    fit(tmp_path, stopping_at(0, RecordedModel()), max_epochs=3, min_epochs=2)


@scenario
def end_max_steps_in_mid_epoch(tmp_path: Path) -> None:
    """Fit with max_steps=3, which is in the middle of the second epoch: that epoch does not validate."""
    fit(tmp_path, max_epochs=-1, max_steps=3)


class Skips(Model):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == 1 else None


@scenario
def end_epoch_skipped(tmp_path: Path) -> None:
    """Fit of two epochs with three batches; on_train_batch_start returns -1 in the second, which skips the rest."""
    fit(tmp_path, module_like(Skips)(), data_of(3), max_epochs=2)


@scenario
def end_epoch_skipped_scheduler_by_epoch(tmp_path: Path) -> None:
    """Fit of two epochs; the rest of each is skipped, and a scheduler that steps each epoch steps all the same."""
    model = module_like(Skips)()
    model.schedulers = ("epoch",)
    fit(tmp_path, model, data_of(3), max_epochs=2)


@scenario
def end_error_in_step(tmp_path: Path) -> None:
    """Fit of two batches; the second training_step raises: on_exception follows, and no teardown."""
    with pytest.raises(ZeroDivisionError, match="in the step"):
        fit(tmp_path, failing_at(1, RecordedModel()))


# ------------------------------------------------------------------------------------------------ checkpoints


@scenario
def checkpoint_monitored(tmp_path: Path) -> None:
    """Fit of one epoch; a checkpoint and early stopping monitor val_loss: at the epoch's end, after the module."""
    saving = checkpoint("checkpoint", tmp_path, monitor="val_loss", save_on_train_epoch_end=True)
    callbacks = [saving, RecordedStopping("val_loss"), RecordedCallback()]
    fit(tmp_path, callbacks=callbacks, enable_checkpointing=True)


@scenario
def checkpoint_each_epoch(tmp_path: Path) -> None:
    """Fit of one epoch without validation; a checkpoint is saved at its end."""
    callbacks = [checkpoint("checkpoint", tmp_path), RecordedCallback()]
    fit(tmp_path, callbacks=callbacks, enable_checkpointing=True, limit_val_batches=0)


@scenario
def checkpoint_each_step(tmp_path: Path) -> None:
    """Fit of two batches with every_n_train_steps=1: the second save waits for the validation that belongs to it."""
    callbacks = [checkpoint("checkpoint", tmp_path, every_n_train_steps=1), RecordedCallback()]
    fit(tmp_path, callbacks=callbacks, enable_checkpointing=True)


@scenario
def checkpoint_by_hand(tmp_path: Path) -> None:
    """trainer.save_checkpoint after a fit: the whole state, and then only the weights."""
    fitted = fit(tmp_path)
    forget()
    fitted.save_checkpoint(tmp_path / "whole.ckpt")
    fitted.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)


def saved_after_an_epoch(tmp_path: Path) -> Path:
    path = tmp_path / "one.ckpt"
    fit(tmp_path).save_checkpoint(path)
    forget()
    return path


@scenario
def resume_after_an_epoch(tmp_path: Path) -> None:
    """Fit up to the second epoch from a checkpoint of the end of the first."""
    fit(tmp_path, ckpt_path=saved_after_an_epoch(tmp_path), max_epochs=2)


@scenario
def resume_in_mid_epoch(tmp_path: Path) -> None:
    """Fit of two batches from a checkpoint of the first."""
    saving = [ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1), RecordedCallback()]
    fit(tmp_path, callbacks=saving, enable_checkpointing=True)
    forget()
    with pytest.warns(UserWarning, match="please add the following callbacks"):
        fit(tmp_path, ckpt_path=tmp_path / "step=1.ckpt")


@scenario
def resume_nothing_left(tmp_path: Path) -> None:
    """Fit of one epoch from a checkpoint of its end: nothing is left to train."""
    saved = saved_after_an_epoch(tmp_path)
    with pytest.warns(UserWarning, match="nothing is left to do"):
        fit(tmp_path, ckpt_path=saved)


# ------------------------------------------------------------------------------------------------ other stages


def evaluate(tmp_path: Path, stage: str, data: Any = None, **kwargs: Any) -> None:
    running = trainer(tmp_path, callbacks=RecordedCallback(), plugins=[RecordedFiles()])
    getattr(running, stage)(RecordedModel(), datamodule=data or RecordedData(), **kwargs)


@scenario
def evaluate_validate(tmp_path: Path) -> None:
    """trainer.validate with one batch."""
    evaluate(tmp_path, "validate")


@scenario
def evaluate_validate_several_loaders(tmp_path: Path) -> None:
    """trainer.validate with two loaders of one batch each."""
    data = RecordedData()
    data.val_loaders = 2
    evaluate(tmp_path, "validate", data)


@scenario
def evaluate_validate_checkpoint(tmp_path: Path) -> None:
    """trainer.validate of a checkpoint."""
    evaluate(tmp_path, "validate", ckpt_path=saved_after_an_epoch(tmp_path))


@scenario
def evaluate_test(tmp_path: Path) -> None:
    """trainer.test with one batch."""
    evaluate(tmp_path, "test")


@scenario
def evaluate_predict(tmp_path: Path) -> None:
    """trainer.predict with one batch."""
    evaluate(tmp_path, "predict")


# ------------------------------------------------------------------------------------------------ loggers


class Logs(Model):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()

    def on_train_epoch_end(self) -> None:
        self.log("at_the_end", 1.0)


@scenario
def logger_fit(tmp_path: Path) -> None:
    """Fit of one epoch with a logger, log_every_n_steps=1; the module logs in its steps and in on_train_epoch_end."""
    fit(tmp_path, module_like(Logs)(), logger=MemoryLogger(), log_every_n_steps=1)


@scenario
def logger_error(tmp_path: Path) -> None:
    """Fit with a logger; the first training_step raises."""
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, failing_at(0, RecordedModel()), logger=MemoryLogger())


@pytest.mark.parametrize("name", SCENARIOS)
def test_order_of_the_hooks(tmp_path: Path, name: str) -> None:
    forget()
    SCENARIOS[name](tmp_path)
    check(name)


def test_clipping_leaves_the_order_of_the_straight_line(tmp_path: Path) -> None:
    forget()
    fit(tmp_path, StraightModel(), gradient_clip_val=0.5)
    check("fit_straight_line")


def test_each_golden_file_has_a_scenario() -> None:
    assert {path.stem for path in GOLDEN.iterdir()} == set(SCENARIOS)
