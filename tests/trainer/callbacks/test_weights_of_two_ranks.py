"""Callbacks that decide which weights are saved, in two processes: all ranks have the same, and go on to the last bit."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from tests.processes import run_in_ranks
from tests.trainer.callbacks.averaged import Noted, SavesAt, batches, differing
from tests.trainer.callbacks.scripted import trainer_with

from treadle.callbacks import EMAWeightAveraging, StochasticWeightAveraging

pytestmark = pytest.mark.timeout(110)


def ema() -> EMAWeightAveraging:
    return EMAWeightAveraging(decay=0.75)


def swa() -> StochasticWeightAveraging:
    return StochasticWeightAveraging(0.02, swa_epoch_start=1, annealing_epochs=2)


def fit(name: str, callback: Any, *more: Any, ckpt_path: str | None = None) -> Noted:
    torch.manual_seed(3)
    trainer = trainer_with(
        callback, *more, devices=2, strategy="ddp", max_epochs=2, num_sanity_val_steps=0, enable_checkpointing=False
    )
    model = Noted()
    trainer.fit(model, batches(6), batches(2), ckpt_path=ckpt_path)
    trainer.save_checkpoint(f"{name}.ckpt")
    mine = torch.cat([t.flatten().float() for t in model.state_dict().values()])
    both = trainer.strategy.all_gather(mine)
    assert torch.equal(both[0], both[1]), name  # weights, and the statistics of batch norm
    assert torch.equal(*trainer.strategy.all_gather(torch.stack(model.validated))), name
    return model


def run_rank() -> None:
    for name, make, hook, step in (
        ("ema", ema, "on_train_batch_end", 2),
        ("ema in a validation", ema, "on_validation_batch_end", 3),
        ("swa", swa, "on_train_batch_end", 4),
    ):
        whole = fit("whole", make(), SavesAt(hook, step, "at.ckpt"))
        again = fit("again", make(), ckpt_path="at.ckpt")
        assert torch.equal(whole.weight, again.weight), name
        found = differing(torch.load("whole.ckpt"), torch.load("again.ckpt"))
        assert not found, (name, found)
    print("done", flush=True)
    sys.stdout.flush()


def test_averages_of_two_ranks() -> None:
    assert run_in_ranks(run_rank).count("done") == 2
