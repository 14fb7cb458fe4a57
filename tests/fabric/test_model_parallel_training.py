"""Tests of ``treadle_fabric.strategies.parallelism``, in training: tensor and sequence parallel processes together give
the losses and weights of one, through Fabric and through the Trainer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed.fsdp
import torch.distributed.tensor.parallel  # heavy, as the one before; the forks inherit them
from tests.fabric.gpt import GPT, PLAN, SLICED_PLAN, batches
from tests.processes import run_in_ranks
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from treadle import LightningModule, Trainer
from treadle_fabric import Fabric
from treadle_fabric.strategies import ModelParallelStrategy

STEPS, BATCH = 5, 4


def _data(ignored: int = 0) -> TensorDataset:
    parts = batches(2 * STEPS, BATCH)
    tokens, targets = (torch.cat(each) for each in zip(*parts, strict=True))
    for row, target in enumerate(targets):
        target[len(target) - row % (ignored + 1) :] = -100
    return TensorDataset(tokens, targets)


def _model(**options: Any) -> GPT:
    torch.manual_seed(1)
    return GPT(**options)


def _strategy(sizes: dict[str, int], plan: Any) -> ModelParallelStrategy:
    named = {"data_parallel_size": 1, "tensor_parallel_size": 1, "sequence_parallel_size": 1} | sizes
    plan = {**plan} if named["tensor_parallel_size"] > 1 else None
    return ModelParallelStrategy(tensor_parallel_plan=plan, loss_parallel=plan is not None, **named)


def _train(fabric: Fabric, model: GPT, data: TensorDataset, size: int) -> list[float]:
    """With accumulation, clipping, two parameter groups and a scheduler."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": trained[::2]}, {"params": trained[1::2], "lr": 0.05}]
    optimizer = torch.optim.SGD(groups, 0.1, 0.9)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    wrapped, stepped = fabric.setup(model, optimizer)
    wrapped.mark_forward_method("loss")
    losses = []
    for index, (tokens, targets) in enumerate(fabric.setup_dataloaders(DataLoader(data, batch_size=size))):
        whole = index % 2 == 1
        with fabric.no_backward_sync(wrapped, enabled=not whole):
            loss = wrapped.loss(tokens, targets, label_smoothing=0.1)
            assert type(loss) is Tensor
            fabric.backward(loss / 2)
        losses.append(float(fabric.all_reduce(loss.detach())))
        if whole:
            norm = fabric.clip_gradients(wrapped, stepped, max_norm=0.3)
            losses.append(float(norm))
            stepped.step()
            stepped.zero_grad()
            schedule.step()
    return losses


def _alone(options: dict[str, Any]) -> tuple[list[float], dict[str, Tensor]]:
    """The losses and weights of one process."""
    model = _model(**options)
    torch.manual_seed(2)
    return _train(Fabric(accelerator="cpu", devices=1), model, _data(), BATCH), model.state_dict()


def _fabric(sizes: dict[str, int], plan: Any, options: dict[str, Any], expected: Any) -> None:
    devices = math.prod(sizes.values())
    fabric = Fabric(accelerator="cpu", devices=devices, strategy=_strategy(sizes, plan))
    fabric.launch()
    model = _model(**options)
    if fabric.global_rank:  # the ranks begin apart, and follow the first
        nn.init.ones_(model.positions.weight)
    torch.manual_seed(2 + fabric.global_rank)
    losses = _train(fabric, model, _data(), BATCH // sizes.get("data_parallel_size", 1))
    torch.testing.assert_close(losses, expected[0], atol=1e-5, rtol=0)
    state = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in model.state_dict().items()}
    torch.testing.assert_close(state, expected[1], atol=1e-5, rtol=0)
    fabric.strategy.teardown()


def _runs_with_fabric(sizes: dict[str, int], plan: Any, **options: Any) -> None:
    run_in_ranks(_fabric, sizes, plan, options, _alone(options), devices=math.prod(sizes.values()))


def test_tensor_parallel_with_fabric() -> None:
    _runs_with_fabric({"tensor_parallel_size": 2}, PLAN, dropout=0.1)


def test_sequence_parallel_with_fabric() -> None:
    _runs_with_fabric({"sequence_parallel_size": 2}, PLAN)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("sizes", "plan"),
    [
        ({"tensor_parallel_size": 2, "sequence_parallel_size": 2}, PLAN),
        ({"tensor_parallel_size": 2, "data_parallel_size": 2}, SLICED_PLAN),
        ({"sequence_parallel_size": 2, "data_parallel_size": 2}, PLAN),
    ],
)
def test_four_ranks_with_fabric(sizes: dict[str, int], plan: Any) -> None:
    _runs_with_fabric(sizes, plan)


class Language(LightningModule):
    """Returns the mean over the targets that count in what it got, and how many these are."""

    def __init__(self) -> None:
        super().__init__()
        self.gpt = _model()
        self.logged: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.gpt.loss(*batch)
        assert type(loss) is Tensor
        self.log("loss", loss)
        return {"loss": loss, "weight": (batch[1] != -100).sum()}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        tokens, targets = batch
        logits = self.gpt(tokens)
        logits = logits.full_tensor() if hasattr(logits, "full_tensor") else logits
        self.log("accuracy", (logits.argmax(-1) == targets).float().mean())
        self.log("val_loss", self.gpt.loss(tokens, targets, reduction="sum") / targets.numel())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.1, 0.9)


def _fit(strategy: Any, devices: int, share: int) -> tuple[dict[str, float], dict[str, Tensor]]:
    torch.manual_seed(2)
    module = Language()
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        max_epochs=1,
        accumulate_grad_batches=2,
        gradient_clip_val=0.3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loaders = (DataLoader(_data(ignored), batch_size=BATCH // share) for ignored in (3, 0))
    trainer.fit(module, *loaders)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name != "loss"}
    state = module.gpt.state_dict()
    return metrics, {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in state.items()}


def _with_trainer(sizes: dict[str, int], plan: Any, expected: Any) -> None:
    plan = {f"gpt.{pattern}": style for pattern, style in plan.items()}
    metrics, state = _fit(_strategy(sizes, plan), math.prod(sizes.values()), sizes.get("data_parallel_size", 1))
    torch.testing.assert_close(metrics, expected[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(state, expected[1], atol=1e-5, rtol=0)


def _runs_with_trainer(sizes: dict[str, int], plan: Any) -> None:
    run_in_ranks(_with_trainer, sizes, plan, _fit("auto", 1, 1), devices=math.prod(sizes.values()))


def test_tensor_parallel_with_trainer() -> None:
    _runs_with_trainer({"tensor_parallel_size": 2}, SLICED_PLAN)


def test_sequence_parallel_with_trainer() -> None:
    _runs_with_trainer({"sequence_parallel_size": 2}, PLAN)


@pytest.mark.faults
def test_four_ranks_with_trainer() -> None:
    _runs_with_trainer({"tensor_parallel_size": 2, "sequence_parallel_size": 2}, PLAN)
