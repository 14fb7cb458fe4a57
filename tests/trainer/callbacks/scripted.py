"""A small real model whose validation metric follows a script, and a fit around it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from treadle import Callback, LightningModule, Trainer


class TrainOnly(LightningModule):
    """Four training batches an epoch, and no validation."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.layer(batch[0]).pow(2).mean()
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)


class Scripted(TrainOnly):
    """The n-th validation (the sanity check apart) logs the n-th value of the script."""

    def __init__(self, script: Sequence[float] = (), name: str = "val_loss") -> None:
        super().__init__()
        self.script = list(script)
        self.name = name
        self.validations = 0

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.script:
            self.log(self.name, torch.tensor(float(self.script[min(self.validations, len(self.script) - 1)])))

    def on_validation_end(self) -> None:
        self.validations += not self.trainer.sanity_checking


class Raises(Callback):
    """Raises once that many steps were made."""

    def __init__(self, step: int, error: BaseException | None = None) -> None:
        self.step = step
        self.error = error or RuntimeError("boom")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            raise self.error


def ending_with(error: BaseException) -> AbstractContextManager[Any]:
    """A fit that ends with an error; Ctrl+C ends the program."""
    return pytest.raises(SystemExit if isinstance(error, KeyboardInterrupt) else type(error))


def loader(batches: int = 4) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(2 * batches, 2)), batch_size=2)


def trainer_with(*callbacks: Callback, **arguments: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(hasattr(c, "dirpath") for c in callbacks),
        "max_epochs": 3,
    }
    return Trainer(callbacks=list(callbacks), **{**defaults, **arguments})


def fit(
    *callbacks: Callback,
    script: Sequence[float] = (),
    name: str = "val_loss",
    validate: bool = True,
    model: LightningModule | None = None,
    ckpt_path: str | None = None,
    **arguments: Any,
) -> Trainer:
    trainer = trainer_with(*callbacks, **arguments)
    model = model or (Scripted(script, name) if validate else TrainOnly())
    trainer.fit(model, loader(), loader(1) if validate else None, ckpt_path=ckpt_path)
    return trainer


def files(folder: str | os.PathLike[str] | None) -> list[str]:
    """Relative paths of the files below a folder, sorted."""
    assert folder is not None
    return sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*") if not p.is_dir())
