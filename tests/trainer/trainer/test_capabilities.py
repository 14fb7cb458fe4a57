"""What a strategy declares is all that Fabric and the Trainer ask it: a fake strategy for each capability.

Tests of ``treadle.trainer.assembly``, ``treadle_fabric.strategies.strategy``.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.trainer.models import Net, loader, trainer
from torch import nn
from torch.optim import Optimizer

import treadle as L
from treadle_fabric import DistributedCheckpointIO, Fabric, MisconfigurationException, SingleDeviceStrategy


class Recording(SingleDeviceStrategy):
    """Writes down what it is asked to do, and then does it as on a single device."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def setup_module(self, module: nn.Module) -> nn.Module:
        self.calls.append("set up the module")
        return super().setup_module(module)

    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        self.calls.append("set up an optimizer")
        return super().setup_optimizer(optimizer)

    def load_module_state_dict(self, module: nn.Module, state_dict: dict[str, Any], strict: bool = True) -> None:
        self.calls.append("load weights")
        super().load_module_state_dict(module, state_dict, strict)


def fit(strategy: SingleDeviceStrategy, tmp_path: Path, ckpt_path: Path | None = None, **arguments: Any) -> L.Trainer:
    run = trainer(tmp_path, strategy=strategy, max_epochs=2, **arguments)
    run.fit(Net(), loader(), ckpt_path=ckpt_path)
    return run


def same_weights(one: L.Trainer, other: L.Trainer) -> bool:
    pairs = zip(one.lightning_module.parameters(), other.lightning_module.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    run = trainer(tmp_path)
    run.fit(Net(), loader())
    run.save_checkpoint(tmp_path / "one.ckpt")
    return tmp_path / "one.ckpt"


@pytest.mark.parametrize("late", [False, True])
def test_weights_are_restored_before_or_after_the_set_up(late: bool, checkpoint: Path, tmp_path: Path) -> None:
    class Strategy(Recording):
        restores_after_setup = late

    strategy = Strategy()
    run = fit(strategy, tmp_path, checkpoint)
    assert strategy.calls[:2] == (
        ["set up the module", "load weights"] if late else ["load weights", "set up the module"]
    )
    assert same_weights(run, fit(SingleDeviceStrategy(), tmp_path, checkpoint))


class Joint(Recording):
    sets_up_jointly = True

    def setup_module_and_optimizers(
        self, module: nn.Module, optimizers: Iterable[Optimizer], scheduler: Any | None = None
    ) -> tuple[nn.Module, list[Optimizer], Any | None]:
        self.calls.append(f"set up both, {len(list(optimizers))} optimizer")
        return module, list(optimizers), scheduler


def test_module_and_optimizers_are_set_up_in_one_call(checkpoint: Path, tmp_path: Path) -> None:
    strategy = Joint()
    run = fit(strategy, tmp_path, checkpoint)
    assert strategy.calls == ["load weights", "set up both, 1 optimizer"]
    assert len(run.optimizers) == 1 and run.global_step == 8
    assert same_weights(run, fit(SingleDeviceStrategy(), tmp_path, checkpoint))


def test_without_optimizers_the_module_is_set_up_alone(tmp_path: Path) -> None:
    strategy = Joint()
    trainer(tmp_path, strategy=strategy).validate(Net(), loader(), verbose=False)
    assert strategy.calls == ["set up the module"]


def test_optimizers_alone_are_refused_where_both_are_set_up_together() -> None:
    fabric = Fabric(accelerator="cpu", strategy=Joint())
    net = nn.Linear(1, 1)
    fabric.setup_module(net)
    with pytest.raises(MisconfigurationException, match=r"Joint sets up a module and its optimizers together"):
        fabric.setup_optimizers(torch.optim.SGD(net.parameters(), 0.1))


class Materializing(Recording):
    initializes_on_meta = True

    def setup_module(self, module: nn.Module) -> nn.Module:
        self.calls.append(f"meta: {next(module.parameters()).is_meta}")
        return module.to_empty(device=self.root_device)


def test_a_module_on_the_meta_device_is_made_real_by_the_strategy() -> None:
    fabric = Fabric(accelerator="cpu", strategy=(strategy := Materializing()))
    with fabric.init_module(empty_init=True):
        net = nn.Linear(2, 2)
    assert next(net.parameters()).is_meta
    fabric.setup_module(net)
    assert strategy.calls == ["meta: True"] and not next(net.parameters()).is_meta


def test_a_module_on_the_meta_device_is_refused_by_others() -> None:
    with torch.device("meta"):
        net = nn.Linear(2, 2)
    with pytest.raises(MisconfigurationException, match=r"'weight' is on the meta device.*to_empty"):
        Fabric(accelerator="cpu", devices=1).setup_module(net)


def test_a_strategy_that_shards_saves_folders(tmp_path: Path) -> None:
    class Sharding(Recording):
        shards_parameters = writes_folders = True

    strategy = Sharding()
    assert isinstance(strategy.checkpoint_io, DistributedCheckpointIO)
    fabric = Fabric(accelerator="cpu", strategy=strategy)
    model = fabric.setup_module(nn.Linear(2, 2))
    fabric.save(tmp_path / "model.ckpt", {"model": model})
    assert (tmp_path / "model.ckpt").is_dir()


class Saving(L.Callback):
    """Saves in the middle of an accumulation."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if trainer.current_epoch == 1 and args[-1] == 0:
            trainer.save_checkpoint(self.path)


def test_gradients_of_shards_are_saved_with_the_state_that_all_ranks_share(tmp_path: Path) -> None:
    class Sharding(Recording):
        shards_parameters = True

    path = tmp_path / "within.ckpt"
    whole = fit(Sharding(), tmp_path, accumulate_grad_batches=2, callbacks=Saving(path))
    saved = DistributedCheckpointIO().load_checkpoint(path)["treadle"]
    assert saved["gradients"].keys() == {"layer.weight", "layer.bias"}
    assert not any("gradients" in part for part in saved["ranks"])
    assert same_weights(whole, fit(Sharding(), tmp_path, path, accumulate_grad_batches=2))
