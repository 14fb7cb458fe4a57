"""Saving in the background, saves that fail, and runs that are killed while they save."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.trainer.killed_saves import kill_at_random_moments
from tests.trainer.models import Net, loader

from treadle import Trainer
from treadle.callbacks import Callback, ModelCheckpoint
from treadle_fabric import AsyncCheckpointIO, CheckpointError, DistributedCheckpointIO, TorchCheckpointIO
from treadle_fabric.loggers import DummyLogger


def fit(saver: ModelCheckpoint, *callbacks: Callback, on_save_error: str = "raise", **kwargs: Any) -> Trainer:
    arguments: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "max_epochs": 3, "logger": False,
        "enable_progress_bar": False, "enable_model_summary": False,
    }  # fmt: skip
    trainer = Trainer(**{**arguments, **kwargs}, callbacks=[saver, *callbacks], on_save_error=on_save_error)
    trainer.fit(Net(), loader())  # 4 steps an epoch
    return trainer


class FailsOnce(TorchCheckpointIO):
    """The second save fails."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.saves, self.error = 0, error

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.saves += 1
        if self.saves == 2:
            raise self.error
        super().save_checkpoint(*args, **kwargs)


@pytest.mark.faults
def test_killed_at_random_moments_during_saving(tmp_path: Path) -> None:
    """The small version of tests/faults/test_saving.py."""
    ways = ("file", "background", "folder")
    assert kill_at_random_moments(tmp_path, kills=18, seed=1, values=80_000, ways=ways) >= 18


@pytest.mark.parametrize("save_last", [None, True, "link"])
@pytest.mark.parametrize("top_k", [1, 2, -1])
def test_the_files_are_those_of_saves_in_the_foreground(top_k: int, save_last: Any) -> None:
    for name, io in (("now", TorchCheckpointIO()), ("later", AsyncCheckpointIO())):
        saver = ModelCheckpoint(name, "a/{step}", "train_loss", save_top_k=top_k, save_last=save_last)
        fit(saver, plugins=io)
        assert all(os.path.exists(p) for p in (saver.best_model_path, *saver.best_k_models))
    now, later = (sorted(p.relative_to(n) for p in Path(n).rglob("*")) for n in ("now", "later"))
    assert now == later and len(now) >= 2
    for path in (p for p in now if p.suffix == ".ckpt"):
        a, b = (torch.load(Path(n, path), weights_only=True) for n in ("now", "later"))
        assert a["global_step"] == b["global_step"] and str(a["state_dict"]) == str(b["state_dict"])
        assert Path("now", path).is_symlink() == Path("later", path).is_symlink()


def test_a_name_in_flight_is_taken() -> None:
    """Two callbacks with one name must not overwrite each other's file, though the first is not there yet."""
    gate = threading.Event()

    class Slow(TorchCheckpointIO):
        def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            gate.wait(0.2)
            super().save_checkpoint(*args, **kwargs)

    one, two = ModelCheckpoint("c", "x", every_n_epochs=1), ModelCheckpoint("c", "x", every_n_train_steps=4)
    fit(one, two, max_epochs=1, plugins=AsyncCheckpointIO(Slow()))
    assert sorted(os.listdir("c")) == ["x-v1.ckpt", "x.ckpt"]


def test_loggers_hear_of_a_save_when_the_file_is_there() -> None:
    heard: list[tuple[str, bool]] = []

    class Listens(DummyLogger):
        def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
            path = checkpoint_callback.best_model_path
            heard.append((os.path.basename(path), os.path.exists(path)))

    fit(ModelCheckpoint("c", "{step}"), plugins=AsyncCheckpointIO(), logger=Listens())
    assert heard == [("step=4.ckpt", True), ("step=8.ckpt", True), ("step=12.ckpt", True)]


@pytest.mark.parametrize("wrap", [lambda io: io, AsyncCheckpointIO], ids=["sync", "async"])
@pytest.mark.parametrize("error", [CheckpointError("No space left"), OSError(28, "No space left")], ids=["ours", "os"])
def test_a_save_that_fails_stops_the_run_or_not_as_the_user_says(wrap: Any, error: Exception) -> None:
    saver = ModelCheckpoint("stops", "{step}", save_last=True)
    with pytest.raises(type(error), match="No space left"):
        fit(saver, plugins=wrap(FailsOnce(error)))
    assert sorted(os.listdir("stops")) == ["last.ckpt", "step=4.ckpt"]
    assert saver.best_model_path.endswith("step=4.ckpt") and saver.last_model_path.endswith("last.ckpt")
    assert torch.load("stops/last.ckpt", weights_only=True)["global_step"] == 4

    saver = ModelCheckpoint("goes-on", "{step}", save_last=True)
    with pytest.warns(UserWarning, match="No space left.* The run goes on"):
        trainer = fit(saver, plugins=wrap(FailsOnce(error)), on_save_error="warn")
    assert trainer.global_step == 12
    assert sorted(os.listdir("goes-on")) == ["last.ckpt", "step=12.ckpt"]
    assert torch.load("goes-on/last.ckpt", weights_only=True)["global_step"] == 12


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_last_save_of_a_run_may_fail_too(asynchronous: bool) -> None:
    io = FailsOnce(CheckpointError("No space left"))
    saver = ModelCheckpoint("c", "{step}")
    with pytest.warns(UserWarning, match="No space left.* The run goes on"):
        fit(saver, plugins=AsyncCheckpointIO(io) if asynchronous else io, on_save_error="warn", max_epochs=2)
    assert saver.best_model_path.endswith("step=4.ckpt") and os.listdir("c") == ["step=4.ckpt"]


class Wrecks(Callback):
    """Does something to the folder in the second epoch."""

    def __init__(self, how: str) -> None:
        self.how = how

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        trainer.strategy.checkpoint_io.wait()
        if trainer.current_epoch == 1:
            shutil.rmtree("c")
            if self.how == "replaced by a file":
                Path("c").touch()
        elif trainer.current_epoch == 2 and self.how == "replaced by a file":
            os.remove("c")


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("how", ["vanished", "replaced by a file"])
def test_a_folder_that_vanishes_is_survived(how: str, asynchronous: bool) -> None:
    saver = ModelCheckpoint("c", "{step}", save_last=True)
    plugins = AsyncCheckpointIO() if asynchronous else TorchCheckpointIO()
    if how == "vanished":
        trainer = fit(saver, Wrecks(how), plugins=plugins)
    else:
        with pytest.warns(UserWarning, match="The run goes on"):
            trainer = fit(saver, Wrecks(how), plugins=plugins, on_save_error="warn")
    assert trainer.global_step == 12
    assert sorted(os.listdir("c")) == ["last.ckpt", "step=12.ckpt"]


def test_a_run_that_fails_still_has_what_it_began_to_write() -> None:
    class Raises(Callback):
        def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
            if trainer.global_step == 5:
                raise RuntimeError("boom")

    io = AsyncCheckpointIO()
    with pytest.raises(RuntimeError, match="boom"):
        fit(ModelCheckpoint("c", "{step}"), Raises(), plugins=io)
    io.wait()
    assert torch.load("c/step=4.ckpt", weights_only=True)["global_step"] == 4


@pytest.mark.parametrize("save_last", [True, "link"])
def test_a_write_that_fails_in_the_background_leaves_nothing(save_last: Any) -> None:
    saver = ModelCheckpoint("c", "{step}", save_last=save_last)
    with pytest.warns(UserWarning, match="No space left.* The run goes on"):
        fit(saver, plugins=AsyncCheckpointIO(FailsOnce(OSError(28, "No space left"))), on_save_error="warn")
    assert sorted(os.listdir("c")) == ["last.ckpt", "step=12.ckpt"]


def test_a_folder_that_cannot_be_tidied_in_the_background_does_not_end_the_run() -> None:
    class Meanwhile(TorchCheckpointIO):
        def remove_checkpoint(self, path: Any) -> None:
            super().remove_checkpoint(path)
            folder = os.path.dirname(path)
            os.rmdir(folder)  # another program does
            if "epoch=0" in folder:
                Path(folder).touch()

    trainer = fit(ModelCheckpoint("c", "{epoch}/{step}"), plugins=AsyncCheckpointIO(Meanwhile()))
    assert trainer.global_step == 12 and sorted(os.listdir("c")) == ["epoch=0", "epoch=2"]


@pytest.mark.parametrize("io", [TorchCheckpointIO, DistributedCheckpointIO])
def test_a_copy_in_the_place_of_a_link_is_on_the_disk(io: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*args: Any, **kwargs: Any) -> None:
        raise OSError(1, "a file system without hard links")

    flushed: set[int] = set()
    flush = os.fsync
    monkeypatch.setattr(os, "link", no_links)
    monkeypatch.setattr(os, "fsync", lambda file: (flushed.add(os.fstat(file).st_ino), flush(file)))
    fit(ModelCheckpoint("c", "{step}", save_last=True), plugins=AsyncCheckpointIO(io()), max_epochs=1)
    assert {path.stat().st_ino for path in Path("c").rglob("*")} <= flushed
    assert sorted(os.listdir("c")) == ["last.ckpt", "step=4.ckpt"]
