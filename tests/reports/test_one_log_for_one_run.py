"""A run that goes on has one log, as if it had never been interrupted; a branch has a log of its own.

Tests of ``treadle_fabric.loggers.csv``, ``treadle_fabric.loggers.rewinding``, ``treadle_fabric.loggers.tensorboard``,
``treadle_fabric.loggers.event_files``, ``treadle_fabric.loggers.run_folder``, ``treadle.checkpoint.loggers``,
``treadle.checkpoint.find``, ``treadle.trainer.runner``.
"""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tests.trainer.models import Net, loader
from torch import Tensor

import treadle as L
from treadle.callbacks import LearningRateMonitor, ModelCheckpoint
from treadle.loggers import CSVLogger, TensorBoardLogger

HOOKS = (
    "on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_train_batch_end", "on_validation_start",
    "on_validation_batch_end", "on_validation_epoch_end", "on_validation_end", "on_train_epoch_end",
)  # fmt: skip


class Model(Net):
    """Logs values of every kind, some of which come later than others."""

    def __init__(self, script: Script | None = None) -> None:
        super().__init__()
        self.script = script

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss = self.loss(batch) + 0.01 * torch.rand(())
        self.log("loss", loss, on_step=True, on_epoch=True)
        if self.global_step >= 5 and batch_idx % 2:
            self.log("late", loss * 2)
        if self.global_step == 7:
            self.log_dict({"step": 2.0, "other_axis": 1.5})
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val", self.loss(batch), on_step=True, on_epoch=True)

    def on_train_epoch_end(self) -> None:
        self.log("at_end", float(self.current_epoch))
        if self.script is not None:  # what comes after a save in a hook at which an epoch ends is not done again
            self.script.event("on_train_epoch_end", self.trainer)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


class Killed(BaseException):
    """Ends a run at once."""


class Script(L.Callback):
    """Saves at one event, and at another one later leaves the folder as a killed process would.

    Args:
        folder: Of all files of the run.
        save: A hook and which of its calls.
        die: The number of events after the save.
    """

    def __init__(self, folder: Path, save: tuple[str, int] | None = None, die: int = -1) -> None:
        self.folder, self.save, self.die = folder, save, die
        self.calls: Counter[str] = Counter()

    def event(self, hook: str, trainer: L.Trainer) -> None:
        if trainer.sanity_checking:
            return
        if self.save is None and self.die >= 0:
            if self.die == 0:
                shutil.copytree(self.folder, f"{self.folder}.left")
                raise Killed
            self.die -= 1
        self.calls[hook] += 1
        if (hook, self.calls[hook]) == self.save:
            trainer.save_checkpoint(Path(str(trainer.log_dir), "checkpoints", "last.ckpt"))
            self.save = None


for each in HOOKS[:-1]:

    def call(self: Script, trainer: L.Trainer, *args: Any, hook: str = each) -> None:
        self.event(hook, trainer)

    setattr(Script, each, call)


def fit(folder: Path, settings: Mapping[str, Any], script: Script | None = None, **kwargs: Any) -> L.Trainer:
    """Train in ``folder`` until the end, or until the script ends it."""
    L.seed_everything(1, verbose=False)
    folder.mkdir(exist_ok=True)
    settings, loggers = dict(settings), kwargs.pop("loggers", None)
    settings |= {"auto_resume": kwargs.pop("auto_resume", False)}
    flush = settings.pop("flush", 100)
    saver = ModelCheckpoint(**settings.pop("saver", {"save_top_k": 0}))
    callbacks: list[L.Callback] = [LearningRateMonitor(), saver]
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_epochs=3, default_root_dir=folder, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[*callbacks, *([script] if script else [])],
        logger=loggers or [
            CSVLogger(folder, "csv", flush_logs_every_n_steps=flush), TensorBoardLogger(folder, "tb")
        ], **settings,
    )  # fmt: skip
    try:
        trainer.fit(Model(script), loader(10, shuffle=True), loader(6), **kwargs)
    except Killed:
        shutil.rmtree(folder)
        os.rename(f"{folder}.left", folder)
    return trainer


def scalars(folder: Path, *, purge: bool = True) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a folder; without ``purge``, what is in its files."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}, purge_orphaned_data=purge).Reload()
    return {tag: sorted((e.step, e.value) for e in events.Scalars(tag)) for tag in events.Tags()["scalars"]}


def draw(rng: random.Random) -> dict[str, Any]:
    return {
        "log_every_n_steps": rng.choice([1, 2, 3]),
        "accumulate_grad_batches": rng.choice([1, 1, 2]),
        "val_check_interval": rng.choice([1.0, 2, 3]),
        "flush": rng.choice([1, 3, 100]),
    }


@pytest.mark.filterwarnings("ignore:.*nothing is left to do")
@pytest.mark.parametrize("seed", range(int(os.environ.get("A", 0)), int(os.environ.get("B", 6))))
def test_the_log_equals_that_of_a_run_that_was_never_killed(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    settings = draw(rng)
    whole = tmp_path / "whole"
    script = Script(whole)
    fit(whole, settings, script)
    expected, shown = (whole / "csv/version_0/metrics.csv").read_text(), scalars(whole / "tb/version_0")
    for number in range(4):
        folder = tmp_path / str(number)
        hook = rng.choice(HOOKS)
        save = (hook, rng.randint(1, script.calls[hook]))
        first = Script(folder, save, rng.randint(0, 25))
        fit(folder, settings, first)
        again = f"{settings} saved at {save}, killed {first.die}"
        if rng.random() < 0.5 and first.save is None and first.die == 0:  # and killed once more, before another save
            fit(folder, settings, Script(folder, None, rng.randint(0, 20)), ckpt_path="last")
        fit(folder, settings, ckpt_path="last")
        assert (folder / "csv/version_0/metrics.csv").read_text() == expected, again
        assert os.listdir(folder / "csv") == os.listdir(folder / "tb") == ["version_0"], again
        for purge in (True, False):
            assert scalars(folder / "tb/version_0", purge=purge) == shown, again


@pytest.mark.filterwarnings("ignore:.*(nothing is left to do|found no checkpoint)")
@pytest.mark.parametrize("seed", range(int(os.environ.get("A", 0)), int(os.environ.get("B", 6))))
def test_the_log_is_one_however_often_the_run_is_killed(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    saver = {"save_last": True, **rng.choice([{"every_n_train_steps": rng.randint(1, 5)}, {"monitor": "val"}, {}])}
    settings = {**draw(rng), "saver": saver}
    goes_on: dict[str, Any] = rng.choice([{"ckpt_path": "last"}, {"auto_resume": True}])
    whole = tmp_path / "whole"
    script = Script(whole)
    fit(whole, settings, script)
    folder = tmp_path / "killed"
    events = script.calls.total()
    while True:
        script = Script(folder, None, rng.randint(0, events))
        fit(folder, settings, script, **goes_on)
        if script.die:
            break
    csvs, boards = (max((folder / kind).iterdir(), key=version_of) for kind in ("csv", "tb"))
    assert (csvs / "metrics.csv").read_text() == (whole / "csv/version_0/metrics.csv").read_text(), settings
    for purge in (True, False):
        assert scalars(boards, purge=purge) == scalars(whole / "tb/version_0"), settings


def version_of(folder: Path) -> int:
    """A run that was killed before its first checkpoint began anew, in another version."""
    return int(folder.name.removeprefix("version_"))
