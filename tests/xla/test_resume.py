"""Trainers on several devices of XLA: resumed runs, files and folders for the CPU, unequal numbers of batches.

Tests of ``treadle_fabric.strategies.xla``, ``treadle_fabric.strategies.xla_fsdp``,
``treadle_fabric.strategies.on_xla.sharded``: `make test-xla`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint
import torch.distributed.fsdp
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import treadle as L
from tests.processes import run_in_ranks
from treadle_fabric.strategies import XLAFSDPStrategy

pytestmark = [pytest.mark.xla, pytest.mark.timeout(600)]

QUIET: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
STRATEGIES = {
    "xla": lambda: "xla",
    "sharded": lambda: XLAFSDPStrategy(auto_wrap_policy={Layer}),
    "full": lambda: XLAFSDPStrategy(auto_wrap_policy={Layer}, state_dict_type="full"),
}


class Layer(nn.Linear):
    """What the policy wraps."""


class Net(L.LightningModule):
    """Two layers, of sizes that two processes cannot share out evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(Layer(4, 5), nn.Dropout(0.5), Layer(5, 3))
        self.losses: list[Tensor] = []
        self.seen = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = self.layers(batch[0]).square().mean()
        self.losses.append(loss.detach())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen += 1
        if len(batch[0]) > 1:  # a batch of one sample is of no use
            self.log("val_loss", self.layers(batch[0]).square().mean(), batch_size=len(batch[0]))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def loader(samples: int) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.linspace(-1, 1, samples * 4).view(samples, 4)), batch_size=2)


def weights(module: Net) -> dict[str, Tensor]:
    state = module.state_dict()
    return {n: (t.full_tensor() if hasattr(t, "full_tensor") else t).cpu().clone() for n, t in state.items()}


def fit(strategy: Any, saver: L.Callback, ckpt_path: str | None = None, **where: Any) -> tuple[Net, dict[str, Tensor]]:
    L.seed_everything(3, verbose=False)
    where = {"accelerator": "tpu", "devices": 2, **where}
    arguments: Any = {"max_epochs": 1, "accumulate_grad_batches": 2, "callbacks": saver, "limit_val_batches": 0}
    trainer = L.Trainer(strategy=strategy, enable_checkpointing=False, **arguments, **where, **QUIET)
    kept: dict[str, Tensor] = {}
    module = Net()
    module.on_train_end = lambda: kept.update(weights(module))  # type: ignore[method-assign]
    trainer.fit(module, loader(32), ckpt_path=ckpt_path)
    return module, kept


class SavesAt(L.Callback):
    """Saves within an accumulation, and keeps the weights of that moment."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.weights: dict[str, Tensor] = {}

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 4:
            trainer.save_checkpoint(self.path)
            self.weights = weights(module)


def resume(folder: Path, kind: str) -> None:
    path = str(folder / f"{kind}.ckpt")
    saver = SavesAt(path)
    module, after = fit(STRATEGIES[kind](), saver)
    assert Path(path).is_dir() == (kind == "sharded")
    again, resumed = fit(STRATEGIES[kind](), L.Callback(), path)
    assert [float(x) for x in again.losses] == [float(x) for x in module.losses[5:]]
    assert all(torch.equal(resumed[name], tensor) for name, tensor in after.items())
    if torch.distributed.get_rank() == 0:
        torch.save({"saved": saver.weights, "after": after}, folder / f"{kind}.pt")


def resume_all(folder: Path) -> None:
    for kind in STRATEGIES:
        resume(folder, kind)


def go_on_the_cpu(folder: Path, strategy: str, processes: int) -> None:
    for kind in STRATEGIES:
        expected = torch.load(folder / f"{kind}.pt")["saved"]
        kept: dict[str, Tensor] = {}

        class Begins(L.Callback):
            def on_train_start(self, trainer: Any, module: Any, kept: Any = kept) -> None:
                kept.update(weights(module))

        fit(strategy, Begins(), str(folder / f"{kind}.ckpt"), accelerator="cpu", devices=processes)
        assert kept.keys() == expected.keys()
        assert all(torch.equal(kept[name], tensor) for name, tensor in expected.items()), kind


def test_runs_are_resumed_exactly_and_on_the_cpu(tmp_path: Path) -> None:
    run_in_ranks(resume_all, tmp_path, timeout=500)
    run_in_ranks(go_on_the_cpu, tmp_path, "auto", 1, devices=1, timeout=200)
    run_in_ranks(go_on_the_cpu, tmp_path, "fsdp", 2, timeout=200)


def validate() -> None:
    trainer = L.Trainer(
        accelerator="tpu", devices=2, strategy=STRATEGIES["sharded"](), use_distributed_sampler=False, **QUIET
    )
    module, rank = Net(), trainer.global_rank
    (found,) = trainer.validate(module, loader(6 + 4 * rank), verbose=False)  # three batches, and five
    assert module.seen == 3 + 2 * rank
    assert found["val_loss"] > 0
    module.seen = 0
    trainer.validate(module, loader(6 - rank), verbose=False)  # the last batch of rank 1 ends its step early
    assert module.seen == 3


def test_unequal_numbers_of_batches() -> None:
    run_in_ranks(validate, timeout=300)
