"""Layers that share over the ranks: what a plugin does is done before the set-up, and undone at the end.

Tests of ``treadle.run.layer_sync`` and of ``treadle.trainer.assembly.sync_layers``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.processes import run_in_ranks
from tests.trainer.models import Net, loader, trainer
from torch import nn

import treadle as L
from treadle.plugins import AsyncCheckpointIO, LayerSync, TorchSyncBatchNorm


class Own(nn.BatchNorm2d):
    """A class of the user's."""


def test_batch_norm_is_shared_and_is_again_what_it_was() -> None:
    norms = [nn.BatchNorm1d(2), Own(3), nn.SyncBatchNorm(2), nn.BatchNorm3d(2, track_running_stats=False)]
    model = nn.Sequential(norms[0], nn.Sequential(*norms[1:]), norms[0], nn.InstanceNorm1d(2))
    calls: list[Any] = []
    norms[1].register_forward_hook(lambda *args: calls.append(args))
    norms[1].eval()
    before = {name: id(value) for name, value in model.state_dict(keep_vars=True).items()}
    sync = TorchSyncBatchNorm()
    assert sync.apply(model) is model and sync.apply(model) is model
    assert all(type(norm) is nn.SyncBatchNorm for norm in norms) and not norms[1].training
    assert {name: id(value) for name, value in model.state_dict(keep_vars=True).items()} == before
    norms[1](torch.ones(2, 3, 1, 1))
    assert sync.revert(model) is model
    assert [type(norm) for norm in norms] == [nn.BatchNorm1d, Own, nn.SyncBatchNorm, nn.BatchNorm3d]
    assert len(calls) == 1 and not hasattr(norms[0], "process_group")


def test_one_plugin_syncs_layers(tmp_path: Path) -> None:
    with pytest.raises(L.MisconfigurationException, match="plugins has TorchSyncBatchNorm and sync_batchnorm=True"):
        trainer(tmp_path, plugins=TorchSyncBatchNorm(), sync_batchnorm=True)
    with pytest.raises(L.MisconfigurationException, match="TorchSyncBatchNorm, TorchSyncBatchNorm, and one"):
        trainer(tmp_path, plugins=[TorchSyncBatchNorm(), TorchSyncBatchNorm()])
    run = trainer(tmp_path, plugins=iter([TorchSyncBatchNorm(), AsyncCheckpointIO()]))
    assert type(run.strategy.checkpoint_io).__name__ == "AsyncCheckpointIO"
    run.fit(Net(), loader(2))


class Means(LayerSync):
    """A plugin of the user's, which works on the CPU."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def apply(self, model: Any) -> Any:
        self.calls.append("apply")
        return model

    def revert(self, model: Any) -> Any:
        self.calls.append("revert")
        return model


class Other(Means):
    def apply(self, model: Any) -> Any:
        return nn.Identity()


class Normalized(Net):
    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.norm, self.fails = nn.BatchNorm1d(4), fails

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.fails:
            raise ZeroDivisionError
        return self.loss(self.norm(batch))


def in_ranks(path: Path) -> None:
    def fit(model: L.LightningModule, plugin: LayerSync) -> None:
        trainer(path, devices=2, strategy="ddp", plugins=[plugin]).fit(model, loader(8))

    fit(Net(), plugin := Means())
    assert plugin.calls == ["apply", "revert"]
    with pytest.raises(ZeroDivisionError):
        fit(Normalized(fails=True), plugin)
    assert plugin.calls == ["apply", "revert"] * 2
    with pytest.raises(L.MisconfigurationException, match="Other.apply made another module"):
        fit(Net(), Other())
    model = Normalized()
    with pytest.raises(L.MisconfigurationException, match="torch cannot share the statistics of 'norm'"):
        fit(model, TorchSyncBatchNorm())
    assert type(model.norm) is nn.BatchNorm1d


@pytest.mark.timeout(110)
def test_layers_are_shared_during_a_run_of_several_ranks(tmp_path: Path) -> None:
    run_in_ranks(in_ranks, tmp_path)
