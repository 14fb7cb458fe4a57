"""A monitored name that has only not been logged yet is no misspelling, and an explicit argument is not overruled.

Tests of ``treadle.loops.schedulers``, ``treadle.trainer.settings``.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.trainer.models import Net, loader, trainer
from torch.optim.lr_scheduler import ReduceLROnPlateau

import treadle as L
from treadle.callbacks import Checkpoint
from treadle_fabric import MisconfigurationException


class Plateau(Net):
    """Lowers its learning rate whenever the scheduler steps, but for the first time."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = {"monitor": "val_loss", **config}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("train_loss", 1.0, on_epoch=True, on_step=True)
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        self.log("val_loss", 1.0)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 1.0)
        return [optimizer], [{"scheduler": ReduceLROnPlateau(optimizer, patience=0), **self.config}]


def steps(folder: Path, model: Plateau, **arguments: Any) -> int:
    run = trainer(folder, **{"max_epochs": 6, **arguments})
    run.fit(model, loader(8, 2), loader(8, 2))
    scheduler = run.lr_scheduler_configs[0].scheduler
    return int(scheduler.last_epoch)


@pytest.mark.parametrize(
    ("config", "arguments", "expected"),
    [
        ({}, {"check_val_every_n_epoch": 2}, 5),
        ({}, {"check_val_every_n_epoch": 4}, 3),
        ({}, {}, 6),
        ({"interval": "step"}, {"check_val_every_n_epoch": 2, "max_epochs": 3}, 5),
        ({"interval": "step"}, {"val_check_interval": 2, "max_epochs": 1}, 3),
        ({"interval": "step", "monitor": "train_loss_epoch"}, {"max_epochs": 2}, 4),
        ({"strict": False}, {"check_val_every_n_epoch": 2}, 5),
    ],
)
def test_a_plateau_scheduler_waits_for_the_first_validation(
    tmp_path: Path, config: Any, arguments: Any, expected: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert steps(tmp_path, Plateau(**config), **arguments) == expected
    told = [r for r in caplog.records if "it skips its steps" in r.getMessage()]
    assert len(told) == (arguments != {})


@pytest.mark.parametrize(
    "config", [{"monitor": "val_los"}, {"monitor": "val_los", "interval": "step"}, {"monitor": "train"}]
)
def test_a_misspelled_name_is_an_error_once_validation_ran(tmp_path: Path, config: Any) -> None:
    epochs: list[int] = []

    class Watch(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            epochs.append(trainer.current_epoch)

    with pytest.raises(MisconfigurationException, match="nobody logged"):
        steps(tmp_path, Plateau(**config), check_val_every_n_epoch=2, callbacks=Watch())
    assert epochs[-1] in (1, 2)


def test_without_validation_nothing_is_waited_for(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="nobody logged"):
        steps(tmp_path, Plateau(), limit_val_batches=0)


def test_a_resumed_run_that_has_validated_does_not_wait(tmp_path: Path) -> None:
    class Save(Checkpoint):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    assert steps(tmp_path, Plateau(), check_val_every_n_epoch=2, callbacks=Save(), enable_checkpointing=True) == 5
    for epoch in (0, 1, 2):
        run = trainer(tmp_path, max_epochs=6, check_val_every_n_epoch=2)
        run.fit(Plateau(), loader(8, 2), loader(8, 2), ckpt_path=tmp_path / f"{epoch}.ckpt")
        assert run.lr_scheduler_configs[0].scheduler.last_epoch == 5, epoch


@pytest.mark.parametrize(
    ("arguments", "train", "val"),
    [
        ({"overfit_batches": 2}, 2, 2),
        ({"overfit_batches": 2, "limit_val_batches": 0}, 2, 0),
        ({"overfit_batches": 0.5, "limit_val_batches": 0}, 0.5, 0),
        ({"overfit_batches": 2, "limit_val_batches": 0.0}, 2, 0),
        ({"overfit_batches": 2, "limit_val_batches": 1}, 2, 1),
        ({"overfit_batches": 2, "limit_train_batches": 1.0, "limit_val_batches": 1.0}, 2, 2),
        ({"overfit_batches": 2, "limit_train_batches": 4}, 2, 2),
        ({"fast_dev_run": True, "limit_val_batches": 0}, 1, 0),
        ({"fast_dev_run": 3, "limit_val_batches": 0.0, "limit_train_batches": 8}, 3, 0),
    ],
)
def test_an_explicit_limit_stays(tmp_path: Path, arguments: Any, train: float, val: float) -> None:
    run = trainer(tmp_path, **arguments)
    assert (run.limit_train_batches, run.limit_val_batches) == (train, val)
    model = Net()
    model.validation_step = lambda *args: validated.append(1)  # type: ignore[method-assign]
    validated: list[int] = []
    run.fit(model, loader(8, 2), loader(8, 2))
    assert bool(validated) is bool(val)


def test_a_limit_that_cannot_be_compared_is_told_of(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="overfit_batches=2 decides, and not limit_train_batches=0.5"):
        trainer(tmp_path, overfit_batches=2, limit_train_batches=0.5)


def test_a_time_limit_beside_a_timer_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    timer = L.callbacks.Timer("00:00:01:00")
    with caplog.at_level(logging.INFO):
        run = trainer(tmp_path, callbacks=timer, max_time="00:00:02:00")
    assert [c for c in run.callbacks if isinstance(c, L.callbacks.Timer)] == [timer]
    assert "has no effect, callbacks list already contains a Timer" in caplog.text
