"""Strategies whose engine does a part of the training step itself.

Tests of ``treadle.loops.step.automatic``, ``treadle.loops.step.gradients``, ``treadle_fabric.strategies.strategy``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.trainer.models import Net, trainer
from torch import Tensor, nn

from treadle import MisconfigurationException
from treadle_fabric import NonFiniteError
from treadle_fabric.strategies import SingleDeviceStrategy

BATCHES, ACCUMULATE = 6, 3


def batches(*bad: int) -> list[Tensor]:
    found = list(torch.randn(BATCHES, 4, 4, generator=torch.Generator().manual_seed(1)))
    for i in bad:
        found[i][0, 0] = float("inf")
    return found


class Told(Net):
    """Keeps the losses that are differentiated, and the hooks that run."""

    def __init__(self) -> None:
        super().__init__(lr=0.1)
        self.losses: list[float] = []
        self.hooks: list[str] = []

    def on_before_backward(self, loss: Tensor) -> None:
        self.losses.append(loss.item())

    def on_after_backward(self) -> None:
        self.hooks.append("after backward")

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.hooks.append("before zero")

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.hooks.append("before step")


class Recording(SingleDeviceStrategy):
    """Keeps what the step asks of it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def backward(self, tensor: Tensor, module: Any, *args: Any, **kwargs: Any) -> None:
        self.calls.append("backward")
        super().backward(tensor, module, *args, **kwargs)

    def optimizer_step(self, optimizer: Any, **kwargs: Any) -> Any:
        self.calls.append("step")
        return super().optimizer_step(optimizer, **kwargs)

    def clip_gradients_norm(self, *args: Any, **kwargs: Any) -> Tensor:
        self.calls.append("clip")
        return super().clip_gradients_norm(*args, **kwargs)


class AccumulatingEngine(Recording):
    """Divides losses, and steps at every third call."""

    handles_gradient_accumulation = True
    owns_optimizer_step = True

    def backward(self, tensor: Tensor, module: Any, *args: Any, **kwargs: Any) -> None:
        super().backward(tensor / ACCUMULATE, module, *args, **kwargs)

    def optimizer_step(self, optimizer: Any, **kwargs: Any) -> Any:
        self.calls.append("engine")
        if self.calls.count("engine") % ACCUMULATE == 0:
            super().optimizer_step(optimizer, **kwargs)
            optimizer.zero_grad()


class ClippingEngine(Recording):
    handles_gradient_clipping = True


class SteppingEngine(Recording):
    """Empties the gradients itself."""

    owns_optimizer_step = True

    def optimizer_step(self, optimizer: Any, **kwargs: Any) -> Any:
        super().optimizer_step(optimizer, **kwargs)
        optimizer.zero_grad()


class Pipeline(Recording):
    """Runs each batch in two halves."""

    runs_whole_batch = True

    def run_batch(self, engine: nn.Module, batch: Tensor, window: float = 1, loss: Any = None) -> dict[Any, Tensor]:
        self.calls.append("batch")
        losses = [loss(engine(half / 10), half) / 2 for half in batch.chunk(2)]
        for each in losses:
            (each / window).backward()
        return {"loss": torch.stack(losses).sum().detach()}


def fit(folder: Path, strategy: Any = "auto", data: Any = None, model: Any = None, **arguments: Any) -> Any:
    model = Told() if model is None else model
    run = trainer(folder, strategy=strategy, **arguments)
    run.fit(model, batches() if data is None else data)
    return model, run


def weights(model: nn.Module) -> list[float]:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()


def test_an_engine_that_accumulates_gets_every_loss_undivided_and_a_step_after_each(tmp_path: Path) -> None:
    plain, run = fit(tmp_path, accumulate_grad_batches=ACCUMULATE)
    strategy = AccumulatingEngine()
    model, with_engine = fit(tmp_path, strategy, accumulate_grad_batches=ACCUMULATE)
    assert strategy.calls == ["backward", "engine", "backward", "engine", "backward", "engine", "step"] * 2
    assert model.losses[0] == pytest.approx(plain.losses[0] * ACCUMULATE)
    assert weights(model) == weights(plain)
    assert with_engine.global_step == run.global_step == 2
    assert model.hooks == [*["after backward"] * 3, "before step"] * 2
    with pytest.raises(MisconfigurationException, match="weight 3.*engine averages the losses"):
        fit(tmp_path, AccumulatingEngine(), model=Weighted(), accumulate_grad_batches=ACCUMULATE)


class Weighted(Net):
    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return {"loss": self.loss(batch), "weight": 3}


def test_an_engine_that_clips_is_left_to_clip(tmp_path: Path) -> None:
    clipped = Recording()
    fit(tmp_path, clipped, gradient_clip_val=1e-3)
    assert clipped.calls.count("clip") == BATCHES
    strategy = ClippingEngine()
    model, _ = fit(tmp_path, strategy, gradient_clip_val=1e-3)
    assert "clip" not in strategy.calls
    assert model.hooks.count("before step") == BATCHES


def test_an_engine_that_owns_the_step_empties_the_gradients(tmp_path: Path) -> None:
    plain, _ = fit(tmp_path)
    strategy = SteppingEngine()
    model, run = fit(tmp_path, strategy)
    assert strategy.calls == ["backward", "step"] * BATCHES
    assert "before zero" in plain.hooks and "before zero" not in model.hooks
    assert all(p.grad is None for p in model.parameters())
    assert weights(model) == weights(plain)
    assert run.global_step == BATCHES


class Unasked(Told):
    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        raise AssertionError

    def pipeline_stages(self) -> list[nn.Module]:
        raise AssertionError

    def loss(self, outputs: Tensor, batch: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return outputs.square().mean()


@pytest.mark.parametrize("accumulate", [1, 4])
def test_an_engine_that_runs_the_whole_batch_replaces_training_step(tmp_path: Path, accumulate: int) -> None:
    """With 4, the last accumulation is one of two batches."""

    class Shown(Unasked):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.losses.append(outputs["loss"].item())

    plain, _ = fit(tmp_path, accumulate_grad_batches=accumulate)
    strategy = Pipeline()
    model, run = fit(tmp_path, strategy, model=Shown(), accumulate_grad_batches=accumulate)
    assert strategy.calls.count("batch") == BATCHES and "backward" not in strategy.calls
    assert weights(model) == pytest.approx(weights(plain))
    assert model.losses == pytest.approx(plain.losses)
    assert model.hooks == plain.hooks
    assert run.global_step == -(-BATCHES // accumulate)


def test_the_loss_of_a_whole_batch_is_looked_at(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="epoch 0, batch_idx 2"):
        fit(tmp_path, Pipeline(), batches(2), model=Unasked(), on_nonfinite="raise")
