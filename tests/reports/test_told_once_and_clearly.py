"""What a run says, it says once, in sentences, and before it is too late.

Users of Lightning reported accumulations that silently end with the epoch, a line that is repeated at each validation,
a "KeyboardInterrupt: ." and warnings of checkpoints that could not be saved, before the error that they should have
seen.

Tests of ``treadle.loops.epoch``, ``treadle.loops.fit``, ``treadle.callbacks.model_checkpoint``,
``treadle.callbacks.on_exception_checkpoint``.
"""

from __future__ import annotations

import logging
import os
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.trainer.models import Net, loader, trainer
from torch import Tensor

import treadle as L
from treadle.callbacks import EarlyStopping, GradientAccumulationScheduler, ModelCheckpoint, OnExceptionCheckpoint


def told(caught: list[warnings.WarningMessage] | pytest.WarningsRecorder, text: str) -> list[str]:
    return [str(each.message) for each in caught if text in str(each.message)]


# Accumulation


@pytest.mark.parametrize(
    "arguments",
    [
        {"accumulate_grad_batches": 6},
        {"accumulate_grad_batches": 6, "reload_dataloaders_every_n_epochs": 1},
        {"accumulate_grad_batches": 3, "limit_train_batches": 2},
        {"callbacks": GradientAccumulationScheduler({1: 6})},
        {"callbacks": GradientAccumulationScheduler({0: 5, 1: 6, 2: 7})},
    ],
)
def test_an_accumulation_longer_than_an_epoch_is_told_once(tmp_path: Path, arguments: dict[str, Any]) -> None:
    run = trainer(tmp_path, max_epochs=4, **arguments)
    with pytest.warns(UserWarning) as caught:
        run.fit(Net(), loader())
    (message,) = told(caught, "accumulate_grad_batches=")
    assert "at the end of each epoch" in message


def test_an_accumulation_longer_than_a_stream_is_told_at_its_end(tmp_path: Path) -> None:
    class Stream(torch.utils.data.IterableDataset[Tensor]):
        def __iter__(self) -> Any:
            return iter(torch.ones(3, 4))

    with pytest.warns(UserWarning) as caught:
        trainer(tmp_path, max_epochs=2, accumulate_grad_batches=4).fit(
            Net(), torch.utils.data.DataLoader(Stream(), batch_size=1)
        )
    (message,) = told(caught, "accumulate_grad_batches=4 is more than the 3 batches")


@pytest.mark.filterwarnings("error")
def test_an_accumulation_that_an_epoch_has_room_for_is_not_told(tmp_path: Path) -> None:
    for accumulate in (1, 3, 4):
        trainer(tmp_path, max_epochs=2, accumulate_grad_batches=accumulate).fit(Net(), loader(), loader(2))
    trainer(tmp_path, max_steps=1, accumulate_grad_batches=3).fit(Net(), loader(), loader(2))


# Stops and things that are missing


class Worse(Net):
    def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", 1.0 + self.current_epoch)


def test_a_stop_that_min_epochs_puts_off_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stopping = EarlyStopping("val_loss", patience=1)
    run = trainer(tmp_path, max_epochs=9, min_epochs=6, callbacks=stopping)
    with caplog.at_level(logging.INFO):
        run.fit(Worse(), loader(), loader(2))
    assert caplog.text.count("Signaling Trainer to stop") == 1
    assert run.current_epoch == 6 and stopping.stopped_epoch == 5
    assert stopping.stopping_reason_message and "did not improve" in stopping.stopping_reason_message
    caplog.clear()
    with caplog.at_level(logging.INFO):
        trainer(tmp_path, max_epochs=9, callbacks=stopping).fit(Worse(), loader(), loader(2))
    assert caplog.text.count("Signaling Trainer to stop") == 1, "another fit tells of its own stop"


def test_another_reason_to_stop_is_told_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Diverging(Net):
        def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("val_loss", float("nan") if self.current_epoch > 3 else 1.0 + self.current_epoch)

    with caplog.at_level(logging.INFO):
        trainer(tmp_path, min_epochs=6, max_epochs=9, callbacks=EarlyStopping("val_loss", patience=1)).fit(
            Diverging(), loader(), loader(2)
        )
    assert caplog.text.count("did not improve") == caplog.text.count("is not finite") == 1


def test_a_metric_that_nobody_logs_is_told_once(tmp_path: Path) -> None:
    class Plateau(Net):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": scheduler, "monitor": "nothing", "strict": False},
            }

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(tmp_path, max_epochs=3, callbacks=EarlyStopping("nothing", strict=False)).fit(
            Plateau(), loader(), loader(2)
        )
    assert len(told(caught, "Early stopping does nothing")) == len(told(caught, "The step is skipped")) == 1


# What ended training


class Ending(L.Callback):
    def __init__(self, error: BaseException | None, at: str = "on_train_batch_end") -> None:
        self.error = error
        setattr(self, at, self.end)

    def end(self, *args: Any) -> None:
        if self.error is None:
            os.kill(os.getpid(), signal.SIGINT)
        else:
            raise self.error


@pytest.mark.parametrize("error", [None, MemoryError(), ValueError("too large.")])
def test_what_ended_training_is_a_sentence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, error: BaseException | None
) -> None:
    callbacks = [Ending(error), ModelCheckpoint(tmp_path, save_on_exception=True), OnExceptionCheckpoint(tmp_path)]
    run = trainer(tmp_path, enable_checkpointing=True, callbacks=callbacks)
    with caplog.at_level(logging.INFO):
        try:
            run.fit(Net(), loader())
        except (MemoryError, ValueError) as raised:
            assert raised is error
        except SystemExit:
            assert error is None
    how = {
        None: "Ctrl-C ended training.",
        MemoryError: "An error ended training: MemoryError.",
        ValueError: "An error ended training: ValueError: too large.",
    }[error if error is None else type(error)]
    said = [record.getMessage() for record in caplog.records if "The state was saved as" in record.getMessage()]
    assert len(said) == 2
    for path, message in zip([tmp_path / "epoch=0-step=1.ckpt", tmp_path / "on_exception.ckpt"], said, strict=True):
        assert message == f"{how} The state was saved as {str(path)!r}." and path.exists()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("where", ["missing", "configure_optimizers", "train_dataloader", "setup", "sanity check"])
def test_an_error_before_training_is_not_preceded_by_one_of_a_checkpoint(tmp_path: Path, where: str) -> None:
    class Failing(Net):
        def fail(self, *args: Any) -> Any:
            raise ZeroDivisionError

        def __init__(self) -> None:
            super().__init__()
            if where == "sanity check":
                self.validation_step = self.fail  # type: ignore[method-assign]
            elif where != "missing":
                setattr(self, where, self.fail)

    folder = tmp_path / "checkpoints"
    callbacks = [ModelCheckpoint(folder, save_on_exception=True, save_last=True), OnExceptionCheckpoint(folder)]
    run = trainer(tmp_path, enable_checkpointing=True, callbacks=callbacks)
    with pytest.raises((FileNotFoundError, ZeroDivisionError)):
        run.fit(
            Failing(),
            None if where == "train_dataloader" else loader(),
            loader(2),
            ckpt_path=tmp_path / "no.ckpt" if where == "missing" else None,
        )
    assert not folder.exists(), "there was nothing to save"
    if where == "missing":
        run = trainer(tmp_path, enable_checkpointing=True, callbacks=callbacks)
        run.fit(Net(), loader(), loader(2))
        with pytest.raises(FileNotFoundError):
            run.fit(Net(), loader(), loader(2), ckpt_path=tmp_path / "no.ckpt")
        assert sorted(path.name for path in folder.iterdir()) == ["epoch=0-step=4.ckpt", "last.ckpt"]
