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
import signal
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tests.trainer.models import Net, loader
from torch import Tensor

import treadle as L
from treadle.callbacks import LearningRateMonitor, ModelCheckpoint
from treadle.loggers import CSVLogger, TensorBoardLogger
from treadle_fabric import CheckpointNotFoundError
from treadle_fabric.checkpoint import AsyncCheckpointIO, DistributedCheckpointIO

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
@pytest.mark.parametrize("seed", range(5))
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


@pytest.mark.filterwarnings("ignore:.*(nothing is left to do|no last checkpoint available)")
@pytest.mark.parametrize("seed", range(5))
def test_the_log_is_one_however_often_the_run_is_killed(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    saver = {"save_last": True, **rng.choice([{"every_n_train_steps": rng.randint(1, 5)}, {"monitor": "val"}, {}])}
    settings = {**draw(rng), "saver": saver}
    io = rng.choice([None, None, AsyncCheckpointIO, DistributedCheckpointIO])
    settings |= {} if io is None else {"plugins": io()}
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


# --- which run, and where ---


def quick(folder: Path, steps: int = -1, *, loggers: Any = None, module: Any = None, **kwargs: Any) -> L.Trainer:
    """Train for two epochs of five steps, or up to a step; a checkpoint every two steps, and the last one."""
    fitting = {name: kwargs.pop(name) for name in ("ckpt_path",) if name in kwargs}
    settings: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "max_epochs": 2, "max_steps": steps, "default_root_dir": folder,
        "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1,
        "num_sanity_val_steps": 0, "logger": loggers if loggers is not None else CSVLogger(folder),
        "callbacks": ModelCheckpoint(save_last=True, every_n_train_steps=2),
    }  # fmt: skip
    trainer = L.Trainer(**settings | kwargs)
    trainer.fit(module or Plain(), loader(10), loader(4), **fitting)
    return trainer


def both(folder: Path) -> list[Any]:
    return [CSVLogger(folder, "csv"), TensorBoardLogger(folder, "tb")]


def steps_in(folder: Path) -> list[int]:
    with open(folder / "metrics.csv", newline="") as file:
        return [int(row["step"]) for row in csv.DictReader(file)]


def files(folder: Path, *, but: str = "checkpoints") -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and but not in str(path)}


class Plain(Model):
    """Logs nothing on another axis."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss


class Seen(Plain):
    """Notes what a hook sees before the module is set up."""

    def setup(self, stage: str) -> None:
        self.seen = self.trainer.log_dir, self.trainer.ckpt_path, self.trainer.checkpoint_callback.dirpath


@pytest.mark.parametrize("how", [{"ckpt_path": "last"}, {"auto_resume": True}], ids=["last", "auto"])
def test_the_folder_of_the_run_is_known_in_setup(how: dict[str, Any], tmp_path: Path) -> None:
    version, saver = tmp_path / "lightning_logs/version_0", {"monitor": "val_epoch", "save_top_k": 3, "save_last": True}
    before = quick(tmp_path, 5, callbacks=ModelCheckpoint(**saver)).checkpoint_callback
    module = Seen()
    after = quick(tmp_path, module=module, callbacks=ModelCheckpoint(**saver), **how).checkpoint_callback
    assert module.seen == (str(version), before.last_model_path, str(version / "checkpoints"))
    assert before.best_k_models.keys() < after.best_k_models.keys()
    assert after.last_model_path == before.last_model_path
    assert os.listdir(tmp_path / "lightning_logs") == ["version_0"]
    assert steps_in(version) == list(range(10))


def test_a_remote_log_goes_on(tmp_path: Path) -> None:
    fs = fsspec.filesystem("memory")
    for steps, how in ((5, {}), (-1, {"ckpt_path": "last"})):
        saver = ModelCheckpoint(tmp_path / "ckpt", save_last=True, every_n_train_steps=2)
        trainer = quick(tmp_path, steps, loggers=CSVLogger("memory://far"), callbacks=saver, **how)
    quick(tmp_path / "whole")
    try:
        assert trainer.log_dir == "memory://far/lightning_logs/version_0"
        found = fs.cat("/far/lightning_logs/version_0/metrics.csv")
        assert found == (tmp_path / "whole/lightning_logs/version_0/metrics.csv").read_bytes()
        assert fs.exists("/far/lightning_logs/version_0/metrics_superseded.csv")
    finally:
        fs.rm("/far", recursive=True)


@pytest.mark.parametrize("how", [{"ckpt_path": "last"}, {"auto_resume": True}, {"ckpt_path": "hpc"}], ids=str)
@pytest.mark.parametrize("dirpath", [None, "memory://remote/ckpt"], ids=["default", "given"])
def test_checkpoints_in_a_remote_folder_are_found(dirpath: str | None, how: dict[str, Any], tmp_path: Path) -> None:
    fs, root = fsspec.filesystem("memory"), "memory://remote"
    try:
        for number, steps in enumerate((3, -1)):
            saver = ModelCheckpoint(dirpath, save_last=True, every_n_train_steps=1)
            again = quick(root, steps, loggers=CSVLogger(root), callbacks=saver, **(how if number else {}))  # type: ignore[arg-type]
            if not number:
                again.save_checkpoint(f"{root}/hpc_ckpt_{steps}.ckpt")
        assert str(again.ckpt_path).startswith(f"{root}/")
        found = fs.cat("/remote/lightning_logs/version_0/metrics.csv")
        assert again.test(ckpt_path="last", dataloaders=loader(4), verbose=False)
    finally:
        fs.rm("/remote", recursive=True)
    quick(tmp_path)
    assert found == (tmp_path / "lightning_logs/version_0/metrics.csv").read_bytes()


def test_a_run_that_is_asked_to_terminate_saves_in_its_remote_folder(tmp_path: Path) -> None:
    class Ends(L.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    saver = ModelCheckpoint("memory://ended/ckpt", save_last=True)
    with pytest.raises(SystemExit):
        quick(tmp_path, callbacks=[saver, Ends()])
    try:
        assert quick(tmp_path, callbacks=saver, ckpt_path="last").ckpt_path == "memory://ended/ckpt/preempted.ckpt"
        assert steps_in(tmp_path / "lightning_logs/version_0") == list(range(10))
    finally:
        fsspec.filesystem("memory").rm("/ended", recursive=True)


def test_an_hpc_checkpoint_goes_on_in_the_run(tmp_path: Path) -> None:
    quick(tmp_path, 4).save_checkpoint(tmp_path / "hpc_ckpt_1.ckpt")
    assert quick(tmp_path, ckpt_path="hpc").log_dir == str(tmp_path / "lightning_logs/version_0")
    assert steps_in(tmp_path / "lightning_logs/version_0") == list(range(10))


@pytest.mark.parametrize("how", [{"ckpt_path": "last"}, {"auto_resume": True}], ids=["last", "auto"])
@pytest.mark.filterwarnings("ignore:.*no last checkpoint available")
def test_a_version_that_the_user_named_goes_on_from_its_own_checkpoints(how: dict[str, Any], tmp_path: Path) -> None:
    for version in ("a", "b"):
        first = quick(tmp_path, 3, loggers=CSVLogger(tmp_path, version=version), **how)
        assert first.ckpt_path is None
    again = quick(tmp_path, loggers=CSVLogger(tmp_path, version="a"), **how)
    assert again.ckpt_path == str(tmp_path / "lightning_logs/a/checkpoints/last.ckpt")
    assert steps_in(tmp_path / "lightning_logs/a") == list(range(10))
    assert steps_in(tmp_path / "lightning_logs/b") == [0, 1, 2]


@pytest.mark.filterwarnings("ignore:The dirpath has changed from")
def test_another_order_and_number_of_loggers_finds_each_run(tmp_path: Path) -> None:
    def make(*which: str) -> list[Any]:
        kinds = {
            "one": lambda: CSVLogger(tmp_path / "one"), "two": lambda: CSVLogger(tmp_path / "two"),
            "tb": lambda: TensorBoardLogger(tmp_path / "tb"), "new": lambda: CSVLogger(tmp_path / "new", "other"),
        }  # fmt: skip
        return [kinds[each]() for each in which]

    Path(tmp_path, "two/lightning_logs/version_6").mkdir(parents=True)
    quick(tmp_path, 3, loggers=make("one", "two", "tb"))
    trainer = quick(tmp_path, loggers=make("new", "tb", "two", "one"), ckpt_path="last")
    assert [logger.version for logger in trainer.loggers] == [0, 0, 7, 0]
    assert steps_in(tmp_path / "two/lightning_logs/version_7") == list(range(10))
    assert steps_in(tmp_path / "one/lightning_logs/version_0") == list(range(10))
    assert [step for step, _ in scalars(tmp_path / "tb/lightning_logs/version_0")["at_end"]] == [4, 9]


@pytest.mark.filterwarnings("ignore:The dirpath has changed from")
def test_a_run_whose_folder_was_moved_goes_on_and_another_root_begins_a_run(tmp_path: Path) -> None:
    quick(tmp_path / "a", 3, loggers=both(tmp_path / "a"))
    os.rename(tmp_path / "a", tmp_path / "b")
    quick(tmp_path / "b", loggers=both(tmp_path / "b"), ckpt_path="last")
    assert steps_in(tmp_path / "b/csv/version_0") == list(range(10))
    assert [step for step, _ in scalars(tmp_path / "b/tb/version_0")["at_end"]] == [4, 9]
    quick(tmp_path / "c", 1, loggers=both(tmp_path / "c"))  # another run's version_0
    theirs = files(tmp_path / "c")
    saver = ModelCheckpoint(tmp_path / "b/csv/version_0/checkpoints", save_last=True, every_n_train_steps=2)
    moved = quick(tmp_path / "c", loggers=both(tmp_path / "c"), callbacks=saver, ckpt_path="last", max_epochs=3)
    assert [logger.version for logger in moved.loggers] == [1, 1]
    assert files(tmp_path / "c").items() >= theirs.items()
    assert steps_in(tmp_path / "c/csv/version_1")[0] == 9
    assert parent(tmp_path / "c/csv/version_1")["root"] == str(tmp_path / "b")


def parent(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "parent.json").read_text()))


@pytest.mark.filterwarnings("ignore:The dirpath has changed from")
def test_any_other_checkpoint_begins_a_branch_and_the_parent_is_untouched(tmp_path: Path) -> None:
    quick(tmp_path, loggers=both(tmp_path), callbacks=ModelCheckpoint(save_top_k=-1, every_n_train_steps=2))
    version = tmp_path / "csv/version_0"
    path = next((version / "checkpoints").glob("*step=4.ckpt"))
    theirs = files(tmp_path, but="checkpoint_that_is_none")
    for number in (1, 2):
        branch = quick(tmp_path, loggers=both(tmp_path), ckpt_path=path)
        assert branch.log_dir == str(tmp_path / f"csv/version_{number}")
        assert branch.checkpoint_callback.dirpath == str(tmp_path / f"csv/version_{number}/checkpoints")
    last = branch.checkpoint_callback.last_model_path
    branch.max_epochs = 3
    branch.fit(branch.lightning_module, loader(10), loader(4), ckpt_path=last)  # of the same trainer
    assert branch.log_dir == str(tmp_path / "csv/version_3")
    assert branch.checkpoint_callback.dirpath == str(tmp_path / "csv/version_3/checkpoints")
    assert files(tmp_path, but="checkpoint_that_is_none").items() >= theirs.items()
    for kind in ("csv", "tb"):
        assert sorted(os.listdir(tmp_path / kind)) == [f"version_{n}" for n in range(4)]
        assert not (tmp_path / kind / "version_0/parent.json").exists()
        told = [parent(tmp_path / kind / f"version_{n}") for n in (1, 2, 3)]
        assert [(each["version"], each["global_step"]) for each in told] == [(0, 4), (0, 4), (2, 10)]
        assert [each["checkpoint"] for each in told] == [str(path), str(path), last]
        assert len({each["id"] for each in told}) == 2
    assert [steps_in(tmp_path / f"csv/version_{n}")[0] for n in (0, 1, 2, 3)] == [0, 3, 3, 9]


@pytest.mark.filterwarnings("ignore:The dirpath has changed from")
def test_best_is_a_branch_also_for_the_trainer_that_saved(tmp_path: Path) -> None:
    saver = ModelCheckpoint(monitor="val_epoch", mode="max")
    trainer = quick(tmp_path, callbacks=saver)
    theirs = files(tmp_path)
    best = saver.best_model_path
    trainer.fit(trainer.lightning_module, loader(10), loader(4), ckpt_path="best")
    assert parent(tmp_path / "lightning_logs/version_1")["checkpoint"] == best
    assert files(tmp_path).items() > theirs.items()


def test_a_branch_in_a_version_that_the_user_named_sets_the_file_aside(tmp_path: Path) -> None:
    def named() -> CSVLogger:
        return CSVLogger(tmp_path, version="mine")

    path = quick(tmp_path, 4, loggers=named()).checkpoint_callback.best_model_path
    with pytest.warns(UserWarning, match=r"earlier run.*metrics_0\.csv"):
        quick(tmp_path, loggers=named(), ckpt_path=path)
    folder = tmp_path / "lightning_logs/mine"
    assert parent(folder)["checkpoint"] == path
    assert steps_in(folder)[0] == 3
    assert (folder / "metrics_0.csv").read_text().count("\n") == 5


def test_a_checkpoint_without_the_loggers_begins_a_new_version(tmp_path: Path) -> None:
    path = Path(quick(tmp_path, 4).checkpoint_callback.last_model_path)
    content = torch.load(path, weights_only=True)
    del content["treadle"]["loggers"]
    path.unlink()
    torch.save(content, path)
    with pytest.warns(UserWarning, match="The dirpath has changed from"):
        trainer = quick(tmp_path, ckpt_path="last")
    assert trainer.log_dir == str(tmp_path / "lightning_logs/version_1")


@pytest.mark.filterwarnings("ignore:.*(nothing is left to do|was called without a model)")
def test_a_finished_run_that_is_started_again_keeps_its_log(tmp_path: Path) -> None:
    def run() -> None:
        trainer = quick(tmp_path, loggers=both(tmp_path), callbacks=ModelCheckpoint(), auto_resume=True)
        trainer.test(dataloaders=loader(4), verbose=False)

    run()
    before, shown = files(tmp_path / "csv"), scalars(tmp_path / "tb/version_0", purge=False)
    run()
    assert files(tmp_path / "csv") == before
    assert scalars(tmp_path / "tb/version_0", purge=False) == shown
    assert "test_loss" in shown


def test_what_is_missing_is_told_as_before(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"missing\.ckpt"):
        quick(tmp_path, ckpt_path=tmp_path / "missing.ckpt")
    with pytest.raises(L.MisconfigurationException, match="ckpt_path='best' needs"):
        quick(tmp_path, ckpt_path="best")
    with pytest.warns(UserWarning, match="no last checkpoint available") as told:
        quick(tmp_path, 1, ckpt_path="last")
    assert len([each for each in told if "no last checkpoint available" in str(each.message)]) == 1


def test_processes_that_are_forked_leave_the_run_to_the_trainer(tmp_path: Path) -> None:
    """Without it, the program's logger names the next version, and a second fit sets the file of the first aside."""
    ranks: dict[str, Any] = {"strategy": "ddp_fork", "devices": 2}
    quick(tmp_path / "whole", loggers=both(tmp_path / "whole"), **ranks)
    trainer = quick(tmp_path, 3, loggers=both(tmp_path), **ranks)  # an epoch
    trainer.max_steps = -1
    trainer.fit(trainer.lightning_module, loader(10), loader(4))
    assert [logger.version for logger in trainer.loggers] == [0, 0]
    assert [path.name for path in (tmp_path / "csv/version_0").glob("*.csv")] == ["metrics.csv"]
    assert steps_in(tmp_path / "csv/version_0") == steps_in(tmp_path / "whole/csv/version_0")
    loss, whole = (scalars(folder / "tb/version_0")["loss"] for folder in (tmp_path, tmp_path / "whole"))
    assert [step for step, _ in loss] == [step for step, _ in whole]
