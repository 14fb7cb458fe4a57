"""Programs that run on torch 2.9 as they do on a later one.

Tests of ``treadle_fabric.checkpoint.values.states``, ``treadle_fabric.precision.float8``, ``treadle.loops.schedulers``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, StepLR
from torch.optim.swa_utils import SWALR

from treadle.loops import schedulers
from treadle_fabric import Fabric, MisconfigurationException, MissingPackageError
from treadle_fabric.checkpoint import state_of
from treadle_fabric.precision import float8


def sgd() -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1)


class Holder:
    """Keeps one of its own functions in its state, as SWALR of torch 2.9 does, and one that it was given."""

    def __init__(self, given: Any) -> None:
        self.own, self.given, self.count = self.half, given, 3

    @staticmethod
    def half(value: float) -> float:
        return value / 2

    def state_dict(self) -> dict[str, Any]:
        return vars(self)


def test_a_state_is_without_the_functions_of_its_class() -> None:
    given = lambda value: value  # noqa: E731 # which only the program has
    assert state_of(Holder(given)) == {"given": given, "count": 3}
    assert set(sgd().state_dict()) == set(state_of(sgd()))


def test_an_annealing_scheduler_is_saved_and_loaded(tmp_path: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    before, after = (SWALR(sgd(), 0.02, anneal_epochs=4, anneal_strategy="linear") for _ in range(2))
    for scheduler in (before, before, after):
        scheduler.optimizer.step()
        scheduler.step()
    saved, loaded = ({"scheduler": each, "optimizer": each.optimizer} for each in (before, after))
    fabric.save(tmp_path / "state.ckpt", saved)  # a warning that a value is pickled would be an error
    fabric.load(tmp_path / "state.ckpt", loaded)
    after.step()
    before.step()
    assert after.last_epoch == 3 and after.get_last_lr() == before.get_last_lr()


def test_a_scheduler_that_would_leave_out_an_added_group() -> None:
    optimizer = sgd()
    scheduler = LambdaLR(optimizer, lambda epoch: 0.5)
    schedulers._check_groups(scheduler)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    with pytest.raises(MisconfigurationException, match="LambdaLR was made for 1 parameter groups, and.* has 2"):
        schedulers._check_groups(scheduler)
    assert not isinstance(StepLR(optimizer, 1), schedulers._PER_GROUP)


def test_a_torchao_that_does_not_go_with_the_torch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.float8", None)  # importing it raises, as torchao 0.18 does on torch 2.9
    float8._template.cache_clear()
    with pytest.raises(MissingPackageError, match=r"does not work with this torch, .*torchao 0\.17 with torch 2\.9"):
        float8._template("tensorwise", True)
