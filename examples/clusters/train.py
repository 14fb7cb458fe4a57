"""One training script for every kind of cluster: it goes on from its newest checkpoint, whatever started it again.

python examples/clusters/train.py --epochs 2                                          # on this machine
torchrun --nproc-per-node 2 examples/clusters/train.py --epochs 2
srun python examples/clusters/train.py --devices 4 --nodes $SLURM_NNODES              # see slurm.sh
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import treadle as L
from treadle.callbacks import ModelCheckpoint


class Regression(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x), y)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--devices", default="auto", help="processes on each machine")
    # torchrun says how many machines there are at the moment; a job's script passes the number.
    parser.add_argument("--nodes", type=int, default=int(os.environ.get("GROUP_WORLD_SIZE", "1")), help="machines")
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--root", default="runs/regression", help="a folder that all machines see")
    return parser.parse_args(arguments)


def main(given: argparse.Namespace, plugins: Any = None) -> int:
    """Train, and return the number of steps."""
    L.seed_everything(0)
    x = torch.randn(4096, 16)
    data = TensorDataset(x, x.sin().sum(1, keepdim=True))
    trainer = L.Trainer(
        accelerator=given.accelerator,
        devices=given.devices,
        num_nodes=given.nodes,
        strategy=given.strategy,
        plugins=plugins,
        max_epochs=given.epochs,
        default_root_dir=given.root,
        auto_resume=True,  # from the newest checkpoint, the one of a job that was queued again included
        callbacks=[ModelCheckpoint(dirpath=os.path.join(given.root, "checkpoints"), every_n_train_steps=32)],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Regression(), DataLoader(data, batch_size=64, shuffle=True))
    trainer.print(f"trained to step {trainer.global_step} on {trainer.world_size} processes")
    return trainer.global_step


if __name__ == "__main__":
    main(parse())
