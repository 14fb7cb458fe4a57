"""Loaders are made when they are used, and not before.

Users of Lightning reported that ``reload_dataloaders_every_n_epochs`` makes validation loaders, which may read
terabytes or start services, in epochs that do not validate.

Tests of ``treadle.trainer.fitting``, ``treadle.trainer.assembly``, ``treadle.loops.fit``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.trainer.models import Net, loader, trainer

import treadle as L


class Counted(Net):
    """Counts how often its loaders are asked for; an epoch has four batches."""

    def __init__(self) -> None:
        super().__init__()
        self.made = {"train": 0, "val": 0}
        self.validated: list[int] = []

    def train_dataloader(self) -> Any:
        self.made["train"] += 1
        return loader()

    def val_dataloader(self) -> Any:
        self.made["val"] += 1
        return loader(2)

    def on_validation_start(self) -> None:
        if not self.trainer.sanity_checking:
            self.validated.append(self.current_epoch)


@pytest.mark.parametrize(
    ("arguments", "made", "validated"),
    [
        ({"max_epochs": 5, "check_val_every_n_epoch": 2}, 3, [1, 3]),
        ({"max_epochs": 9, "check_val_every_n_epoch": 4}, 3, [3, 7]),
        ({"max_epochs": 9, "check_val_every_n_epoch": 4, "num_sanity_val_steps": 0}, 2, [3, 7]),
        ({"max_epochs": 3}, 3, [0, 1, 2]),
        ({"max_epochs": 3, "val_check_interval": 0.5}, 3, [0, 0, 1, 1, 2, 2]),
        ({"max_epochs": 5, "val_check_interval": 6, "check_val_every_n_epoch": None}, 4, [1, 2, 4]),
        ({"max_epochs": 6, "reload_dataloaders_every_n_epochs": 2}, 3, [0, 1, 2, 3, 4, 5]),
        ({"max_epochs": 6, "reload_dataloaders_every_n_epochs": 2, "check_val_every_n_epoch": 3}, 3, [2, 5]),
        ({"max_epochs": 6, "reload_dataloaders_every_n_epochs": 0, "check_val_every_n_epoch": 3}, 1, [2, 5]),
        ({"max_epochs": 3, "limit_val_batches": 0}, 0, []),
    ],
)
def test_validation_loaders_are_made_in_epochs_that_validate(
    tmp_path: Path, arguments: dict[str, Any], made: int, validated: list[int]
) -> None:
    model = Counted()
    trainer(tmp_path, **{"reload_dataloaders_every_n_epochs": 1, **arguments}).fit(model)
    assert model.validated == validated
    assert model.made["val"] == made
    reload = arguments.get("reload_dataloaders_every_n_epochs", 1)
    assert model.made["train"] == (arguments["max_epochs"] // reload if reload else 1)


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_epochs": 1, "check_val_every_n_epoch": 2},
        {"max_epochs": 2, "check_val_every_n_epoch": None, "val_check_interval": 100},
    ],
)
def test_a_run_that_does_not_validate_makes_no_validation_loader(tmp_path: Path, arguments: dict[str, Any]) -> None:
    model = Counted()
    run = trainer(tmp_path, num_sanity_val_steps=0, **arguments)
    run.fit(model)
    assert model.made == {"train": 1, "val": 0}
    assert run.enable_validation


def test_no_training_loader_is_made_for_no_batches(tmp_path: Path) -> None:
    model = Counted()
    trainer(tmp_path, limit_train_batches=0).fit(model)
    assert model.made["train"] == 0


@pytest.mark.parametrize(("stage", "method"), [("val", "validate"), ("test", "test"), ("predict", "predict")])
def test_no_loader_is_made_for_an_evaluation_of_no_batches(tmp_path: Path, stage: str, method: str) -> None:
    asked: list[str] = []

    class Data(L.LightningDataModule):
        def asked_for(self) -> Any:
            asked.append(stage)
            return loader()

        val_dataloader = test_dataloader = predict_dataloader = asked_for

    limits: dict[str, Any] = {f"limit_{stage}_batches": 0}
    assert getattr(trainer(tmp_path, **limits), method)(Net(), datamodule=Data()) == []
    assert not asked


def test_a_run_with_nothing_left_to_train_makes_no_loader(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.fit(Counted())
    run.save_checkpoint(tmp_path / "end.ckpt")
    model = Counted()
    with pytest.warns(UserWarning, match="nothing is left to do"):
        trainer(tmp_path).fit(model, ckpt_path=tmp_path / "end.ckpt")
    assert model.made == {"train": 0, "val": 0}
    trainer(tmp_path, max_epochs=0).fit(model)
    assert model.made == {"train": 0, "val": 0}


@pytest.mark.parametrize("nothing", [None, []])
def test_a_method_that_gives_no_loader_is_asked_once(tmp_path: Path, nothing: Any) -> None:
    class Without(Counted):
        def val_dataloader(self) -> Any:
            super().val_dataloader()
            return nothing

    model = Without()
    run = trainer(tmp_path, max_epochs=4, num_sanity_val_steps=0, check_val_every_n_epoch=2)
    run.fit(model)
    assert model.made["val"] == 1 and not model.validated and not run.enable_validation


def test_a_resumed_run_that_makes_its_loaders_at_another_time_draws_the_same_numbers(tmp_path: Path) -> None:
    class Random(Counted):
        def train_dataloader(self) -> Any:
            return loader(shuffle=True)

        def val_dataloader(self) -> Any:
            torch.rand(3)
            return super().val_dataloader()

    class Saving(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if trainer.current_epoch == 2:
                trainer.save_checkpoint(tmp_path / "two.ckpt")

    arguments: dict[str, Any] = {"max_epochs": 6, "num_sanity_val_steps": 0, "check_val_every_n_epoch": 2}
    whole, resumed = Random(), Random()
    torch.manual_seed(1)
    trainer(tmp_path, callbacks=Saving(), **arguments).fit(whole)
    trainer(tmp_path, **arguments).fit(resumed, ckpt_path=tmp_path / "two.ckpt")
    assert torch.equal(whole.layer.weight, resumed.layer.weight)
