"""Checkpoints that are saved where gradients are those of no whole number of batches.

Tests of ``treadle.checkpoint.exact``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.trainer.models import Net, loader, trainer
from torch import Tensor

from treadle.callbacks import OnExceptionCheckpoint


class Failing(Net):
    """Fails in a place of a batch."""

    def __init__(self, where: str, at: int) -> None:
        super().__init__()
        self.where, self.at, self.seen = where, at, []  # type: str, int, list[int]

    def _fail(self, where: str) -> None:
        if where == self.where and self.seen[-1] == self.at:
            raise ZeroDivisionError(where)

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.seen.append(batch_idx)
        self._fail("step")
        return self.loss(batch)

    def on_before_backward(self, loss: Tensor) -> None:
        self._fail("before")

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]
        self._fail("backward")

    def on_after_backward(self) -> None:
        self._fail("after")

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self._fail("optimizer")


def train(folder: Path, where: str, at: int, ckpt_path: Path | None = None, **options: Any) -> Failing:
    model = Failing(where, at)
    run = trainer(
        folder, callbacks=OnExceptionCheckpoint(folder), enable_checkpointing=True, accumulate_grad_batches=2, **options
    )
    try:
        run.fit(model, loader(16), ckpt_path=ckpt_path)
    except ZeroDivisionError:
        assert run.global_step < 4
    return model


@pytest.mark.parametrize("where", ["step", "before", "backward", "after", "optimizer"])
def test_no_batch_is_counted_twice(tmp_path: Path, where: str) -> None:
    """After the backward pass has begun, what came before in the accumulation cannot be told from the batch."""
    whole = train(tmp_path, "nowhere", 0)
    train(tmp_path, where, 5)
    saved = tmp_path / "on_exception.ckpt"
    if where in ("step", "before"):
        again = train(tmp_path, "nowhere", 0, saved)
        assert torch.equal(again.layer.weight, whole.layer.weight)
        return
    with pytest.warns(UserWarning, match=r"backward pass of batch 5, .* 1 batch\(es\) of the same accumulation"):
        again = train(tmp_path, "nowhere", 0, saved)
    assert again.seen == [5, 6, 7]
    expected = Failing("nowhere", 0)
    rows = torch.cat([batch for i, batch in enumerate(loader(16)) if i != 4])
    trainer(tmp_path, accumulate_grad_batches=2).fit(expected, torch.utils.data.DataLoader(rows, batch_size=2))
    torch.testing.assert_close(again.layer.weight, expected.layer.weight, rtol=0, atol=1e-7)


def test_a_save_after_the_first_batch_of_an_accumulation_is_exact(tmp_path: Path) -> None:
    whole = train(tmp_path, "nowhere", 0)
    train(tmp_path, "after", 4)
    again = train(tmp_path, "nowhere", 0, tmp_path / "on_exception.ckpt")
    assert torch.equal(again.layer.weight, whole.layer.weight)


def test_a_later_fit_of_the_same_trainer_counts_no_batch_twice(tmp_path: Path) -> None:
    model = Failing("optimizer", 5)
    run = trainer(tmp_path, accumulate_grad_batches=2)
    with pytest.raises(ZeroDivisionError):
        run.fit(model, loader(16))
    model.where = "nowhere"
    with pytest.warns(UserWarning, match="backward pass of batch 5"):
        run.fit(model, loader(16))
    train(tmp_path, "optimizer", 5)
    with pytest.warns(UserWarning, match="backward pass of batch 5"):
        resumed = train(tmp_path, "nowhere", 0, tmp_path / "on_exception.ckpt")
    assert torch.equal(model.layer.weight, resumed.layer.weight)
