"""The program of these tests: it trains one small model in every way that its arguments name, and writes what came out.

Run as one process it gives what two hosts have to give, too. Rank 0 writes ``losses.json`` in its folder: the losses by
the name of the way.
"""

from __future__ import annotations

import argparse
import json
import socket
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import treadle as L
from treadle.callbacks import ModelCheckpoint
from treadle.loggers import CSVLogger
from treadle_fabric import rank_zero_only
from treadle_fabric.environments import KubeflowEnvironment

GLOBAL_BATCH, BATCHES, EPOCHS = 8, 6, 2


class Net(L.LightningModule):
    """Two layers that learn a sum."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
        self.folder = folder
        self.losses: list[float] = []

    def prepare_data(self) -> None:
        with open(self.folder / "prepared", "a") as file:
            file.write(f"{socket.gethostname()}\n")

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        inputs, targets = batch
        loss = nn.functional.mse_loss(self.layers(inputs), targets)
        self.log("loss", loss)
        self.losses.append(float(self.all_gather(loss.detach()).mean()))
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)

    def train_dataloader(self) -> Any:
        return loader(self.trainer.world_size)


def loader(world_size: int) -> DataLoader[Any]:
    """Batches that are, of all ranks together, the same for every number of ranks."""
    inputs = torch.randn(GLOBAL_BATCH * BATCHES, 6, generator=torch.Generator().manual_seed(3))
    return DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), GLOBAL_BATCH // world_size)


def with_trainer(common: dict[str, Any], folder: Path, last: int) -> list[float]:
    """Train an epoch with the Trainer, and each further one in a run that resumes from the checkpoint of the last."""
    losses: list[float] = []
    for epochs in range(1, last + 1):
        L.seed_everything(epochs, verbose=False)  # a resumed run must not depend on it
        trainer = L.Trainer(
            **common,
            max_epochs=epochs,
            logger=CSVLogger(folder, name="log"),
            log_every_n_steps=1,
            callbacks=ModelCheckpoint(folder / "checkpoints", save_last=True),
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        net = Net(folder)
        trainer.fit(net, ckpt_path="last" if epochs > 1 else None)
        losses += net.losses
    return losses


def with_fabric(common: dict[str, Any], folder: Path, last: int) -> list[float]:
    """Train in a hand-written loop, which spoils its weights in the middle and goes on from a checkpoint."""
    fabric = L.Fabric(**common)
    fabric.launch()
    fabric.seed_everything(1, verbose=False)
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), 0.1, momentum=0.9))
    losses: list[float] = []
    for step, (inputs, targets) in enumerate(fabric.setup_dataloaders(loader(fabric.world_size))):
        if step == BATCHES // 2 and last > 1:
            state = {"model": model, "optimizer": optimizer, "step": step}
            fabric.save(folder / "middle.ckpt", state)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.zero_()
            fabric.load(folder / "middle.ckpt", state)
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(inputs), targets)
        fabric.backward(loss)
        optimizer.step()
        losses.append(float(fabric.all_reduce(loss.detach())))
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ways", default="fabric-auto,trainer-auto", help="trainer or fabric, and a strategy, ...")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--num-nodes", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--kubeflow", action="store_true")
    given = parser.parse_args()
    out: dict[str, list[float]] = {}
    for way in given.ways.split(","):
        package, strategy = way.split("-")
        common: dict[str, Any] = {"accelerator": "cpu", "devices": given.devices, "num_nodes": given.num_nodes}
        common |= {"strategy": strategy, "plugins": KubeflowEnvironment() if given.kubeflow else None}
        folder = given.folder / way
        folder.mkdir(parents=True, exist_ok=True)
        out[way] = (with_trainer if package == "trainer" else with_fabric)(common, folder, given.epochs)
    if rank_zero_only.rank == 0:
        (given.folder / "losses.json").write_text(json.dumps(out))
