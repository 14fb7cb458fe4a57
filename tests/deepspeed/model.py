"""Rows of the equality suite for DeepSpeed, which tests of two processes run one after the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader

import treadle as L
from tests.equality.layouts import LAYOUTS, Layout
from tests.equality.model import ACCUMULATE, BATCH, CLIP, Model, Tokens, parameter_groups
from treadle_fabric import Fabric
from treadle_fabric.strategies import DeepSpeedStrategy

__all__ = ["PLAIN", "ZERO", "fabric_loop", "go_on", "trainer_fit"]


def zero(stage: int, **arguments: Any) -> Any:
    return lambda clip=None: DeepSpeedStrategy(
        stage=stage, config=None if clip is None else _config(stage, clip), **arguments
    )


def _config(stage: int, clip: float) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage}, "gradient_clipping": clip}


ZERO = [
    Layout("deepspeed1", 2, zero(1)),
    Layout("deepspeed2", 2, zero(2)),
    Layout("deepspeed3", 2, zero(3)),
    Layout("deepspeed2_offload", 2, zero(2, offload_optimizer=True)),
    Layout("deepspeed3_offload", 2, zero(3, offload_optimizer=True, offload_parameters=True)),
    Layout("deepspeed0", 2, zero(0)),  # without ZeRO
]
PLAIN = [layout for layout in LAYOUTS if layout.name in ("ddp2", "fsdp2")]


def whole_weights(strategy: Any, model: nn.Module) -> dict[str, Tensor]:
    """The weights, on rank 0."""
    found = strategy.get_module_state_dict(model)
    return {name: t.full_tensor() if hasattr(t, "full_tensor") else t.detach().clone() for name, t in found.items()}


def fabric_loop(layout: Layout, precision: str = "32-true") -> dict[str, Any]:
    """Train with a hand-written loop; returns the losses of the global batches, and the weights."""
    strategy = layout.strategy(CLIP) if layout in ZERO else layout.strategy()  # type: ignore[call-arg]
    fabric = Fabric(accelerator="cpu", devices=layout.processes, strategy=strategy, precision=precision)
    fabric.launch()
    torch.manual_seed(0)
    model: Any = Model()
    optimizer: Any = AdamW(parameter_groups(model), lr=1e-2)
    model, optimizer = fabric.setup(model, optimizer)
    model.mark_forward_method("loss_of")
    scheduler = StepLR(optimizer.optimizer, 2, gamma=0.5)
    losses = []
    for i, batch in enumerate(fabric.setup_dataloaders(DataLoader(Tokens(), batch_size=BATCH // layout.processes))):
        steps = i % ACCUMULATE == ACCUMULATE - 1
        with fabric.no_backward_sync(model, enabled=not steps):
            loss = model.loss_of(batch)
            fabric.backward(loss / ACCUMULATE)
        if steps:
            if not fabric.strategy.handles_gradient_clipping:
                fabric.clip_gradients(model, optimizer, max_norm=CLIP)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        losses.append(fabric.all_reduce(loss.detach()).item())
    return {"losses": losses, "weights": whole_weights(fabric.strategy, model)}


class Trained(L.LightningModule):
    """The model under the Trainer."""

    def __init__(self, save_at: tuple[int, Path] | None) -> None:
        super().__init__()
        self.model = Model()
        self.save_at = save_at
        self.losses: list[float] = []
        self.steps: list[int] = []
        self.rates: list[float] = []
        self.weights: dict[str, Tensor] = {}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.model.loss_of(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.model.loss_of(batch), sync_dist=True)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        loss = ACCUMULATE * outputs["loss"].detach()
        self.losses.append(self.all_gather(loss).float().mean().item())
        self.steps.append(self.trainer.global_step)
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        if self.save_at is not None and batch_idx == self.save_at[0]:
            self.trainer.save_checkpoint(self.save_at[1])

    def on_train_epoch_end(self) -> None:
        self.weights = whole_weights(self.trainer.strategy, self)

    def configure_optimizers(self) -> Any:
        optimizer = AdamW(parameter_groups(self.model), lr=1e-2)
        return [optimizer], [{"scheduler": StepLR(optimizer, 2, gamma=0.5), "interval": "step"}]


def trainer_fit(
    layout: Layout,
    precision: Any = "32-true",
    *,
    save_at: tuple[int, Path] | None = None,
    ckpt_path: Path | None = None,
) -> dict[str, Any]:
    """Train an epoch with the Trainer; returns what :func:`fabric_loop` does, and steps and rates.

    Args:
        layout: Strategy and processes.
        precision: The name of a precision.
        save_at: After which batch a checkpoint is saved, and where.
        ckpt_path: The checkpoint that the run goes on from.
    """
    trainer = L.Trainer(
        accelerator="cpu",
        devices=layout.processes,
        strategy=layout.strategy(),
        precision=precision,
        max_epochs=1,
        accumulate_grad_batches=ACCUMULATE,
        gradient_clip_val=CLIP,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    L.seed_everything(0 if ckpt_path is None else 1, verbose=False)
    module = Trained(save_at)
    training = DataLoader(Tokens(), batch_size=BATCH // layout.processes)
    uneven = DataLoader(Tokens(), batch_size=7)  # six batches a rank, and the last of another size
    trainer.fit(module, training, uneven, ckpt_path=ckpt_path)
    found = {name: getattr(module, name) for name in ("losses", "steps", "rates", "weights")}
    return {**found, "val_loss": float(trainer.callback_metrics["val_loss"])}


def go_on(layout: Layout, folder: Path) -> dict[str, Any]:
    """Go on from a checkpoint; an error of the library is the result where it refuses to."""
    try:
        return trainer_fit(layout, ckpt_path=folder)
    except Exception as error:
        return {"refused": f"{type(error).__name__}: {error}"}
