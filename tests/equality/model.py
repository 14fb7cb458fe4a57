"""The model, the data and the programs that every layout runs: a hand-written loop and the Trainer."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, Dataset

import treadle as L
from treadle_fabric import Fabric
from treadle_fabric.plugins import Float8Precision
from treadle_fabric.strategies.states.elsewhere import brought_to_rank_zero

VOCABULARY, WIDTH, LENGTH = 16, 16, 8
SAMPLES, BATCH = 72, 12  # two, three and four processes have equal shares
ACCUMULATE, CLIP = 2, 0.5


class Block(nn.Module):
    """Two layers around a residual stream; tensor parallelism shares the wide dimension out."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Head(nn.Module):
    """Logits by the weight of the embedding, which is tied to this one's."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight
        self.scale = nn.Parameter(torch.ones(()))  # without dimensions: it cannot be cut

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight) * self.scale


class Mix(nn.Module):
    """A frozen layer beside the residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.frozen(x))


class Model(nn.Module):
    """Predicts the next of some tokens: tied weights, a frozen layer, a buffer, a scalar parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.mix = Mix()
        self.head = Head(self.embedding.weight)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, tokens: Tensor) -> Tensor:
        if self.training:
            self.steps += 1
        x = tokens
        for stage in self.pipeline_stages():
            x = stage(x)
        return x

    def pipeline_stages(self) -> list[nn.Module]:
        return [self.embedding, *self.blocks, self.mix, self.head]

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        """The mean over all tokens but the last of each sequence."""
        logits, tokens = outputs[:, :-1].reshape(-1, VOCABULARY), batch[0]
        return cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), tokens[:, 1:].reshape(-1))

    def loss_of(self, tokens: Tensor) -> Tensor:
        return self.loss(self(tokens), (tokens,))


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices, with weight decay; and the others, with a higher learning rate."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0, "lr": 2e-2},
    ]


class Tokens(Dataset[tuple[Tensor, int]]):
    """Sequences that are the same in every process, each with its number."""

    def __init__(self) -> None:
        self.tokens = torch.randint(VOCABULARY, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(3))

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.tokens[index], index


def whole(tensors: dict[str, Any], strategy: Any) -> dict[str, Tensor]:
    """The tensors of a state dict, gathered from all ranks to rank 0."""
    gathered = {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in tensors.items()}
    gathered = brought_to_rank_zero(gathered, strategy.stage_groups)
    return {name: tensor.detach().clone() for name, tensor in gathered.items()}


def made(precision: str) -> Any:
    """What a program is given for the name of a precision; float8 is emulated on the CPU."""
    return Float8Precision(precision, emulate=True) if precision.startswith("fp8") else precision  # type: ignore[arg-type]


def fabric_loop(strategy: Any, processes: int, precision: str) -> dict[str, Any]:
    """Train with a hand-written loop; returns the losses of the global batches, and the weights."""
    fabric = Fabric(accelerator="cpu", devices=processes, strategy=strategy, precision=made(precision))
    fabric.launch()
    torch.manual_seed(0)
    model: Any = Model()
    optimizer: Any = AdamW(parameter_groups(model), lr=1e-2)
    model, optimizer = fabric.setup(model, optimizer)
    model.mark_forward_method("loss_of")
    scheduler = StepLR(optimizer.optimizer, 2, gamma=0.5)
    shares = fabric.strategy.data_parallel_size
    loader = fabric.setup_dataloaders(DataLoader(Tokens(), batch_size=BATCH // shares))
    losses = []
    for i, batch in enumerate(loader):
        steps = i % ACCUMULATE == ACCUMULATE - 1
        with fabric.no_backward_sync(model, enabled=not steps):
            if fabric.strategy.runs_whole_batch:
                loss = fabric.run_batch(model, batch, ACCUMULATE)["loss"]
            else:
                loss = model.loss_of(batch[0])
                fabric.backward(loss / ACCUMULATE)
        if steps:
            fabric.clip_gradients(model, optimizer, max_norm=CLIP, error_if_nonfinite=False)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        losses.append(fabric.all_reduce(loss.detach()).item())
    return {"losses": losses, "weights": whole(model.state_dict(), fabric.strategy)}


class Trained(L.LightningModule):
    """The model under the Trainer; it keeps the losses of the global batches, and which samples were in them."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        self.losses: list[float] = []
        self.samples: list[list[int]] = []
        self.save_at: tuple[int, str] | None = None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.model.loss_of(batch[0])
        self.note(loss, batch)
        return loss

    def pipeline_stages(self) -> list[nn.Module]:
        return self.model.pipeline_stages()

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        loss = self.model.loss(outputs, batch)
        self.log("loss", loss, on_epoch=True, sync_dist=True, batch_size=len(batch[0]))
        return loss

    def note(self, loss: Tensor, batch: Any) -> None:
        tokens, numbers = batch
        if not self.trainer.strategy.runs_whole_batch:
            self.log("loss", loss, on_epoch=True, sync_dist=True, batch_size=len(tokens))
        self.losses.append(self.all_gather(loss.detach()).float().mean().item())
        self.samples.append(self.all_gather(numbers).unique().tolist())

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.trainer.strategy.runs_whole_batch:
            self.note(outputs["loss"] * ACCUMULATE, batch)
        if self.save_at is not None and batch_idx == self.save_at[0]:
            self.trainer.save_checkpoint(self.save_at[1])

    def configure_optimizers(self) -> Any:
        optimizer = AdamW(parameter_groups(self.model), lr=1e-2)
        return [optimizer], [{"scheduler": StepLR(optimizer, 2, gamma=0.5), "interval": "step"}]


def trainer_fit(
    strategy: Any,
    processes: int,
    precision: str = "32-true",
    *,
    ckpt_path: str | None = None,
    save_at: tuple[int, str] | None = None,
    shuffle: bool = False,
    **arguments: Any,
) -> dict[str, Any]:
    """Train an epoch with the Trainer; returns what :func:`fabric_loop` does, the samples, and what was logged."""
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(
        accelerator="cpu",
        devices=processes,
        strategy=strategy,
        precision=made(precision),
        max_epochs=1,
        accumulate_grad_batches=ACCUMULATE,
        gradient_clip_val=CLIP,
        **{**quiet, **arguments},
    )
    torch.manual_seed(0 if ckpt_path is None else 1)
    L.seed_everything(0, verbose=False)
    module = Trained()
    module.save_at = save_at
    shares = trainer.strategy.data_parallel_size
    trainer.fit(module, DataLoader(Tokens(), batch_size=BATCH // shares, shuffle=shuffle), ckpt_path=ckpt_path)
    return {
        "losses": module.losses,
        "samples": module.samples,
        "weights": whole(module.model.state_dict(), trainer.strategy),
        "logged": float(trainer.callback_metrics["loss_epoch"]),
    }


def run_rows(rows: list[tuple[str, Any]], folder: Path) -> None:
    """In each rank: call a function for each row, and let rank 0 keep what each returned, or the error of all ranks."""
    for name, function in rows:
        try:
            found = function()
        except Exception:
            found = traceback.format_exc()
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            torch.save(found, folder / f"{name}.pt")


def result(found: dict[str, Any], name: str) -> Any:
    """What a row gave; its error fails the test."""
    assert name in found, f"{name} was not run: an earlier row ended its processes"
    if isinstance(found[name], str):
        pytest.fail(found[name])
    return found[name]


def results(folder: Path) -> Iterator[tuple[str, Any]]:
    """The names of the rows that were run, and what each returned."""
    for file in folder.glob("*.pt"):
        yield file.stem, torch.load(file)
