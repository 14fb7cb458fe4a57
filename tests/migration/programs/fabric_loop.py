"""A hand-written loop over Fabric, with one process or two: `python fabric_loop.py --devices 2`."""

import argparse
import json
import os

import torch
import torchmetrics
from lightning.fabric import Fabric, seed_everything
from lightning.fabric.loggers import CSVLogger
from lightning.fabric.strategies import DDPStrategy
from lightning.fabric.utilities import rank_zero_only
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Events:
    def on_epoch(self, epoch, total):
        self.last = (epoch, total)


@rank_zero_only
def write(result):
    with open(os.environ["LOSSES"], "w") as file:
        json.dump(result, file)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--shuffle", action="store_true")
    parser.add_argument("--accumulate", type=int, default=2)
    options = parser.parse_args()

    events = Events()
    fabric = Fabric(
        accelerator="cpu",
        devices=options.devices,
        strategy=DDPStrategy(process_group_backend="gloo", find_unused_parameters=False)
        if options.devices > 1
        else "auto",
        precision="bf16-mixed",
        callbacks=[events],
        loggers=CSVLogger("logs", name="fabric"),
    )
    fabric.launch()
    seed_everything(17 + fabric.global_rank)

    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    train, val = TensorDataset(x[:1400], y[:1400]), TensorDataset(x[1400:1780], y[1400:1780])
    train_loader, val_loader = fabric.setup_dataloaders(
        DataLoader(train, 50, shuffle=options.shuffle, drop_last=True), DataLoader(val, 95)
    )

    with fabric.init_module():
        model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=10)
    model, optimizer = fabric.setup(model, optimizer)
    accuracy = torchmetrics.classification.MulticlassAccuracy(10, average="micro").to(fabric.device)

    losses, norms, reduced, validated = [], [], [], []
    for epoch in range(2):
        model.train()
        for i, (data, target) in enumerate(train_loader):
            accumulating = (i + 1) % options.accumulate != 0
            with fabric.no_backward_sync(model, enabled=accumulating):
                loss = nn.functional.cross_entropy(model(data), target)
                fabric.backward(loss / options.accumulate)
            losses.append(loss.item().hex())
            if not accumulating:
                norms.append(fabric.clip_gradients(model, optimizer, max_norm=1.0).item().hex())
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                scheduler.step()
            reduced.append(fabric.all_reduce(loss.detach(), reduce_op="mean").item().hex())
            fabric.log("loss", loss.item(), step=len(losses))
        model.eval()
        with torch.no_grad():
            for data, target in val_loader:
                out = model(data)
                accuracy(out, target)
                gathered = fabric.all_gather(nn.functional.cross_entropy(out, target))
                validated.append([value.hex() for value in gathered.flatten().tolist()])
        validated.append(accuracy.compute().item().hex())
        accuracy.reset()
        fabric.call("on_epoch", epoch=epoch, total=2)
        state = {"model": model, "optimizer": optimizer, "epoch": epoch, "scheduler": scheduler}
        fabric.save("fabric.ckpt", state)
        fabric.barrier()

    with fabric.rank_zero_first():
        sizes = os.path.getsize("fabric.ckpt")
    assert sizes > 0
    rest = fabric.load("fabric.ckpt")
    scale = torch.tensor([fabric.global_rank + 1.0])
    write(
        {
            "losses": losses,
            "norms": norms,
            "reduced": reduced,
            "validated": validated,
            "weights": sum(v.double().sum() for v in rest["model"].values()).item().hex(),
            "broadcast": fabric.broadcast({"value": losses[-1]}),
            "epoch": [rest["epoch"], events.last],
            "rate": optimizer.param_groups[0]["lr"].hex(),
            "world": [fabric.world_size, fabric.global_rank, fabric.is_global_zero, str(fabric.device), scale.item()],
        }
    )


if __name__ == "__main__":
    main()
