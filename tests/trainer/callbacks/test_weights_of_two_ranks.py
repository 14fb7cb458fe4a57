"""Averaged and pruned weights in two processes: all ranks have the same, and go on to the last bit."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest
import torch
from tests.processes import run_in_ranks
from tests.trainer.callbacks.averaged import Noted, SavesAt, batches, differing
from tests.trainer.callbacks.scripted import trainer_with

from treadle.callbacks import EMAWeightAveraging, ModelPruning, StochasticWeightAveraging

pytestmark = pytest.mark.timeout(110)


def ema() -> EMAWeightAveraging:
    return EMAWeightAveraging(decay=0.75)


def swa() -> StochasticWeightAveraging:
    return StochasticWeightAveraging(0.02, swa_epoch_start=1, annealing_epochs=2)


def pruning(resample: bool = False) -> ModelPruning:
    class OfLayers(ModelPruning):
        def filter_parameters_to_prune(self, parameters_to_prune: Any = ()) -> Any:
            return [(m, name) for m, name in parameters_to_prune if name == "weight"]

    return OfLayers("random_unstructured", amount=0.3, resample_parameters=resample)


def fit(name: str, callback: Any, *more: Any, ckpt_path: str | None = None) -> Noted:
    torch.manual_seed(3 + int(os.environ["LOCAL_RANK"]))  # ranks draw different numbers
    trainer = trainer_with(
        callback, *more, devices=2, strategy="ddp", max_epochs=2, num_sanity_val_steps=0, enable_checkpointing=False
    )
    model = Noted()
    trainer.fit(model, batches(6), batches(2), ckpt_path=ckpt_path)
    trainer.save_checkpoint(f"{name}.ckpt")
    averages = not isinstance(callback, ModelPruning)  # of the statistics of batch norm too, which else differ
    shared = model.state_dict().values() if averages else model.parameters()
    for each in (torch.cat([t.detach().flatten().float() for t in shared]), torch.stack(model.validated)):
        both = trainer.strategy.all_gather(each)
        assert torch.equal(both[0], both[1]), name
    return model


def run_rank() -> None:
    for name, make, hook, step in (
        ("ema", ema, "on_train_batch_end", 2),
        ("ema in a validation", ema, "on_validation_batch_end", 3),
        ("swa", swa, "on_train_batch_end", 4),
        ("pruning", pruning, "on_train_batch_end", 4),
        ("pruning with new values", lambda: pruning(True), "on_train_batch_end", 4),
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
