"""Tests of ``treadle.callbacks.model_checkpoint``, ``treadle.callbacks.checkpoints.links``,
``treadle.callbacks.checkpoints.paths``, ``treadle.callbacks.checkpoints.ranking``,
``treadle.callbacks.checkpoints.triggers``.
"""

from __future__ import annotations

import math
import os
import shutil
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.trainer.callbacks.scripted import Raises, Scripted, ending_with, files, fit, loader, trainer_with

from treadle import Callback, Trainer
from treadle.callbacks import Checkpoint, ModelCheckpoint
from treadle_fabric.checkpoint import TorchCheckpointIO
from treadle_fabric.errors import CheckpointError, MisconfigurationException
from treadle_fabric.loggers import CSVLogger

NAN, INF = float("nan"), float("inf")


def kept(checkpoint: ModelCheckpoint) -> list[str]:
    return files(checkpoint.dirpath)


def state_in(path: str | Path, key: str) -> dict[str, Any]:
    return torch.load(path, weights_only=True)["callbacks"][key]


# ------------------------------------------------------------------------------------------------ arguments


@pytest.mark.parametrize(
    "arguments",
    [
        {"save_top_k": -2},
        {"save_top_k": 2},
        {"save_top_k": 1.5},
        {"mode": "least"},
        {"every_n_train_steps": -1},
        {"every_n_epochs": -1},
        {"every_n_train_steps": 1, "every_n_epochs": 1},
        {"every_n_train_steps": 1, "train_time_interval": timedelta(1)},
        {"every_n_epochs": 1, "train_time_interval": timedelta(1)},
        {"train_time_interval": 5},
        {"save_last": "copy"},
    ],
)
def test_combinations_that_cannot_work_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(MisconfigurationException, match="ModelCheckpoint"):
        ModelCheckpoint(**arguments)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [({}, 1), ({"every_n_train_steps": 5}, 0), ({"train_time_interval": timedelta(1)}, 0), ({"every_n_epochs": 3}, 3)],
)
def test_epochs_trigger_by_default_unless_another_trigger_is_given(arguments: dict[str, Any], expected: int) -> None:
    assert ModelCheckpoint(**arguments).every_n_epochs == expected


def test_state_key_is_that_of_lightning() -> None:
    assert ModelCheckpoint(monitor="v", train_time_interval=timedelta(seconds=5)).state_key == (
        "ModelCheckpoint{'monitor': 'v', 'mode': 'min', 'every_n_train_steps': 0, 'every_n_epochs': 0, "
        "'train_time_interval': datetime.timedelta(seconds=5)}"
    )


def test_checkpoint_callbacks_run_last_and_after_the_module() -> None:
    assert Checkpoint.call_order == 1
    assert Checkpoint.monitors


# ------------------------------------------------------------------------------------------------ what is kept


def test_by_default_the_newest_is_kept_in_the_root_folder(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint()
    trainer = fit(checkpoint, script=[3, 2, 1], default_root_dir=tmp_path)
    assert checkpoint.dirpath == str(tmp_path / "checkpoints")
    assert kept(checkpoint) == ["epoch=2-step=12.ckpt"]
    assert checkpoint.best_model_path == f"{checkpoint.dirpath}/epoch=2-step=12.ckpt"
    assert checkpoint.best_model_score is None
    assert trainer.checkpoint_callback is checkpoint


def test_the_folder_is_that_of_the_first_logger(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint()
    fit(checkpoint, logger=CSVLogger(tmp_path, name="runs", version="a"), max_epochs=1)
    assert checkpoint.dirpath == str(tmp_path / "runs" / "a" / "checkpoints")
    assert kept(checkpoint) == ["epoch=0-step=4.ckpt"]


def test_the_best_k_are_kept() -> None:
    checkpoint = ModelCheckpoint("c", monitor="val_loss", save_top_k=2, filename="{epoch}-{val_loss:.1f}")
    fit(checkpoint, script=[3, 4, 1, 2, 5], max_epochs=5)
    assert kept(checkpoint) == ["epoch=2-val_loss=1.0.ckpt", "epoch=3-val_loss=2.0.ckpt"]
    best, worst = (f"{checkpoint.dirpath}/{name}" for name in kept(checkpoint))
    assert checkpoint.best_model_path == best
    assert float(checkpoint.best_model_score) == 1.0  # type: ignore[arg-type]
    assert checkpoint.kth_best_model_path == worst
    assert float(checkpoint.kth_value) == 2.0
    assert {p: float(v) for p, v in checkpoint.best_k_models.items()} == {best: 1.0, worst: 2.0}
    assert float(checkpoint.current_score) == 2.0  # type: ignore[arg-type]


def test_mode_max() -> None:
    checkpoint = ModelCheckpoint("c", monitor="val_loss", mode="max")
    fit(checkpoint, script=[3, 4, 1])
    assert kept(checkpoint) == ["epoch=1-step=8.ckpt"]


def test_ties_keep_the_earlier_one() -> None:
    checkpoint = ModelCheckpoint("c", monitor="val_loss")
    fit(checkpoint, script=[2, 2, 2])
    assert kept(checkpoint) == ["epoch=0-step=4.ckpt"]


@pytest.mark.parametrize("monitor", [None, "val_loss"])
def test_minus_one_keeps_all_under_versions_of_a_name(monitor: str | None) -> None:
    checkpoint = ModelCheckpoint("c", "x", monitor, save_top_k=-1)
    fit(checkpoint, script=[3, 4, 1])
    assert kept(checkpoint) == ["x-v1.ckpt", "x-v2.ckpt", "x.ckpt"]
    assert checkpoint.best_model_path.endswith("x-v2.ckpt")


@pytest.mark.parametrize("monitor", [None, "val_loss"])
def test_a_fixed_name_is_replaced_in_place(monitor: str | None) -> None:
    checkpoint = ModelCheckpoint("c", "x", monitor)
    fit(checkpoint, script=[3, 2, 1])
    assert kept(checkpoint) == ["x.ckpt"]
    assert torch.load(checkpoint.best_model_path, weights_only=True)["global_step"] == 12


@pytest.mark.parametrize(("counter", "expected"), [(True, ["x-v1.ckpt", "x.ckpt"]), (False, ["x.ckpt"])])
def test_a_taken_name_gets_a_version_or_is_overwritten(counter: bool, expected: list[str]) -> None:
    Path("c").mkdir()
    Path("c/x.ckpt").write_text("of another run")
    checkpoint = ModelCheckpoint("c", "x", enable_version_counter=counter)
    with pytest.warns(UserWarning, match="not empty"):
        fit(checkpoint, max_epochs=1)
    assert kept(checkpoint) == expected
    assert (Path("c/x.ckpt").read_bytes() == b"of another run") == counter


def test_zero_keeps_none() -> None:
    checkpoint = ModelCheckpoint("c", monitor="never", save_top_k=0)
    fit(checkpoint, script=[3])
    assert not os.path.exists("c")


def test_nan_ranks_last_with_a_warning() -> None:
    checkpoint = ModelCheckpoint("c", monitor="val_loss", save_top_k=2)
    with pytest.warns(UserWarning, match="nan"):
        fit(checkpoint, script=[NAN, 3, 1])
    assert kept(checkpoint) == ["epoch=1-step=8.ckpt", "epoch=2-step=12.ckpt"]
    checkpoint = ModelCheckpoint("d", monitor="val_loss", mode="max", save_top_k=1)
    with pytest.warns(UserWarning, match="nan"):
        fit(checkpoint, script=[NAN], max_epochs=1)
    assert float(checkpoint.best_model_score) == -INF  # type: ignore[arg-type]
    assert kept(checkpoint) == ["epoch=0-step=4.ckpt"]


def test_a_metric_name_with_a_slash_makes_folders_that_go_with_their_file() -> None:
    checkpoint = ModelCheckpoint("c", "{epoch}-{val/loss:.1f}", "val/loss")
    fit(checkpoint, script=[3, 2, 1], name="val/loss")
    assert kept(checkpoint) == ["epoch=2-val/loss=1.0.ckpt"]
    assert [p.name for p in Path("c").iterdir()] == ["epoch=2-val"]
    flat = ModelCheckpoint("d", "e{epoch}-v{val/loss:.1f}", "val/loss", auto_insert_metric_name=False)
    fit(flat, script=[3, 2, 1], name="val/loss")
    assert kept(flat) == ["e2-v1.0.ckpt"]


def test_epoch_and_step_can_be_monitored() -> None:
    checkpoint = ModelCheckpoint("c", monitor="step", mode="max", save_top_k=2, every_n_train_steps=2)
    fit(checkpoint)
    assert kept(checkpoint) == ["epoch=2-step=10.ckpt", "epoch=2-step=12.ckpt"]


def test_two_callbacks_keep_their_own_files() -> None:
    best = ModelCheckpoint("c", "best", "val_loss")
    newest = ModelCheckpoint("c", "newest")
    fit(best, newest, script=[1, 2, 3])
    assert files("c") == ["best.ckpt", "newest.ckpt"]
    assert torch.load("c/best.ckpt", weights_only=True)["global_step"] == 4
    assert torch.load("c/newest.ckpt", weights_only=True)["global_step"] == 12


def test_weights_only_leaves_the_optimizer_out() -> None:
    checkpoint = ModelCheckpoint("c", "x", save_weights_only=True)
    fit(checkpoint, max_epochs=1)
    found = torch.load("c/x.ckpt", weights_only=True)
    assert "state_dict" in found
    assert "optimizer_states" not in found


# ------------------------------------------------------------------------------------------------ last


def test_last_is_written_at_each_save() -> None:
    checkpoint = ModelCheckpoint("c", monitor="val_loss", save_last=True)
    fit(checkpoint, script=[1, 2, 3])
    assert kept(checkpoint) == ["epoch=0-step=4.ckpt", "last.ckpt"]
    assert not Path("c/last.ckpt").is_symlink()
    assert checkpoint.last_model_path == f"{checkpoint.dirpath}/last.ckpt"
    assert torch.load("c/last.ckpt", weights_only=True)["global_step"] == 12
    for path in ("c/last.ckpt", "c/epoch=0-step=4.ckpt"):
        assert state_in(path, checkpoint.state_key)["last_model_path"] == checkpoint.last_model_path


def test_last_alone() -> None:
    checkpoint = ModelCheckpoint("c", save_last=True, save_top_k=0)
    fit(checkpoint)
    assert kept(checkpoint) == ["last.ckpt"]


def test_last_as_a_link_follows_the_newest_file() -> None:
    checkpoint = ModelCheckpoint("c", save_last="link")
    fit(checkpoint)
    assert kept(checkpoint) == ["epoch=2-step=12.ckpt", "last.ckpt"]
    assert os.readlink("c/last.ckpt") == "epoch=2-step=12.ckpt"


def test_last_as_a_link_is_a_file_where_the_newest_state_has_none() -> None:
    checkpoint = ModelCheckpoint("c", monitor="val_loss", save_last="link")
    fit(checkpoint, script=[1, 2, 0, 3], max_epochs=4)
    assert kept(checkpoint) == ["epoch=2-step=12.ckpt", "last.ckpt"]
    assert not Path("c/last.ckpt").is_symlink()
    assert torch.load("c/last.ckpt", weights_only=True)["global_step"] == 16
    assert torch.load("c/epoch=2-step=12.ckpt", weights_only=True)["global_step"] == 12  # not written through the link


def test_last_under_a_name_of_ones_own() -> None:
    checkpoint = ModelCheckpoint("c", save_last=True, save_top_k=0)
    checkpoint.CHECKPOINT_NAME_LAST = "{epoch}-last"  # type: ignore[misc]
    fit(checkpoint)
    assert kept(checkpoint) == ["epoch=2-last.ckpt"]


def test_last_of_another_run_is_left_alone() -> None:
    fit(ModelCheckpoint("c", save_last=True, save_top_k=0), max_epochs=1)
    checkpoint = ModelCheckpoint("c", save_last=True, save_top_k=0)
    fit(checkpoint)
    assert kept(checkpoint) == ["last-v1.ckpt", "last.ckpt"]
    assert torch.load("c/last.ckpt", weights_only=True)["global_step"] == 4


# ------------------------------------------------------------------------------------------------ when


@pytest.mark.parametrize(
    ("arguments", "run", "steps"),
    [
        ({}, {}, [4, 8, 12]),
        ({"every_n_epochs": 2}, {"max_epochs": 5}, [8, 16]),
        ({"every_n_epochs": 0}, {}, []),
        ({"every_n_train_steps": 3}, {}, [3, 6, 9, 12]),
        ({"every_n_train_steps": 3}, {"accumulate_grad_batches": 2}, [3, 6]),
        ({}, {"val_check_interval": 0.5}, [2, 4, 6, 8, 10, 12]),
        ({}, {"val_check_interval": 2}, [2, 4, 6, 8, 10, 12]),
        ({}, {"val_check_interval": 1, "max_epochs": 1}, [1, 2, 3, 4]),
        ({"save_on_train_epoch_end": True}, {"val_check_interval": 0.5}, [4, 8, 12]),
        ({}, {"check_val_every_n_epoch": 2}, [8]),
        ({"save_on_train_epoch_end": True}, {"check_val_every_n_epoch": 2}, [4, 8, 12]),
        ({}, {"check_val_every_n_epoch": 2, "validate": False}, [4, 8, 12]),
        ({}, {"limit_val_batches": 0}, [4, 8, 12]),
        ({}, {"fast_dev_run": 2}, []),
    ],
)
def test_when_it_saves(arguments: dict[str, Any], run: dict[str, Any], steps: list[int]) -> None:
    checkpoint = ModelCheckpoint("c", "{step}", save_top_k=-1, auto_insert_metric_name=False, **arguments)
    fit(checkpoint, script=[1], **run)
    assert files("c") == sorted(f"{step}.ckpt" for step in steps)


def test_by_time() -> None:
    class Slow(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            time.sleep(0.02)

    often = ModelCheckpoint("often", "{step}", save_top_k=-1, train_time_interval=timedelta(milliseconds=10))
    never = ModelCheckpoint("never", "{step}", save_top_k=-1, train_time_interval=timedelta(hours=1))
    fit(Slow(), often, never, max_epochs=1)
    assert files("often") == [f"step={step}.ckpt" for step in (1, 2, 3, 4)]
    assert not os.path.exists("never")


def test_a_step_triggered_save_sees_the_validation_that_follows_the_step() -> None:
    checkpoint = ModelCheckpoint(
        "c", "{step}-{val_loss}", "val_loss", save_top_k=-1, every_n_train_steps=2, auto_insert_metric_name=False
    )
    fit(checkpoint, script=[5, 4, 3], max_epochs=2, val_check_interval=0.5, num_sanity_val_steps=0)
    assert files("c") == ["2-5.0.ckpt", "4-4.0.ckpt", "6-3.0.ckpt", "8-3.0.ckpt"]


def test_a_save_whose_metric_is_not_there_yet_waits_for_it() -> None:
    checkpoint = ModelCheckpoint("c", "{step}", "val_loss", save_top_k=-1, every_n_train_steps=3, save_last=True)
    seen: list[list[str]] = []

    class Looks(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 3:
                seen.append(files("c"))

    fit(checkpoint, Looks(), script=[5, 4], max_epochs=2, num_sanity_val_steps=0)
    assert seen == [["last.ckpt"]]  # nothing is lost meanwhile
    assert files("c") == ["last.ckpt", "step=4.ckpt", "step=6.ckpt"]


def test_a_metric_of_the_whole_training_epoch_is_waited_for() -> None:
    checkpoint = ModelCheckpoint("c", "{step}", "train_loss_epoch", save_top_k=-1)
    fit(checkpoint, script=[1], max_epochs=1, val_check_interval=0.5)
    assert files("c") == ["step=4.ckpt"]


def test_without_triggers_in_the_epoch_the_batch_hook_returns_at_once() -> None:
    hook = ModelCheckpoint().on_train_batch_end
    hook(None, None, None, None, 0)  # type: ignore[arg-type]  # looks at nothing
    best = min(_seconds_per_call(hook) for _ in range(5))
    assert best < 0.5e-6


def _seconds_per_call(hook: Any, calls: int = 20_000) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        hook(None, None, None, None, 0)
    return (time.perf_counter() - begin) / calls


# ------------------------------------------------------------------------------------------ nobody logs the metric


def test_a_metric_that_nobody_logs_stops_the_run_with_the_state_saved() -> None:
    checkpoint = ModelCheckpoint("c", monitor="val_los")
    trainer = trainer_with(checkpoint, num_sanity_val_steps=0)
    with pytest.raises(MisconfigurationException, match=r"'val_los'.*Did you mean 'val_loss'.*epoch=0-step=4\.ckpt"):
        trainer.fit(Scripted([1]), loader(), loader(1))
    assert trainer.global_step == 4
    assert files("c") == ["epoch=0-step=4.ckpt"]
    again = trainer_with(max_epochs=2)
    with pytest.warns(UserWarning, match="please add the following callbacks"):
        again.fit(Scripted([1]), loader(), loader(1), ckpt_path="c/epoch=0-step=4.ckpt")
    assert again.global_step == 8


def test_a_name_that_looks_misspelled_is_reported_before_training() -> None:
    class Stops(Callback):
        def on_train_start(self, *_: Any) -> None:
            raise KeyError("training began")

    for monitor, warned in (("val_los", True), ("train_loss", False)):
        with warnings.catch_warnings(record=True) as caught, pytest.raises(KeyError, match="training began"):
            warnings.simplefilter("always")
            fit(Stops(), ModelCheckpoint("c", monitor=monitor), script=[1])
        assert any("logged 'val_loss', not 'val_los'" in str(w.message) for w in caught) == warned


def test_a_metric_that_would_have_come_later_costs_nothing() -> None:
    checkpoint = ModelCheckpoint("c", monitor="val_loss", every_n_train_steps=2)
    with pytest.warns(UserWarning, match=r"nothing has logged 'val_loss'.*epoch=1-step=4\.ckpt"):
        fit(checkpoint, script=[1], max_epochs=1, check_val_every_n_epoch=2, num_sanity_val_steps=0)
    assert files("c") == ["epoch=1-step=4.ckpt"]


# ------------------------------------------------------------------------------------------------ failures


class FullDisk(TorchCheckpointIO):
    """Has room for a number of files."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        if self.room == 0:
            raise CheckpointError("No space left on device")
        self.room -= 1
        super().save_checkpoint(*args, **kwargs)


def test_the_old_best_is_still_there_and_known_when_the_new_one_cannot_be_written() -> None:
    checkpoint = ModelCheckpoint("c", monitor="val_loss", save_last=True)
    with pytest.raises(CheckpointError, match="No space"):
        fit(checkpoint, script=[3, 2], plugins=[FullDisk(1)])
    assert kept(checkpoint) == ["epoch=0-step=4.ckpt", "last.ckpt"]
    assert checkpoint.best_model_path == f"{checkpoint.dirpath}/epoch=0-step=4.ckpt"
    assert float(checkpoint.best_model_score) == 3.0  # type: ignore[arg-type]
    assert checkpoint.last_model_path == f"{checkpoint.dirpath}/last.ckpt"


def test_a_first_save_that_fails_leaves_nothing_behind() -> None:
    checkpoint = ModelCheckpoint("c", monitor="val_loss", save_last=True)
    with pytest.raises(CheckpointError, match="No space"):
        fit(checkpoint, script=[3], plugins=[FullDisk(0)])
    assert checkpoint.best_model_path == checkpoint.last_model_path == ""
    assert checkpoint.best_k_models == {}


def test_the_old_best_is_removed_only_after_the_new_one_is_there() -> None:
    seen: list[tuple[str, list[str]]] = []

    class Watches(TorchCheckpointIO):
        def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
            super().save_checkpoint(checkpoint, path, storage_options)
            seen.append((os.path.basename(path), files("c")))

    fit(ModelCheckpoint("c", "{step}", "val_loss", save_last=True), script=[2, 1], max_epochs=2, plugins=[Watches()])
    assert seen[1:] == [("step=8.ckpt", ["last.ckpt", "step=4.ckpt", "step=8.ckpt"])]
    assert files("c") == ["last.ckpt", "step=8.ckpt"]
    assert os.path.samefile("c/last.ckpt", "c/step=8.ckpt") and not os.path.islink("c/last.ckpt")


def test_a_file_that_cannot_be_removed_does_not_stop_training() -> None:
    class Stubborn(TorchCheckpointIO):
        def remove_checkpoint(self, path: Any) -> None:
            raise CheckpointError("busy")

    with pytest.warns(UserWarning, match="could not remove"):
        trainer = fit(ModelCheckpoint("c", "{step}"), max_epochs=2, plugins=[Stubborn()])
    assert trainer.global_step == 8
    assert files("c") == ["step=4.ckpt", "step=8.ckpt"]


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
def test_save_on_exception(error: BaseException) -> None:
    checkpoint = ModelCheckpoint("c", "{step}", "val_loss", save_on_exception=True, save_last=True)
    with ending_with(error):
        fit(checkpoint, Raises(6, error), script=[1])
    assert files("c") == ["last.ckpt", "step=4.ckpt", "step=6.ckpt"]
    assert checkpoint.best_model_path.endswith("step=4.ckpt")
    assert torch.load("c/step=6.ckpt", weights_only=True)["global_step"] == 6
    assert torch.load("c/last.ckpt", weights_only=True)["global_step"] == 6


def test_an_exception_right_after_a_save_saves_nothing_new() -> None:
    class AtEpochStart(Callback):
        def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
            if trainer.current_epoch == 1:
                raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fit(ModelCheckpoint("c", "{step}", save_on_exception=True), AtEpochStart())
    assert files("c") == ["step=4.ckpt"]


def test_exceptions_save_nothing_unless_asked() -> None:
    with pytest.raises(RuntimeError, match="boom"):
        fit(ModelCheckpoint("c"), Raises(2))
    assert not os.path.exists("c")


def test_a_failing_save_on_exception_does_not_hide_the_exception() -> None:
    with pytest.warns(UserWarning, match="could not save"), pytest.raises(RuntimeError, match="boom"):
        fit(ModelCheckpoint("c", save_on_exception=True), Raises(2), plugins=[FullDisk(0)])


# ------------------------------------------------------------------------------------------------ state


def test_state_has_the_keys_of_lightning_and_loads_safely() -> None:
    checkpoint = ModelCheckpoint("c", monitor="val_loss", save_top_k=2)
    fit(checkpoint, script=[3, 2], max_epochs=2)
    state = state_in(checkpoint.best_model_path, checkpoint.state_key)
    assert list(state)[:9] == [  # and what exact resume needs
        "monitor",
        "best_model_score",
        "best_model_path",
        "current_score",
        "dirpath",
        "best_k_models",
        "kth_best_model_path",
        "kth_value",
        "last_model_path",
    ]
    assert state["best_model_path"] == checkpoint.best_model_path  # a checkpoint knows of itself
    assert float(state["best_model_score"]) == 2.0


def test_a_state_of_an_earlier_version_loads_and_comes_back_equal() -> None:
    state = {
        "monitor": "val_loss",
        "best_model_score": torch.tensor(1.0),
        "best_model_path": "/c/step=8.ckpt",
        "current_score": torch.tensor(2.0),
        "dirpath": "/c",
        "best_k_models": {"/c/step=8.ckpt": torch.tensor(1.0), "/c/step=12.ckpt": torch.tensor(2.0)},
        "kth_best_model_path": "/c/step=12.ckpt",
        "kth_value": torch.tensor(2.0),
        "last_model_path": "/c/last.ckpt",
        "pending": True,
        "last_global_step_saved": 12,
    }
    checkpoint = ModelCheckpoint(monitor="val_loss", save_top_k=2)
    checkpoint.load_state_dict(state)
    again = checkpoint.state_dict()
    assert list(again) == list(state)
    unlike = {key for key, value in state.items() if again[key] is not value and again[key] != value}
    assert unlike == {"current_score", "dirpath"}  # of this run
    assert again["best_k_models"] is not state["best_k_models"]
    of_lightning = {key: state[key] for key in list(state)[:9]}
    checkpoint = ModelCheckpoint("elsewhere", monitor="val_loss")
    with pytest.warns(UserWarning, match="only `best_model_path` is taken over"):
        checkpoint.load_state_dict(of_lightning)
    assert checkpoint.best_model_path == "/c/step=8.ckpt"
    assert checkpoint.best_k_models == {} and checkpoint.best_model_score is None


def test_public_attributes_can_be_set_one_by_one() -> None:
    """As the launcher that brings back the outcome of spawned processes does, and users who move their files."""
    checkpoint = ModelCheckpoint("c", monitor="val_loss", save_top_k=2)
    given: dict[str, Any] = {
        "best_model_path": "a",
        "best_model_score": torch.tensor(1.0),
        "last_model_path": "b",
        "best_k_models": {"a": torch.tensor(1.0)},
        "kth_best_model_path": "c",
        "kth_value": torch.tensor(3.0),
        "current_score": torch.tensor(4.0),
        "save_top_k": 3,
    }
    for name, value in given.items():
        setattr(checkpoint, name, value)
    assert {name: getattr(checkpoint, name) for name in given} == given
    assert {key: value for key, value in checkpoint.state_dict().items() if key in given} == {
        key: value for key, value in given.items() if key != "save_top_k"
    }


@pytest.mark.parametrize("name", ["save_top_k", "every_n_train_steps", "every_n_epochs"])
@pytest.mark.parametrize("value", [True, "3", 2.5])
def test_counts_are_integers(name: str, value: Any) -> None:
    with pytest.raises(MisconfigurationException, match=f"ModelCheckpoint: {name}={value!r} must be an integer"):
        ModelCheckpoint(monitor="val_loss", **{name: value})


def test_a_resumed_run_goes_on_ranking() -> None:
    def make() -> ModelCheckpoint:
        return ModelCheckpoint("c", "{step}", "val_loss", save_top_k=2, save_last=True)

    fit(make(), script=[3, 1], max_epochs=2)
    checkpoint = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the folder is not empty, and rightly so
        fit(checkpoint, script=[2], max_epochs=3, ckpt_path="c/last.ckpt")
    assert files("c") == ["last.ckpt", "step=12.ckpt", "step=8.ckpt"]
    assert {os.path.basename(p): float(v) for p, v in checkpoint.best_k_models.items()} == {
        "step=8.ckpt": 1.0,
        "step=12.ckpt": 2.0,
    }


def test_the_file_a_run_was_resumed_from_is_not_removed() -> None:
    fit(ModelCheckpoint("c", "{step}"), max_epochs=1)
    fit(ModelCheckpoint("c", "{step}"), max_epochs=3, ckpt_path="c/step=4.ckpt")
    assert files("c") == ["step=12.ckpt", "step=4.ckpt"]


def test_files_that_are_gone_are_not_ranked_after_a_resume() -> None:
    fit(ModelCheckpoint("c", "{step}", "val_loss", save_top_k=2), script=[1, 2], max_epochs=2)
    Path("c/step=4.ckpt").unlink()
    checkpoint = ModelCheckpoint("c", "{step}", "val_loss", save_top_k=2)
    with pytest.warns(UserWarning, match=r"step=4\.ckpt"):
        fit(checkpoint, script=[3], max_epochs=3, ckpt_path="c/step=8.ckpt")
    assert files("c") == ["step=12.ckpt", "step=8.ckpt"]
    assert checkpoint.best_model_path.endswith("step=8.ckpt")


def test_another_folder_starts_the_ranking_anew() -> None:
    first = ModelCheckpoint("c", "{step}", "val_loss")
    fit(first, script=[1], max_epochs=1)
    second = ModelCheckpoint("d", "{step}", "val_loss")
    with pytest.warns(UserWarning, match="ranking"):
        fit(second, script=[2], max_epochs=2, ckpt_path=first.best_model_path)
    assert files("c") == ["step=4.ckpt"]
    assert files("d") == ["step=8.ckpt"]
    assert second.best_model_path.endswith("d/step=8.ckpt")


def test_files_of_another_folder_are_not_removed() -> None:
    fit(ModelCheckpoint("c", "{step}"), max_epochs=1)
    shutil.copy("c/step=4.ckpt", "copy.ckpt")
    with pytest.warns(UserWarning, match="ranking"):
        fit(ModelCheckpoint("d", "{step}"), max_epochs=2, ckpt_path="copy.ckpt")
    assert files("c") == ["step=4.ckpt"]
    assert files("d") == ["step=8.ckpt"]


def test_the_ranking_as_yaml() -> None:
    checkpoint = ModelCheckpoint("c", "{step}", "val_loss", save_top_k=-1)
    fit(checkpoint, script=[0.5, 1e-5, math.inf])
    checkpoint.to_yaml()
    folder = checkpoint.dirpath
    assert Path("c/best_k_models.yaml").read_text() == (
        f'"{folder}/step=4.ckpt": 0.5\n'
        f'"{folder}/step=8.ckpt": {float(torch.tensor(1e-5))}\n'
        f'"{folder}/step=12.ckpt": .inf\n'
    )


def test_public_questions() -> None:
    checkpoint = ModelCheckpoint("c", "{step}", "val_loss", save_top_k=1)
    trainer = fit(checkpoint, script=[2], max_epochs=1)
    assert checkpoint.file_exists(checkpoint.best_model_path, trainer)
    assert not checkpoint.file_exists("c/other.ckpt", trainer)
    assert checkpoint.check_monitor_top_k(trainer, torch.tensor(1.0))
    assert not checkpoint.check_monitor_top_k(trainer, torch.tensor(2.0))
    assert not checkpoint.check_monitor_top_k(trainer)


def test_loggers_hear_of_a_save(tmp_path: Path) -> None:
    heard: list[str] = []

    class Listens(CSVLogger):
        def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
            heard.append(os.path.basename(checkpoint_callback.best_model_path))

    fit(ModelCheckpoint("c", "{step}"), logger=Listens(tmp_path), max_epochs=2)
    assert heard == ["step=4.ckpt", "step=8.ckpt"]


def test_verbose_says_what_is_saved_and_what_is_not(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        fit(ModelCheckpoint("c", "{step}", "val_loss", verbose=True), script=[2, 3], max_epochs=2)
    assert "'val_loss' reached 2.00000 (best 2.00000)" in caplog.text
    assert "'val_loss' was not in top 1" in caplog.text
