from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_info
from pytorch_lightning.utilities.types import STEP_OUTPUT, OptimizerLRScheduler
from torch import Tensor, nn


class CharLM(pl.LightningModule):
    def __init__(self, vocabulary_size: int, embedding: int, hidden: int, lr: float, **kwargs: Any):
        super().__init__()
        self.save_hyperparameters(ignore=["kwargs"])
        self.embed = nn.Embedding(vocabulary_size, embedding)
        self.lstm = nn.LSTM(embedding, hidden, num_layers=2, dropout=0.1, batch_first=True)
        self.head = nn.Linear(hidden, vocabulary_size)
        self.criterion = nn.CrossEntropyLoss()
        self.validation_step_outputs: list[Tensor] = []
        self.history: list[dict[str, Any]] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.embed(x))[0])

    def _shared_step(self, batch: dict[str, Tensor]) -> Tensor:
        logits = self(batch["input"])
        return self.criterion(logits.flatten(0, 1), batch["target"].flatten())

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> STEP_OUTPUT:
        loss = self._shared_step(batch)
        self.log("loss/train", loss)
        return {"loss": loss, "detached": loss.detach()}

    def on_train_batch_end(self, outputs: STEP_OUTPUT, batch: Any, batch_idx: int) -> None:
        self.history.append({"step": self.global_step, "loss": outputs["detached"].item().hex()})

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> STEP_OUTPUT:
        loss = self._shared_step(batch)
        self.validation_step_outputs.append(loss)
        return loss

    def on_validation_epoch_end(self) -> None:
        loss = torch.stack(self.validation_step_outputs).mean()
        self.validation_step_outputs.clear()
        self.log_dict({"loss/val": loss, "perplexity/val": loss.exp()}, prog_bar=True)
        rank_zero_info(f"epoch {self.current_epoch}: {loss.item():.4f}")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.lr, weight_decay=0.01)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.2)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "monitor": "loss/val", "interval": "epoch"},
        }
