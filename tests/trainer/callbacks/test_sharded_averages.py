"""Averages of weights of which each rank holds a part: as those of one process, saved, and resumed to the last bit.

Tests of ``treadle.callbacks.averaging``, ``treadle.loops.forward_epoch``.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint
import torch.distributed.fsdp  # heavy; forked ranks have it
from tests.processes import run_in_ranks
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import treadle as L
from treadle.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from treadle_fabric.strategies import FSDPStrategy

SAMPLES = torch.randn(16, 5, generator=torch.Generator().manual_seed(1))


class Norms(L.LightningModule):
    """A weight that two ranks do not share evenly, and batch norm."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.body = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7) if norm else nn.Identity(), nn.Linear(7, 3))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        self.scores: list[float] = []

    def training_step(self, batch: Any) -> Tensor:
        return self.body(batch[0]).square().mean()

    def validation_step(self, batch: Any) -> None:
        self.log("score", self.body(batch[0]).square().sum(), reduce_fx="sum", sync_dist=True)

    def on_validation_end(self) -> None:
        self.scores.append(float(self.trainer.callback_metrics["score"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 0.01)


def fit(module: L.LightningModule, average: L.Callback, ranks: int, saver: L.Callback, **arguments: Any) -> L.Trainer:
    strategy: dict[str, Any] = {"strategy": FSDPStrategy(policy={nn.Linear})} if ranks > 1 else {}
    ckpt_path = arguments.pop("ckpt_path", None)
    trainer = L.Trainer(
        accelerator="cpu", devices=ranks, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[average, saver], max_epochs=4, num_sanity_val_steps=0, **strategy, **arguments,
    )  # fmt: skip
    train = DataLoader(TensorDataset(SAMPLES), batch_size=4 // ranks, shuffle=False)
    trainer.fit(module, train, DataLoader(TensorDataset(SAMPLES[:5]), batch_size=1), ckpt_path=ckpt_path)
    return trainer


def whole(module: nn.Module) -> dict[str, Tensor]:
    state = {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in module.state_dict().items()}
    return {name: t.clone() for name, t in state.items()}


def close(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-5, atol=1e-6, msg=name)


def _averages(folder: str) -> None:
    swa = partial(StochasticWeightAveraging, 0.02, 2, annealing_epochs=1)
    ema = partial(EMAWeightAveraging, decay=0.5)
    rank = os.environ["LOCAL_RANK"]
    for name, average, norm in (("swa", swa, True), ("ema", ema, False)):
        own, path = Path(folder) / name, str(Path(folder) / name / "step=10.ckpt")
        every = partial(ModelCheckpoint, filename="{step}", every_n_train_steps=5, save_top_k=-1)
        alone, together, again, single = (Norms(norm) for _ in range(4))
        fit(alone, average(), 1, every(own / f"alone{rank}"))  # by each rank, as if there were no other one
        fit(together, average(), 2, every(own))
        found = whole(together)
        assert found["body.0.weight"].shape == (7, 5)
        if not norm:  # whose statistics are those of each rank's own samples
            close(found, whole(alone))
            torch.testing.assert_close(torch.tensor(together.scores), torch.tensor(alone.scores))
        # a run that goes on from the folder is the same one, to the last bit
        fit(again, average(), 2, ModelCheckpoint(own / "again"), ckpt_path=path)
        assert all(torch.equal(value, found[key]) for key, value in whole(again).items())
        assert again.scores == together.scores[-len(again.scores) :]
        if not norm:  # and one process goes on with it
            fit(single, average(), 1, ModelCheckpoint(own / f"single{rank}"), ckpt_path=path)
            close(whole(single), found)


def test_averages_of_parts(tmp_path: Path) -> None:
    run_in_ranks(_averages, str(tmp_path), timeout=40)
