"""The model, the data and the programs that every layout runs: a hand-written loop and the Trainer."""

from __future__ import annotations

import csv
import fcntl
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.optim import AdamW
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MeanMetric

import treadle as L
from treadle.callbacks import EMAWeightAveraging, ModelCheckpoint
from treadle.loggers import CSVLogger
from treadle_fabric import Fabric
from treadle_fabric.plugins import Float8Precision

VOCABULARY, WIDTH, HEADS, LENGTH = 16, 16, 2, 8
SAMPLES, BATCH = 72, 12  # two, three and four processes have equal shares
ACCUMULATE, CLIP = 2, 0.5


class Block(nn.Module):
    """Attention without weights, and two layers; tensor parallelism shares the wide dimension out."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        heads = normed.unflatten(-1, (HEADS, -1)).transpose(1, 2)
        seen = scaled_dot_product_attention(heads, heads, heads, is_causal=True).transpose(1, 2).flatten(2)
        return x + self.down(torch.relu(self.up(normed + seen)))


class Frozen(nn.Module):
    """A layer that is not trained, and a buffer that counts forward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.passes += 1
        return x + torch.tanh(self.layer(x))


class Head(nn.Module):
    """Logits by the weight of the embedding, which is tied to this one's."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight
        self.scale = nn.Parameter(torch.ones(()))  # without dimensions: it cannot be cut

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight) * self.scale


class Model(nn.Module):
    """Predicts the next of some tokens: tied weights, a frozen layer, a buffer, a scalar parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.frozen = Frozen()
        self.head = Head(self.embedding.weight)

    def pipeline_stages(self) -> list[nn.Module]:
        return [self.embedding, *self.blocks, self.frozen, self.head]

    def forward(self, tokens: Tensor) -> Tensor:
        x: Any = tokens
        for stage in self.pipeline_stages():
            x = stage(x)
        return x

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        """The mean over all tokens."""
        logits = outputs.flatten(0, 1)
        return cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), batch[1].flatten())

    def loss_of(self, batch: Any) -> Tensor:
        return self.loss(self(batch[0]), batch)


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices, with weight decay; and the others, with a higher learning rate."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0, "lr": 2e-2},
    ]


class Tokens(Dataset[tuple[Tensor, Tensor, int]]):
    """Sequences that are the same in every process, with the tokens that follow, and each with its number."""

    def __init__(self) -> None:
        self.tokens = torch.randint(VOCABULARY, (SAMPLES, LENGTH + 1), generator=torch.Generator().manual_seed(3))

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        return self.tokens[index, :-1], self.tokens[index, 1:], index


def whole(tensors: dict[str, Any], *, everywhere: bool = False) -> dict[str, Tensor]:
    """Tensors, gathered from all ranks: those of other stages of a pipeline, too, where ranks have different ones."""
    gathered = {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in tensors.items()}
    here = {name: tensor.detach().clone() for name, tensor in gathered.items() if not tensor.is_meta}
    if everywhere or len(here) < len(tensors):
        parts: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, here)
        here = {name: tensor for part in reversed(parts) for name, tensor in part.items()}
    return here


def optimizer_state(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """What an optimizer keeps of each parameter, by the parameter's name and its own; and the learning rates."""
    kept = {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    rates = {f"lr.{i}": torch.tensor(group["lr"]) for i, group in enumerate(optimizer.param_groups)}
    return {**whole(kept, everywhere=any(p.is_meta for p in model.parameters())), **rates}


def made(precision: Any, accelerator: str = "cpu") -> Any:
    """What a program is given for the name of a precision; float8 is emulated on the CPU."""
    if isinstance(precision, str) and precision.startswith("fp8"):
        return Float8Precision(precision, emulate=accelerator == "cpu")  # type: ignore[arg-type]
    return precision


def fabric_loop(
    strategy: Any,
    processes: int,
    precision: Any = "32-true",
    *,
    accelerator: str = "cpu",
    compiled: Callable[[nn.Module], Any] = lambda model: model,
    **options: Any,
) -> dict[str, Any]:
    """Train with a hand-written loop; returns the losses of the global batches, and the weights.

    Args:
        strategy: The strategy.
        processes: The number of processes.
        precision: The name of a precision, or one.
        accelerator: The hardware.
        compiled: Makes of the model what is set up.
        **options: More arguments of the optimizer.
    """
    fabric = Fabric(
        accelerator=accelerator, devices=processes, strategy=strategy, precision=made(precision, accelerator)
    )
    fabric.launch()
    torch.manual_seed(0)
    model: Any = Model()
    optimizer: Any = AdamW(parameter_groups(model), lr=1e-2, **options)
    model, optimizer = fabric.setup(compiled(model), optimizer)
    model.mark_forward_method("loss_of")
    scheduler = StepLR(optimizer.optimizer, 2, gamma=0.5)
    shares = fabric.strategy.data_parallel_size
    loader = fabric.setup_dataloaders(DataLoader(Tokens(), batch_size=BATCH // shares))
    losses = []
    for i, batch in enumerate(loader):
        steps = i % ACCUMULATE == ACCUMULATE - 1
        with fabric.no_backward_sync(model, enabled=not steps):
            if fabric.strategy.runs_whole_batch:
                loss = fabric.run_batch(model, batch, window=ACCUMULATE)["loss"]
            else:
                loss = model.loss_of(batch)
                fabric.backward(loss / ACCUMULATE)
        if steps:
            fabric.clip_gradients(model, optimizer, max_norm=CLIP, error_if_nonfinite=False)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        losses.append(fabric.all_reduce(loss.detach()).item())
    return {"losses": losses, "weights": whole(model.state_dict())}


class Trained(L.LightningModule):
    """The model under the Trainer; it keeps what is compared: of batches, and of a checkpoint."""

    def __init__(self, save_at: tuple[int, str] | None, metric: Any) -> None:
        super().__init__()
        self.model = Model()
        self.metric = metric
        self.save_at = save_at
        self.losses: list[float] = []
        self.samples: list[list[int]] = []
        self.rates: list[list[float]] = []
        self.weights: dict[str, Tensor] = {}
        self.restored: dict[str, Tensor] = {}
        self.saved: dict[str, Tensor] = {}

    def pipeline_stages(self) -> list[nn.Module]:
        return self.model.pipeline_stages()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self.model(batch[0]), batch)

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        loss = self.model.loss(outputs, batch)
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True, batch_size=len(batch[0]))
        if self.metric is not None:
            self.metric.update(loss.detach().float(), batch[1].numel())
            self.log("metric", self.metric, on_step=False, on_epoch=True)
        return loss

    def state(self) -> dict[str, Tensor]:
        """The weights of training and the optimizer's state."""
        return {**whole(self.model.state_dict()), **optimizer_state(self.model, self.trainer.optimizers[0])}

    def on_train_start(self) -> None:
        self.restored = self.state()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        loss = ACCUMULATE * outputs["loss"].detach()
        self.losses.append(self.all_gather(loss).float().mean().item())
        self.samples.append(self.all_gather(batch[2]).unique().tolist())
        self.rates.append([group["lr"] for group in self.trainer.optimizers[0].param_groups])
        if self.save_at is not None and batch_idx == self.save_at[0]:
            self.trainer.save_checkpoint(self.save_at[1])
            self.saved = self.state()

    def on_train_epoch_end(self) -> None:
        self.weights = whole(self.model.state_dict())

    def configure_optimizers(self) -> Any:
        optimizer = AdamW(parameter_groups(self.model), lr=1e-2)
        return [optimizer], [{"scheduler": StepLR(optimizer, 2, gamma=0.5), "interval": "step"}]


def trainer_fit(
    strategy: Any,
    processes: int,
    precision: Any = "32-true",
    *,
    accelerator: str = "cpu",
    resumes: bool = False,
    save_at: tuple[int, str] | None = None,
    shuffle: bool = False,
    run_folder: Path | None = None,
    **arguments: Any,
) -> dict[str, Any]:
    """Train an epoch with the Trainer; returns what :func:`fabric_loop` does, and what else is compared.

    Args:
        strategy: The strategy.
        processes: The number of processes.
        precision: The name of a precision, or one.
        accelerator: The hardware.
        resumes: Whether the run of ``run_folder`` goes on, from the checkpoint there.
        save_at: After which batch a checkpoint is saved, and where.
        shuffle: Whether batches are drawn.
        run_folder: Where a CSVLogger writes; then there are a moving average of the weights and a torchmetrics object,
            too.
        **arguments: More arguments of the Trainer.
    """
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    more: dict[str, Any] = {}
    if run_folder is not None:
        saver = ModelCheckpoint(run_folder, save_top_k=0)  # says where "last" is
        more = {"callbacks": [EMAWeightAveraging(decay=0.5), saver], "log_every_n_steps": 1}
        more["enable_checkpointing"] = True
        more["logger"] = CSVLogger(run_folder, name=None, version="run")
    trainer = L.Trainer(
        accelerator=accelerator,
        devices=processes,
        strategy=strategy,
        precision=made(precision, accelerator),
        max_epochs=1,
        accumulate_grad_batches=ACCUMULATE,
        gradient_clip_val=CLIP,
        **{**quiet, **more, **arguments},
    )
    torch.manual_seed(1 if resumes else 0)
    L.seed_everything(0, verbose=False)
    module = Trained(save_at, MeanMetric() if run_folder is not None else None)
    shares = trainer.strategy.data_parallel_size
    loader = DataLoader(Tokens(), batch_size=BATCH // shares, shuffle=shuffle)
    trainer.fit(module, loader, ckpt_path="last" if resumes else None)
    found = {name: getattr(module, name) for name in ("losses", "samples", "rates", "weights", "restored", "saved")}
    found["logged"] = {name: float(value) for name, value in trainer.callback_metrics.items()}
    if run_folder is not None:
        found["average"] = whole(module.model.state_dict())
    if run_folder is not None and trainer.is_global_zero:
        with Path(run_folder, "run", "metrics.csv").open() as file:
            found["rows"] = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    return found


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


def once(folders: pytest.TempPathFactory, name: str, run: Callable[[Path], None]) -> dict[str, Any]:
    """Let rows be run into a folder, once by all processes of a test run; returns the names, and what each row gave."""
    base = folders.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with Path(f"{folder}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            folder.mkdir()
            run(folder)
    return {file.stem: torch.load(file) for file in folder.glob("*.pt")}
