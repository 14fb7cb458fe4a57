"""Workers that Ray Train places and starts again: `python examples/clusters/ray_train.py`, with the extra `ray`.

Two workers train on this machine. With ``--kill`` one of them is killed in the middle of the second epoch: Ray starts
both again, they go on from the last checkpoint that was reported, and the result is the same.

On a cluster (``ray up``, KubeRay, or ``ray start`` on each machine), start the script on the head node with
``--workers N --storage /shared/folder``, and ``--gpu`` for a GPU a worker. Nothing else changes.
"""

from __future__ import annotations

import argparse
import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import treadle as L
from treadle.callbacks import RayTrainReportCallback


class Model(L.LightningModule):
    """Learns the sign of the product of two numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 1))

    def loss(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        return nn.functional.binary_cross_entropy_with_logits(self.net(x), y)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class KilledOnce(L.Callback):
    """Kills the process of rank 1, as the machine's kernel does when its memory runs out."""

    def __init__(self, flag: str) -> None:
        self.flag = Path(flag)

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 24 and not self.flag.exists():
            self.flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def samples(seed: int, number: int) -> TensorDataset:
    x = torch.rand(number, 2, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return TensorDataset(x, (x.prod(1, keepdim=True) > 0).float())


def train_loop_per_worker(config: dict[str, Any]) -> None:
    """Runs in each worker: ranks, machines and devices come from Ray."""
    L.seed_everything(0)
    report = RayTrainReportCallback()
    trainer = L.Trainer(
        max_epochs=config["epochs"],
        callbacks=[report, *([KilledOnce(config["kill"])] if config["kill"] else [])],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    train, validation = DataLoader(samples(1, 1024), 32, shuffle=True), DataLoader(samples(2, 256), 64)
    trainer.fit(Model(), train, validation, ckpt_path=report.ckpt_path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpu", action="store_true", help="a GPU for each worker")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--storage", default="ray_results", help="a folder that all machines share, or a URL")
    parser.add_argument("--kill", action="store_true", help="kill a worker in the second epoch")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trainer = TorchTrainer(
            train_loop_per_worker,
            train_loop_config={"epochs": given.epochs, "kill": str(Path(folder, "killed")) if given.kill else ""},
            scaling_config=ScalingConfig(num_workers=given.workers, use_gpu=given.gpu),
            run_config=RunConfig(
                storage_path=given.storage if "://" in given.storage else str(Path(given.storage).absolute()),
                failure_config=FailureConfig(max_failures=3),
            ),
        )
        result = trainer.fit()
        if given.kill:
            assert Path(folder, "killed").exists()
    print(f"epoch {result.metrics['epoch']}, step {result.metrics['step']}: val_loss {result.metrics['val_loss']:.6f}")
    print(f"checkpoint: {result.checkpoint.path}/checkpoint.ckpt")


if __name__ == "__main__":
    main()
