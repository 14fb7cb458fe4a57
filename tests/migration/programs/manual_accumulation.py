"""Manual optimization: two optimizers, a scheduler for each, gradients of several batches, clipping by hand."""

import json
import os
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer, seed_everything
from pytorch_lightning.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR, StepLR


class TwoTowers(LightningModule):
    """Queries and documents that should meet."""

    def __init__(self, batches: int, features: int = 12, accumulate: int = 3) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.batches, self.accumulate = batches, accumulate
        self.query = nn.Sequential(nn.Linear(features, 16), nn.Tanh(), nn.Linear(16, 8))
        self.document = nn.Sequential(nn.Linear(features, 16), nn.Tanh(), nn.Linear(16, 8))
        self.register_buffer("temperature", torch.tensor(0.3))
        self.seen: list[str] = []
        self.rates: list[list[str]] = []

    def loss(self, batch: Any) -> Tensor:
        a, b = batch
        logits = nn.functional.normalize(self.query(a)) @ nn.functional.normalize(self.document(b)).T / self.temperature
        return nn.functional.cross_entropy(logits, torch.arange(len(a), device=self.device))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers = self.optimizers()
        assert isinstance(optimizers, list) and all(isinstance(o, LightningOptimizer) for o in optimizers)
        loss = self.loss(batch)
        self.manual_backward(loss / self.accumulate)
        if (batch_idx + 1) % self.accumulate == 0 or self.trainer.is_last_batch:
            for optimizer in optimizers:
                self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
                optimizer.step()
                optimizer.zero_grad()
            one_cycle, _ = self.lr_schedulers()
            one_cycle.step()
        self.log("train_loss", loss, prog_bar=True, on_step=True, on_epoch=True)
        self.seen.append(loss.item().hex())

    def on_train_epoch_end(self) -> None:
        _, step_lr = self.lr_schedulers()
        step_lr.step()
        self.rates.append([group["lr"].hex() for o in self.optimizers() for group in o.param_groups])

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("val_loss", loss)
        return loss

    def configure_optimizers(self):
        query = torch.optim.AdamW(self.query.parameters(), lr=1e-3)
        document = torch.optim.SGD(self.document.parameters(), lr=0.5, momentum=0.8, nesterov=True)
        steps = self.trainer.max_epochs * -(-self.batches // self.accumulate)
        return [query, document], [OneCycleLR(query, 0.02, total_steps=steps + 1), StepLR(document, 1, gamma=0.7)]


def main() -> None:
    seed_everything(11)
    a = torch.randn(320, 12)
    b = a @ torch.randn(12, 12) * 0.3 + 0.1 * torch.randn(320, 12)
    data = torch.utils.data.TensorDataset(a, b)
    loader = torch.utils.data.DataLoader(data, 16, shuffle=True)
    model = TwoTowers(batches=len(loader))
    trainer = Trainer(max_epochs=3, log_every_n_steps=4, enable_model_summary=False, enable_progress_bar=False)
    trainer.fit(model, loader, torch.utils.data.DataLoader(data, 64))
    result = {
        "losses": model.seen,
        "rates": model.rates,
        "metrics": {name: value.item().hex() for name, value in sorted(trainer.callback_metrics.items())},
        "steps": trainer.global_step,
    }
    with open(os.environ["LOSSES"], "w") as file:
        json.dump(result, file)


if __name__ == "__main__":
    main()
