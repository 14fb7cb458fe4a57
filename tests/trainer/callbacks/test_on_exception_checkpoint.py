from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.processes import run_in_ranks
from tests.trainer.callbacks.scripted import Raises, ending_with, files, fit
from tests.trainer.models import Net, loader, trainer

from treadle.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint
from treadle_fabric.errors import MisconfigurationException


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
def test_it_saves_when_an_exception_ends_training_and_a_run_that_ends_well_removes_it(error: BaseException) -> None:
    callback = OnExceptionCheckpoint("c")
    assert callback.ckpt_path == os.path.join("c", "on_exception.ckpt")
    with ending_with(error):
        fit(callback, Raises(6, error), validate=False)
    assert files("c") == ["on_exception.ckpt"]
    assert torch.load(callback.ckpt_path, weights_only=True)["global_step"] == 6
    trainer = fit(callback, ckpt_path=callback.ckpt_path, validate=False)
    assert trainer.global_step == 12
    assert files("c") == []


def test_nothing_is_saved_without_an_exception() -> None:
    fit(OnExceptionCheckpoint("c", "x"), max_epochs=1, validate=False)
    assert not os.path.exists("c")


def test_the_exception_is_the_one_that_is_raised() -> None:
    open("c", "w").close()  # a file where the folder should be
    with pytest.warns(UserWarning, match="could not save"), pytest.raises(RuntimeError, match="boom"):
        fit(OnExceptionCheckpoint("c"), Raises(2), validate=False)


class RaisesOnRankOne(Callback):
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank == 1 and batch_idx == 1:
            raise RuntimeError("boom")


def fail_on_one_rank(folder: Path) -> None:
    callbacks = [RaisesOnRankOne(), OnExceptionCheckpoint(folder / "c"), ModelCheckpoint("d", save_on_exception=True)]
    trainer(folder, devices=2, strategy="fsdp", callbacks=callbacks, enable_checkpointing=True).fit(Net(), loader())


@pytest.mark.faults  # the other rank is ended after some seconds
def test_what_one_rank_saves_alone_does_not_meet_what_others_send_in_their_step(tmp_path: Path) -> None:
    with pytest.raises(AssertionError) as raised:
        run_in_ranks(fail_on_one_rank, tmp_path)
    said = str(raised.value)
    assert said.startswith("[1, 1]: ")  # a mismatch would abort the other rank
    assert "RuntimeError: boom" in said
    assert not (tmp_path / "c").exists() and not (tmp_path / "d").exists()


def test_an_empty_name_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="name"):
        OnExceptionCheckpoint("c", "")
