"""What may not be meant is told before a run loses time by it: once, with the remedy, in the category to filter by.

Users of Lightning rely on these warnings, and search for their words. Each row is a program that is warned, and its
neighbour that is not, in which nothing may be told at all.

Tests of ``treadle.data.advice``, ``treadle.run.hook_names``, ``treadle.trainer.preflight``,
``treadle.trainer.settings``, ``treadle.loops.optimizers``, ``treadle.loops.fit``.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tests.trainer.models import Net, loader, trainer
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import treadle as L
from treadle.callbacks import BatchSizeFinder, LearningRateMonitor, ModelCheckpoint, Timer
from treadle.data.advice import advise as advise_of_stage
from treadle_fabric import PossibleUserWarning, RemovedHookError, WrongTypeError
from treadle_fabric.accelerators import CUDAAccelerator, MPSAccelerator
from treadle_fabric.loggers import CSVLogger

SGD = torch.optim.SGD
Program = Callable[[], Any]


@pytest.fixture(autouse=True)
def several_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)


def told(program: Program) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        program()
    return caught


def batches(n: int = 8, **kwargs: Any) -> DataLoader[Any]:
    """Batches of what is in memory, for which nothing is advised."""
    return DataLoader(TensorDataset(torch.arange(4.0 * n).reshape(n, 4)), 2, **kwargs)


class Plain(Net):
    """Every step, for batches of a TensorDataset."""

    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch[0] if isinstance(batch, (list, tuple)) else batch)


def fit(model: Any = None, train: Any = None, val: Any = None, **kwargs: Any) -> L.Trainer:
    run = trainer(Path.cwd(), **kwargs)
    run.fit(model or Plain(), batches() if train is None else train, batches(2) if val is None else val)
    return run


class Trains(L.LightningModule):
    """Has a training step, and no other."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), 0.1)


def module(**members: Any) -> Any:
    return type("Named", (Plain,), members)()


def optimizing(make: Callable[[Any], Any], **members: Any) -> Any:
    return module(configure_optimizers=make, **members)


def scheduled(kind: Any = StepLR, *args: Any, **keys: Any) -> Any:
    def configure(self: Any) -> Any:
        optimizer = SGD(self.parameters(), 0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": kind(optimizer, *(args or (1,))), **keys}}

    return configure


class Endless(IterableDataset[Tensor]):
    def __iter__(self) -> Any:
        while True:
            yield torch.ones(4)


class Stream(Endless):
    def __len__(self) -> int:
        return 4


def advise(given: DataLoader[Any]) -> None:
    """What a validation would be told, without the workers that it would start."""
    advise_of_stage({"a": [given]}, "val", processes=1, overfit=False)


class Manual(Plain):
    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


class Data(L.LightningDataModule):
    def train_dataloader(self) -> Any:
        return batches()

    def val_dataloader(self) -> Any:
        return batches(2)


def fit_data(data: L.LightningDataModule) -> None:
    trainer(Path.cwd()).fit(Plain(), datamodule=data)


def data_module(**members: Any) -> Any:
    return type("Data", (Data,), members)()


def callback(**members: Any) -> Any:
    return type("Called", (L.Callback,), members)()


def in_evaluation_mode(part: str) -> Any:
    model = Plain()
    model.extra = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout())
    (model.get_submodule(part)).eval()
    return model


def frozen() -> Any:
    model = in_evaluation_mode("extra")
    model.extra.requires_grad_(False)
    return model


def evaluate_last(named: bool) -> None:
    run = fit(enable_checkpointing=True)
    run.test(run.lightning_module if named else None, batches(2), verbose=False)


def in_a_used_folder(empty: bool) -> None:
    (folder := Path("used")).mkdir()
    if not empty:
        (folder / "notes").touch()
    fit(enable_checkpointing=True, callbacks=ModelCheckpoint(folder))


def resumed(**kwargs: Any) -> None:
    fit(enable_checkpointing=True, callbacks=ModelCheckpoint("kept", filename="one"))
    trainer(Path.cwd(), max_epochs=2, **kwargs).fit(Plain(), batches(), batches(2), ckpt_path="kept/one.ckpt")


def started_by(method: str, **kwargs: Any) -> DataLoader[Any]:
    return batches(num_workers=1, multiprocessing_context=multiprocessing.get_context(method), **kwargs)


def logging_to(logger: bool | None) -> Any:
    return module(training_step=lambda s, batch, i: s.log("x", 1.0, logger=logger) or s.loss(batch))


class Row(NamedTuple):
    name: str
    category: type[Warning]
    words: tuple[str, ...]
    warned: Program
    neighbour: Program


def none(self: Any, *args: Any) -> None: ...


ROWS = [
    # loaders
    Row("few workers", PossibleUserWarning, ("'train_dataloader' does not have many workers", "num_workers", "to 7"),
        lambda: fit(train=loader()), lambda: fit(train=loader(num_workers=2))),
    Row("few workers in an evaluation", PossibleUserWarning, ("'test_dataloader' does not have many workers",),
        lambda: trainer(Path.cwd()).test(Plain(), loader(2), verbose=False),
        lambda: trainer(Path.cwd()).test(Plain(), batches(2), verbose=False)),
    Row("workers that start anew", UserWarning, ("'val_dataloader'", "Consider setting `persistent_workers=True`"),
        lambda: advise(started_by("forkserver")), lambda: advise(started_by("forkserver", persistent_workers=True))),
    Row("workers that are forked", UserWarning, ("'val_dataloader'", "starts its 1 workers anew"),
        lambda: advise(started_by("spawn")), lambda: advise(started_by("fork"))),
    Row("a stream with a length", UserWarning, ("`IterableDataset` has `__len__` defined", "get_worker_info"),
        lambda: advise(DataLoader(Stream(), num_workers=2)), lambda: advise(DataLoader(Endless(), num_workers=2))),
    Row("a shuffled validation", PossibleUserWarning, ("`val_dataloader`'s sampler has shuffling enabled",),
        lambda: fit(val=batches(4, shuffle=True)), lambda: fit(train=batches(shuffle=True))),
    Row("a shuffle that overfits", UserWarning, ("requested to overfit but enabled train dataloader shuffling",),
        lambda: fit(train=batches(shuffle=True), overfit_batches=2), lambda: fit(overfit_batches=2)),
    Row("no batches to train", UserWarning, ("Total length of `DataLoader` across ranks is zero", "0 samples", "Give"),
        lambda: fit(train=batches(0)), lambda: fit(limit_train_batches=0)),
    Row("batches that are all dropped", UserWarning, ("Total length of `DataLoader`", "drop_last=False"),
        lambda: fit(train=batches(1, drop_last=True)), lambda: fit(train=batches(2, drop_last=True))),
    Row("no batches to validate", UserWarning, ("Total length of `DataLoader`", "nothing is evaluated"),
        lambda: fit(val=batches(0)), lambda: fit(val=batches(0), limit_val_batches=0, num_sanity_val_steps=0)),
    Row("a transfer hook in two places", UserWarning, ("`on_after_batch_transfer` in both", "that of Data runs"),
        lambda: trainer(Path.cwd()).fit(module(on_after_batch_transfer=lambda s, b, i: b),
                                        datamodule=data_module(on_after_batch_transfer=lambda s, b, i: b)),
        lambda: fit_data(data_module(on_after_batch_transfer=lambda s, b, i: b))),
    # steps and loaders that lack each other
    Row("batches without the step", UserWarning, ("but have no `validation_step`", "Define it in Trains"),
        lambda: fit(Trains()), lambda: fit(Trains(), limit_val_batches=0)),
    Row("a step without batches", PossibleUserWarning, ("`validation_step` but have no `val_dataloader`", "Pass"),
        lambda: trainer(Path.cwd()).fit(Plain(), batches()),
        lambda: trainer(Path.cwd()).fit(Trains(), batches())),
    Row("nothing predicted", UserWarning, ("predict returned None", "return_predictions=False"),
        lambda: trainer(Path.cwd()).predict(module(predict_step=none), batches(2)),
        lambda: trainer(Path.cwd()).predict(module(predict_step=none), batches(2), return_predictions=False)),
    Row("nothing learned", UserWarning, ("`training_step` returned `None`", "all 4 batches", "return the loss"),
        lambda: fit(module(training_step=none)),
        lambda: fit(module(training_step=lambda s, batch, i: s.loss(batch) if i else None))),
    # what the trainer is told
    Row("few batches between two logs", PossibleUserWarning, ("(4) is smaller than the logging interval", "lower"),
        lambda: fit(logger=CSVLogger(".")), lambda: fit(logger=CSVLogger("."), log_every_n_steps=4)),
    Row("deterministic with a benchmark", UserWarning, ("`deterministic=True` and `benchmark=True`", "Leave one"),
        lambda: trainer(Path.cwd(), deterministic=True, benchmark=True),
        lambda: trainer(Path.cwd(), deterministic=True, benchmark=False)),
    Row("clipping without a limit", PossibleUserWarning, ("gradient_clip_algorithm='value' has no effect", "set one"),
        lambda: fit(gradient_clip_algorithm="value"),
        lambda: fit(gradient_clip_algorithm="value", gradient_clip_val=0.5)),
    Row("a minimum above the maximum", UserWarning, ("min_epochs=3 is more than max_epochs=2", "lower it"),
        lambda: trainer(Path.cwd(), min_epochs=3, max_epochs=2),
        lambda: trainer(Path.cwd(), min_epochs=2, max_epochs=2)),
    Row("validations that never come", PossibleUserWarning, ("check_val_every_n_epoch=3 is more than max_epochs=2",),
        lambda: fit(check_val_every_n_epoch=3, max_epochs=2), lambda: fit(check_val_every_n_epoch=2, max_epochs=2)),
    Row("reloads that never come", PossibleUserWarning, ("reload_dataloaders_every_n_epochs=1 has no effect", "define"),
        lambda: fit(reload_dataloaders_every_n_epochs=1),
        lambda: trainer(Path.cwd(), reload_dataloaders_every_n_epochs=1).fit(Plain(), datamodule=Data())),
    Row("two limits of the same batches", UserWarning, ("overfit_batches=2 decides", "limit_train_batches=0.5"),
        lambda: trainer(Path.cwd(), overfit_batches=2, limit_train_batches=0.5),
        lambda: trainer(Path.cwd(), overfit_batches=2, limit_train_batches=1)),
    Row("a search in a trial run", UserWarning, ("Skipping batch size scaler since `fast_dev_run` is enabled",),
        lambda: fit(callbacks=BatchSizeFinder(), fast_dev_run=True), lambda: fit(fast_dev_run=True)),
    # modules, optimizers and schedulers
    Row("a module in evaluation mode", PossibleUserWarning, ("Found 3 module(s) in eval mode at the start", "train()"),
        lambda: fit(in_evaluation_mode("extra")), lambda: fit(frozen())),
    Row("a submodule in evaluation mode", PossibleUserWarning, ("Found 1 module(s) in eval mode", "extra.1"),
        lambda: fit(in_evaluation_mode("extra.1")), fit),
    Row("no optimizer", UserWarning, ("`None`: this fit will run with no optimizer", "Return one"),
        lambda: fit(optimizing(none)), fit),
    Row("keys that no optimizer has", RuntimeWarning, ("unsupported keys in the optimizer configuration: 'monitr'",),
        lambda: fit(optimizing(lambda s: {"optimizer": SGD(s.parameters(), 0.1), "monitr": "x"})),
        lambda: fit(optimizing(lambda s: {"optimizer": SGD(s.parameters(), 0.1), "monitor": "x"}))),
    Row("keys that no scheduler has", RuntimeWarning, ("unsupported keys in the lr scheduler dict", "mean 'interval'"),
        lambda: fit(optimizing(scheduled(intervall="step"))), lambda: fit(optimizing(scheduled(interval="step")))),
    Row("one cycle of epochs", RuntimeWarning, ("`OneCycleLR` scheduler is using 'interval': 'epoch'", "'step'"),
        lambda: fit(optimizing(scheduled(OneCycleLR, 0.1, 9))),
        lambda: fit(optimizing(scheduled(OneCycleLR, 0.1, 9, interval="step")))),
    Row("keys that nobody reads", RuntimeWarning, ("contains the key(s) ['monitor', 'strict']", "will be ignored"),
        lambda: fit(type("Manual", (Manual,), {"configure_optimizers": scheduled(monitor="x", strict=True)})()),
        lambda: fit(type("Manual", (Manual,), {"configure_optimizers": scheduled(interval="step")})())),
    Row("a plateau of nothing", RuntimeWarning, ("ReduceLROnPlateau conditioned on metric x which is not available",),
        lambda: fit(optimizing(scheduled(ReduceLROnPlateau, "min", monitor="x", strict=False))),
        lambda: fit(optimizing(scheduled(ReduceLROnPlateau, "min", monitor="val_loss", strict=False)))),
    # callbacks, loggers and checkpoints
    Row("momentum that is not there", RuntimeWarning, ("log_momentum=True, but some optimizers do not have momentum",),
        lambda: fit(optimizing(lambda s: torch.optim.Adagrad(s.parameters())), logger=CSVLogger("."),
                    log_every_n_steps=1, callbacks=LearningRateMonitor(log_momentum=True)),
        lambda: fit(logger=CSVLogger("."), log_every_n_steps=1, callbacks=LearningRateMonitor(log_momentum=True))),
    Row("values for a logger", UserWarning, ("`self.log('x', ..., logger=True)` but have no logger configured",),
        lambda: fit(logging_to(True), max_epochs=2), lambda: fit(logging_to(None), max_epochs=2)),
    Row("a folder with files", UserWarning, ("Checkpoint directory", "exists and is not empty", "dirpath"),
        partial(in_a_used_folder, empty=False), partial(in_a_used_folder, empty=True)),
    Row("states of other callbacks", UserWarning, ("please add the following callbacks", "ModelCheckpoint"),
        resumed, lambda: resumed(enable_checkpointing=True, callbacks=ModelCheckpoint("kept", filename="one"))),
    Row("an evaluation of the last model", UserWarning, ("`.test(ckpt_path=None)` was called without a model", "Pass"),
        partial(evaluate_last, named=False), partial(evaluate_last, named=True)),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_it_is_told_once_and_its_neighbour_is_not(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    found = told(row.warned)
    said = [str(warning.message) for warning in found]
    assert [warning.category for warning in found] == [row.category], said
    assert all(word in said[0] for word in row.words), said
    assert "\n" not in said[0] and Path(found[0].filename).is_relative_to(Path(__file__).parents[1]), "the user's line"
    Path("neighbour").mkdir()
    monkeypatch.chdir("neighbour")
    assert not [str(warning.message) for warning in told(row.neighbour)]


# Names that are nearly those of hooks

NEAR: list[tuple[Callable[..., Any], str, str]] = [
    (module, "validation_steps", "test_step"),
    (module, "on_train_batch_ends", "on_train_batch_end"),
    (module, "on_training_epoch_end", "on_train_epoch_end"),
    (module, "on_val_epoch_end", "on_validation_epoch_end"),
    (module, "trainning_step", "training_step"),
    (module, "configure_optimizer", "configure_optimizers"),
    (module, "configure_callback", "configure_callbacks"),
    (module, "train_dataloaders", "train_dataloader"),
    (module, "val_data_loader", "val_dataloader"),
    (module, "onTrainStart", "on_train_start"),
    (module, "backwards", "backward"),
    (module, "on_epoch_end", "on_train_epoch_end"),
    (module, "training_step_end", "training_step"),
    (module, "on_sanity_check_end", "hook of callbacks"),
    (data_module, "test_dataloaders", "test_dataloader"),
    (data_module, "set_up", "setup"),
    (data_module, "on_train_epoch_start", "hook of modules and callbacks"),
    (callback, "on_train_batch_ends", "on_train_batch_end"),
    (callback, "on_train_begin", "on_train_start"),
    (callback, "on_keyboard_interrupt", "on_exception"),
    (callback, "on_before_batch_transfer", "hook of modules and data modules"),
]
STEPS = {"validation_steps": "validation_step", "trainning_step": "training_step", "training_step_end": "training_step",
         "configure_optimizer": "configure_optimizers"}  # fmt: skip


class Bare(L.LightningModule):
    """Has no step that a misspelled one could belong to."""


def use(make: Callable[..., Any], **members: Any) -> None:
    run, predicting = trainer(Path.cwd()), type("Predicting", (Bare,), {"forward": lambda s, x: x})
    if make is callback:
        run = trainer(Path.cwd(), callbacks=callback(**members))
        members = {}
    data = data_module(**members, predict_dataloader=lambda s: batches(2)) if make is data_module else None
    model = type("Named", (predicting,), {} if make is data_module else members)()
    run.predict(model, None if data else batches(2), data)
    run.predict(model, None if data else batches(2), data)


@pytest.mark.parametrize(("make", "name", "meant"), NEAR, ids=lambda value: value if isinstance(value, str) else None)
def test_a_method_that_is_nearly_a_hook_is_told(make: Callable[..., Any], name: str, meant: str) -> None:
    found = told(lambda: use(make, **{name: none}))
    assert [warning.category for warning in found] == [PossibleUserWarning], list(map(str, found))
    said = str(found[0].message)
    assert f".{name}` is never called" in said and STEPS.get(name, meant) in said
    assert not told(lambda: use(make, **{name: 3})), "an attribute is no method"


OWN = """train_step_helper validation_metrics test_steps_count shared_step compute_loss training_loss setup_model
val_loader train_loader configure_scheduler get_optimizer common_step test_dataloader_2 on_gpu batch_step epoch_end
evaluation_step predict_one _validation_steps forward_step log_metrics train_dataset collate_fn on_metrics encode"""


@pytest.mark.parametrize("make", [module, data_module, callback])
def test_methods_of_the_users_own_are_not_told(make: Callable[..., Any]) -> None:
    assert not told(lambda: use(make, **dict.fromkeys(OWN.split(), none)))


def test_a_part_of_a_hook_that_is_defined_is_the_users_own() -> None:
    parts = {"validation_steps": none, "configure_optimizer": none, "train_step": none}
    assert not told(lambda: fit(module(**parts)))
    assert not told(lambda: fit_data(data_module(train_dataloaders=none)))


# Devices that are there


@pytest.mark.parametrize("kind", [CUDAAccelerator, MPSAccelerator])
def test_a_gpu_that_is_not_used_is_told(
    kind: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for other in (CUDAAccelerator, MPSAccelerator):
        monkeypatch.setattr(other, "is_available", staticmethod(lambda there=other is kind: there))
    with caplog.at_level(logging.INFO):
        found = told(lambda: trainer(Path.cwd()))
    assert [warning.category for warning in found] == [PossibleUserWarning]
    assert "GPU available but not used" in str(found[0].message) and "accelerator='gpu'" in str(found[0].message)
    assert f"GPU available: True ({kind.name()}), used: False" in caplog.text
    monkeypatch.setattr(kind, "is_available", staticmethod(lambda: False))
    assert not told(lambda: trainer(Path.cwd()))
    assert "GPU available: False, used: False" in caplog.text


# What is said of a run, and what is refused


def test_a_gpu_whose_tensor_cores_are_idle_is_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, found in {"set_device": None, "get_device_capability": (9, 0), "get_device_name": "H200"}.items():
        monkeypatch.setattr(torch.cuda, name, lambda _, found=found: found)
    with caplog.at_level(logging.INFO):
        for precision in ("high", "highest", "highest"):
            monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda precision=precision: precision)
            CUDAAccelerator().setup_device(torch.device("cuda", int(precision == "highest")))
    assert caplog.text.count("('H200') that has Tensor Cores") == 1


def test_what_the_trainer_says_of_itself(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        fit(limit_train_batches=1, val_check_interval=1.0, detect_anomaly=True, max_time="00:00:01:00",
            callbacks=Timer("00:00:01:00"))  # fmt: skip
        fit(train=[], limit_train_batches=0)
        fit(module(on_train_batch_end=lambda s, *_: setattr(s.trainer, "should_stop", True)), min_steps=2)
        fit(fast_dev_run=2)
        trainer(Path.cwd(), barebones=True, log_every_n_steps=0)
        fit(optimizing(lambda s: s.trainer.estimated_stepping_batches and SGD(s.parameters(), 0.1)))
        L.seed_everything(3)
    for words in (
        "`Trainer(limit_train_batches=1)` was configured so 1 batch is used.",
        "`Trainer(val_check_interval=1.0)` was configured so validation runs at the end of each epoch.",
        "You have turned on `Trainer(detect_anomaly=True)`",
        "callbacks list already contains a Timer",
        "`Trainer.fit` stopped: `max_epochs=1` reached.",
        "`Trainer.fit` stopped: No training batches.",
        "`min_epochs=None` or `min_steps=2` has not been met",
        "Running in `fast_dev_run` mode: 2 batches",
        "`Trainer(barebones=True)` mode",
        "Loading `train_dataloader` to estimate number of stepping batches.",
        "Seed set to 3",
    ):
        assert words in caplog.text, words
    assert "Trainer(limit_val_batches" not in caplog.text, "only what was passed"


def test_a_stage_without_its_step_or_its_batches_is_refused() -> None:
    run = trainer(Path.cwd())
    for stage, step in (("validate", "validation_step"), ("test", "test_step")):
        with pytest.raises(L.MisconfigurationException, match=rf"No `{step}\(\)` method .* `Trainer.{stage}`"):
            getattr(run, stage)(Trains(), batches())
    with pytest.raises(L.MisconfigurationException, match="`Trainer.predict` requires `forward` method to run"):
        run.predict(Bare(), batches())
    for stage, name in (("fit", "train"), ("validate", "val"), ("test", "test"), ("predict", "predict")):
        remedy = rf"pass the dataloader to the `.{stage}\(\)` method .*OR implement `def {name}_dataloader\(self\):`"
        with pytest.raises(TypeError, match=remedy) as caught:
            getattr(run, stage)(Plain())
        assert type(caught.value) is WrongTypeError
    with pytest.raises(NotImplementedError, match="Support for `training_epoch_end` has been removed") as removed:
        fit(module(training_epoch_end=none))
    assert type(removed.value) is RemovedHookError


def test_an_evaluation_without_a_model_has_the_best_weights() -> None:
    class Falling(Plain):
        def on_validation_epoch_end(self) -> None:
            self.log("score", float(self.current_epoch))

    run = fit(Falling(), max_epochs=3, enable_checkpointing=True, num_sanity_val_steps=0,
              callbacks=ModelCheckpoint("best", monitor="score"))  # fmt: skip
    now = [p.clone() for p in run.lightning_module.parameters()]
    with pytest.warns(UserWarning, match="was called without a model"):
        run.test(dataloaders=batches(2), verbose=False)
    best = torch.load(run.checkpoint_callback.best_model_path)["state_dict"]  # type: ignore[union-attr]
    assert torch.equal(best["layer.weight"], run.lightning_module.layer.weight)
    assert not torch.equal(now[0], run.lightning_module.layer.weight)
