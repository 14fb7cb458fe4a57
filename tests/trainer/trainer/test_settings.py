"""The Trainer's constructor: defaults, what it adds by itself, and what its arguments become.

Tests of ``treadle.trainer.settings``, ``treadle.trainer.preflight``, ``treadle.trainer.trainer``.
"""

from __future__ import annotations

import inspect
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.trainer.models import Net, loader, trainer

import treadle as L
from treadle.callbacks import EarlyStopping, ModelCheckpoint, ModelSummary, ProgressBar, Timer
from treadle_fabric import CSVLogger, DummyLogger, MisconfigurationException
from treadle_fabric.loggers import TensorBoardLogger


def made(**arguments: Any) -> L.Trainer:
    return L.Trainer(accelerator="cpu", devices=1, **arguments)


def kinds(run: L.Trainer) -> list[type]:
    known = (ModelCheckpoint, ProgressBar, ModelSummary, Timer, L.Callback)
    return [next(kind for kind in known if isinstance(c, kind)) for c in run.callbacks]


def test_defaults(tmp_path: Path) -> None:
    run = made()
    assert (run.max_epochs, run.min_epochs, run.max_steps, run.min_steps) == (1000, None, -1, None)
    assert (
        run.limit_train_batches == run.limit_val_batches == run.limit_test_batches == run.limit_predict_batches == 1.0
    )
    assert (run.val_check_interval, run.check_val_every_n_epoch, run.num_sanity_val_steps) == (1.0, 1, 2)
    assert (run.log_every_n_steps, run.accumulate_grad_batches, run.overfit_batches) == (50, 1, 0.0)
    assert (run.gradient_clip_val, run.gradient_clip_algorithm, run.fast_dev_run) == (None, None, 0)
    assert run.precision == "32-true"
    assert run.default_root_dir == str(tmp_path)
    assert (run.world_size, run.num_devices, run.num_nodes, run.global_rank, run.is_global_zero) == (1, 1, 1, 0, True)
    assert (run.global_step, run.current_epoch, run.should_stop, run.state.status) == (0, 0, False, "initializing")
    assert not list(tmp_path.iterdir())  # nothing is written before something runs


def test_every_argument_is_given_by_name() -> None:
    parameters = list(inspect.signature(L.Trainer.__init__).parameters.values())[1:]
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in parameters)
    with pytest.raises(TypeError):
        L.Trainer("cpu")


def test_callbacks_that_are_there_by_default() -> None:
    run = made()
    assert sorted(k.__name__ for k in kinds(run)) == ["ModelCheckpoint", "ModelSummary", "ProgressBar"]
    assert kinds(run)[-1] is ModelCheckpoint
    assert isinstance(run.checkpoint_callback, ModelCheckpoint)
    assert isinstance(run.progress_bar_callback, ProgressBar)
    none = made(enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    assert none.callbacks == []
    assert none.checkpoint_callback is None
    assert Timer in kinds(made(max_time={"minutes": 1}))


def test_ones_own_callbacks_take_the_place_of_the_default_ones() -> None:
    mine = [ModelCheckpoint(save_top_k=-1), ModelSummary(max_depth=2)]
    run = made(callbacks=mine, enable_progress_bar=False)
    assert set(run.callbacks) == set(mine)
    timer = Timer(timedelta(hours=1))
    assert [c for c in made(callbacks=timer, max_time="00:00:01:00").callbacks if isinstance(c, Timer)] == [timer]


def test_order_of_callbacks() -> None:
    class Early(L.Callback):
        call_order = -1

    class Plain(L.Callback):
        pass

    first, second, early, saves, stops = Plain(), Plain(), Early(), ModelCheckpoint(), EarlyStopping("x")
    run = made(callbacks=[saves, first, early, stops, second], enable_progress_bar=False, enable_model_summary=False)
    assert run.callbacks == [early, first, stops, second, saves]
    assert run.early_stopping_callback is stops and run.early_stopping_callbacks == [stops]


def test_loggers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(made().logger, TensorBoardLogger)
    assert isinstance(made(logger=True).logger, TensorBoardLogger)
    assert made(logger=False).loggers == []
    assert made(logger=False).logger is None
    first, second = CSVLogger(tmp_path), CSVLogger(tmp_path, "other")
    run = made(logger=[first, second])
    assert (run.loggers, run.logger) == ([first, second], first)
    assert made(logger=first).loggers == [first]
    monkeypatch.setattr("treadle.trainer.settings.find_spec", lambda name: None)
    run = made(default_root_dir=tmp_path / "here")
    assert isinstance(run.logger, CSVLogger)
    assert str(run.log_dir).startswith(str(tmp_path / "here"))


def test_a_trial_run_leaves_nothing_behind(tmp_path: Path) -> None:
    run = made(
        fast_dev_run=2,
        max_epochs=9,
        limit_train_batches=0.5,
        callbacks=[ModelCheckpoint(tmp_path), EarlyStopping("nothing")],
        logger=CSVLogger(tmp_path),
        enable_progress_bar=False,
    )
    assert (run.max_epochs, run.max_steps, [type(logger) for logger in run.loggers]) == (1, 2, [DummyLogger])
    assert run.checkpoint_callback is not None and run.early_stopping_callback is not None  # they do nothing
    run.fit(Net(), loader(8), loader(8))
    assert (run.num_training_batches, run.num_val_batches, run.global_step) == (2, [2], 2)
    run.test(dataloaders=loader(8), verbose=False)
    assert run.num_test_batches == [2]
    assert not list(tmp_path.iterdir())


def test_an_endless_default_is_pointed_out_where_it_matters(tmp_path: Path) -> None:
    class Ends(Net):
        def on_train_batch_end(self, *_: Any) -> None:
            self.trainer.should_stop = True

    run = trainer(tmp_path, max_epochs=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.validate(Net(), loader(2), verbose=False)
    with pytest.warns(UserWarning, match="`max_epochs` was not set: training for 1000 epochs") as told:
        run.fit(Ends(), loader(2))
    assert sum("max_epochs" in str(w.message) for w in told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer(tmp_path, max_epochs=None, max_steps=1, limit_val_batches=0).fit(Net(), loader(2))


@pytest.mark.parametrize(
    ("arguments", "epochs", "steps"),
    [
        ({}, 1000, -1),
        ({"max_steps": 5}, -1, 5),
        ({"max_epochs": 3}, 3, -1),
        ({"max_epochs": -1}, -1, -1),
        ({"max_epochs": 3, "max_steps": 5}, 3, 5),
        ({"max_time": "00:01:00:00"}, -1, -1),
        ({"max_time": {"hours": 1}, "max_epochs": 2}, 2, -1),
    ],
)
def test_durations(arguments: dict[str, Any], epochs: int, steps: int) -> None:
    run = made(**arguments)
    assert (run.max_epochs, run.max_steps) == (epochs, steps)


def test_overfitting_limits_training_and_validation(tmp_path: Path) -> None:
    run = trainer(tmp_path, overfit_batches=2)
    run.fit(Net(), loader(8), loader(8))
    assert (run.num_training_batches, run.num_val_batches) == (2, [2])


def test_barebones_runs_nothing_beside_the_model(tmp_path: Path) -> None:
    run = L.Trainer(accelerator="cpu", devices=1, barebones=True, max_epochs=1, default_root_dir=tmp_path)
    assert (run.callbacks, run.loggers, run.num_sanity_val_steps) == ([], [], 0)
    seen: list[bool] = []

    class Watching(Net):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            seen.append(self.trainer.sanity_checking)

    run.fit(Watching(), loader(4), loader(2))
    assert run.global_step == 2
    assert seen == [False]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "argument",
    [
        {"logger": True},
        {"enable_checkpointing": True},
        {"enable_progress_bar": True},
        {"enable_model_summary": True},
        {"num_sanity_val_steps": 1},
        {"log_every_n_steps": 10},
        {"fast_dev_run": True},
        {"detect_anomaly": True},
    ],
)
def test_barebones_refuses_what_costs_time(argument: dict[str, Any]) -> None:
    name = next(iter(argument))
    with pytest.raises(MisconfigurationException, match=f"barebones=True.*{name}.*[Ll]eave one"):
        made(barebones=True, **argument)


def test_precision_and_plugins_reach_the_runtime() -> None:
    from treadle_fabric.precision import make_precision

    assert made(precision="bf16").precision == "bf16-mixed"
    assert made(precision=64).precision == "64-true"
    plugin = make_precision("64-true", "cpu")
    run = made(plugins=[plugin])
    assert run.precision_plugin is plugin
    assert run.precision == "64-true"


def test_benchmark_is_set_for_the_run_only(tmp_path: Path) -> None:
    seen: list[bool] = []

    class Watching(Net):
        def on_train_start(self) -> None:
            seen.append(torch.backends.cudnn.benchmark)

    before = torch.backends.cudnn.benchmark
    trainer(tmp_path, benchmark=not before).fit(Watching(), loader(4))
    assert (seen, torch.backends.cudnn.benchmark) == ([not before], before)


def test_the_logging_interval_is_heeded(tmp_path: Path) -> None:
    run = trainer(tmp_path, logger=CSVLogger(tmp_path, version="v"), log_every_n_steps=3)
    run.fit(Net(), loader(14))
    lines = (tmp_path / "lightning_logs" / "v" / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("step")
    assert [line.split(",")[column] for line in lines[1:]] == ["2", "5"]


def test_a_remote_root_is_taken_as_it_is() -> None:
    run = made(default_root_dir="memory://runs", logger=False)
    assert run.default_root_dir == "memory://runs"


@pytest.mark.parametrize(
    ("argument", "now"), [("gpus", "devices"), ("resume_from_checkpoint", "ckpt_path"), ("auto_lr_find", "Tuner")]
)
def test_an_argument_of_lightning_1_is_answered_with_what_took_its_place(argument: str, now: str) -> None:
    with pytest.raises(TypeError, match=rf"Trainer\({argument}=\.\.\.\) is no argument.*{now}"):
        L.Trainer(**{argument: 1})
