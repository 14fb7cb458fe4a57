from __future__ import annotations

import os

import pytest
import torch
from tests.trainer.callbacks.scripted import Raises, ending_with, files, fit

from treadle.callbacks import OnExceptionCheckpoint
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


def test_an_empty_name_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="name"):
        OnExceptionCheckpoint("c", "")
