"""A logger of the author's own, every way to log, and metrics of torchmetrics."""

import json
import os
from argparse import Namespace
from typing import Any

import pytorch_lightning as pl
import torch
import torchmetrics
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.loggers.logger import Logger, rank_zero_experiment
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class ListLogger(Logger):
    """Keeps all in a list."""

    LOGGER_JOIN_CHAR = "/"

    def __init__(self, name: str = "list") -> None:
        super().__init__()
        self._name = name
        self.rows: list = []
        self.hparams: dict[str, Any] = {}
        self.saves = 0
        self.status: str | None = None

    @property
    def name(self) -> str:
        return self._name

    @property
    def version(self) -> int | str:
        return 0

    @property
    @rank_zero_experiment
    def experiment(self) -> list:
        return self.rows

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        self.hparams = vars(params) if isinstance(params, Namespace) else dict(params)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.experiment.append([step, {name: float(value).hex() for name, value in sorted(metrics.items())}])

    @rank_zero_only
    def save(self) -> None:
        self.saves += 1

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.status = status


class Logs(pl.LightningModule):
    def __init__(self, classes: int = 4, lr: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, classes))
        collection = torchmetrics.MetricCollection(
            {
                "acc": torchmetrics.Accuracy(task="multiclass", num_classes=classes),
                "f1": torchmetrics.F1Score(task="multiclass", num_classes=classes, average="macro"),
            }
        )
        self.train_metrics = collection.clone(prefix="train/")
        self.val_metrics = collection.clone(prefix="val/")
        self.confusion = torchmetrics.ConfusionMatrix(task="multiclass", num_classes=classes)
        self.mean = torchmetrics.MeanMetric()
        self.auroc = nn.ModuleList([torchmetrics.AUROC(task="multiclass", num_classes=classes) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        out = self(x)
        loss = nn.functional.cross_entropy(out, y)
        self.log("plain", loss)
        self.log("both", loss, on_step=True, on_epoch=True, prog_bar=True, logger=True)
        self.log("epoch", loss.detach(), on_step=False, on_epoch=True)
        self.log("largest", loss, reduce_fx="max", on_step=False, on_epoch=True)
        self.log("smallest", loss, reduce_fx=min, on_step=False, on_epoch=True)
        self.log("count", float(len(y)), reduce_fx="sum", on_step=False, on_epoch=True)
        self.log("weighted", loss, batch_size=batch_idx + 1, on_step=False, on_epoch=True)
        self.log("hidden", batch_idx, logger=False, prog_bar=True)
        self.log("integer", batch_idx, on_epoch=True)
        self.log("half", loss.half(), on_epoch=True)
        self.log("double", loss.double(), on_epoch=True)
        self.log("one element", loss.reshape(1))
        self.log_dict({"dict/a": loss, "dict/b": loss * 2}, on_step=True, on_epoch=True)
        self.log_dict(self.train_metrics(out, y), on_step=False, on_epoch=True)
        self.mean(loss)
        self.log("mean metric", self.mean, on_step=True, on_epoch=True)
        if batch_idx % 3 == 0:
            self.log("now and then", loss, on_step=True, on_epoch=True)
        self.logger.log_metrics({"direct": loss.item()}, step=self.global_step)
        return loss

    def on_train_epoch_end(self) -> None:
        self.log("at the end", float(self.current_epoch))

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        x, y = batch
        out = self(x)
        self.val_metrics.update(out, y) if dataloader_idx == 0 else self.confusion.update(out, y)
        self.auroc[dataloader_idx](out.softmax(1), y)
        self.log("val/auroc", self.auroc[dataloader_idx], on_step=True, on_epoch=True)
        self.log("val/loss", nn.functional.cross_entropy(out, y), on_step=True, on_epoch=True)
        self.log("val/total", nn.functional.cross_entropy(out, y, reduction="sum"), reduce_fx="sum")

    def on_validation_epoch_end(self) -> None:
        self.log_dict(self.val_metrics.compute())
        self.val_metrics.reset()
        self.log("val/diagonal", self.confusion.compute().diag().sum().float())
        self.confusion.reset()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.RMSprop(self.parameters(), lr=self.hparams.lr)


def main() -> None:
    pl.seed_everything(2024)
    x = torch.randn(500, 6)
    y = (x[:, :4] + 0.5 * torch.randn(500, 4)).argmax(1)
    train, val = TensorDataset(x[:330], y[:330]), TensorDataset(x[330:], y[330:])
    logger = ListLogger()
    trainer = pl.Trainer(
        max_epochs=3,
        logger=[logger, TensorBoardLogger("tb", default_hp_metric=False)],
        log_every_n_steps=4,
        val_check_interval=0.5,
        enable_progress_bar=False,
        enable_checkpointing=False,
    )
    model = Logs()
    trainer.fit(model, DataLoader(train, 32, shuffle=True), [DataLoader(val, 40), DataLoader(val, 64)])
    rows = {}
    for step, metrics in logger.rows:  # the same values whether a logger gets them in one call or in two
        rows.setdefault(step, {}).update(metrics)
    results = trainer.validate(model, [DataLoader(val, 40), DataLoader(val, 64)], verbose=False)
    with open(os.environ["LOSSES"], "w") as file:
        json.dump(
            {
                "rows": [[step, dict(sorted(row.items()))] for step, row in sorted(rows.items())],
                "hparams": logger.hparams,
                "status": logger.status,
                "callback": {k: float(v).hex() for k, v in sorted(trainer.callback_metrics.items())},
                "validated": [{k: v.hex() for k, v in sorted(result.items())} for result in results],
            },
            file,
        )


if __name__ == "__main__":
    main()
