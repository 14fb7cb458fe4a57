"""Nothing is computed from what a cache kept of a thing that has changed since.

Tests of ``treadle_fabric.precision.autocast``, ``treadle_fabric.precision.precision``,
``treadle_fabric.setup.module``, ``treadle.loops.step.manual``, ``treadle.run.steps``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.trainer.models import trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

import treadle as L
from treadle_fabric import Fabric

X = torch.linspace(-1, 1, 8).reshape(2, 4)


def model() -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(4, 4)


def autocast() -> Any:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def expected(module: nn.Linear) -> Tensor:
    """The output in a context of its own."""
    with autocast():
        return module(X).detach()


# Ways to change weights: each gets the module, and an optimizer whose gradients are there


def step(module: nn.Module, optimizer: Any) -> None:
    optimizer.step()


def other_optimizers_step(module: nn.Module, optimizer: Any) -> None:
    torch.optim.Adam(module.parameters(), lr=0.5).step()


def load(module: nn.Module, optimizer: Any) -> None:
    module.load_state_dict({name: 2 * value for name, value in module.state_dict().items()})


def copy_an_average(module: nn.Module, optimizer: Any) -> None:
    with torch.no_grad():
        for p, average in zip(module.parameters(), copy.deepcopy(module).parameters(), strict=True):
            p.copy_(0.5 * average)


def clamp_data(module: nn.Module, optimizer: Any) -> None:
    for p in module.parameters():
        p.data.clamp_(-0.1, 0.1)


def by_multi_tensor_operation(module: nn.Module, optimizer: Any) -> None:
    with torch.no_grad():
        torch._foreach_add_(list(module.parameters()), 1.0)


def from_a_vector(module: nn.Module, optimizer: Any) -> None:
    torch.nn.utils.vector_to_parameters(torch.ones(20), module.parameters())


def assign(module: Any, optimizer: Any) -> None:
    module.weight.data = torch.ones(4, 4)


CHANGES = [
    step, other_optimizers_step, load, copy_an_average, clamp_data, by_multi_tensor_operation, from_a_vector, assign,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("call", ["wrapper", "module", "function"])
def test_weights_change_within_autocast_of_fabric(change: Callable[..., None], call: str) -> None:
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    module = model()
    wrapped, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=1.0))

    def forward() -> Tensor:
        if call == "function":
            return nn.functional.linear(X, module.weight, module.bias)
        out: Tensor = (wrapped if call == "wrapper" else module)(X)
        return out

    with fabric.autocast():
        fabric.backward(forward().float().sum())
        change(module, optimizer)
        after = forward()
    assert torch.equal(after.float(), expected(module).float())


def test_a_forward_pass_within_autocast_of_fabric_keeps_no_casts() -> None:
    """Not all versions of torch forget them at the end of an inner context."""
    precision = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed").strategy.precision
    with precision.forward_context():
        assert torch.is_autocast_cache_enabled()
    with precision.step_context():
        assert not torch.is_autocast_cache_enabled()
        with precision.forward_context():
            assert not torch.is_autocast_cache_enabled()
    assert torch.is_autocast_cache_enabled()


class WholeStep(nn.Module):
    """A marked method of a Fabric model that makes two steps."""

    def __init__(self) -> None:
        super().__init__()
        self.net = model()
        self.after = torch.empty(0)

    def two(self, change: Callable[..., None], optimizer: Any) -> Tensor:
        self.net(X).float().sum().backward()
        change(self.net, optimizer)
        self.after = self.net(X).detach()
        return self.after


@pytest.mark.parametrize("change", CHANGES)
def test_weights_change_within_a_marked_method(change: Callable[..., None]) -> None:
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    module = WholeStep()
    wrapped, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=1.0))
    wrapped.mark_forward_method("two")
    wrapped.two(change, optimizer)
    assert torch.equal(module.after, expected(module.net))


class Manual(L.LightningModule):
    automatic_optimization = False

    def __init__(self, change: Callable[..., None]) -> None:
        super().__init__()
        self.net, self.change = model(), change
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.net(X).float().sum())
        self.change(self.net, optimizer)
        after = self.net(X).detach()
        with torch.autocast("cpu", enabled=False):
            bf16 = copy.deepcopy(self.net).bfloat16()(X.bfloat16()).detach()
        self.pairs.append((after, bf16))
        optimizer.step()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


@pytest.mark.parametrize("change", CHANGES)
def test_weights_change_within_a_step_that_optimizes_manually(tmp_path: Path, change: Callable[..., None]) -> None:
    module = Manual(change)
    trainer(tmp_path, precision="bf16-mixed", max_steps=2, max_epochs=1).fit(module, DataLoader([X, X, X]))
    assert len(module.pairs) >= 2
    for after, right in module.pairs:
        assert torch.equal(after, right)


class SecondOptimizer(L.LightningModule):
    """Automatic optimization, and an optimizer of its own that steps within the training step."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.head = model(), nn.Linear(4, 1)
        self.own: Any = None
        self.same: list[bool] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        before = self.net(X)
        gradients = torch.autograd.grad(before.float().sum(), [*self.net.parameters()])
        for p, g in zip(self.net.parameters(), gradients, strict=True):
            p.grad = g
        self.own.step()
        self.same.append(torch.equal(before, after := self.net(X)))
        return self.head(after).float().mean()

    def configure_optimizers(self) -> Any:
        self.own = torch.optim.SGD(self.net.parameters(), lr=1.0)
        return torch.optim.SGD(self.head.parameters(), lr=0.1)


def test_any_optimizer_that_steps_within_a_step_ends_the_casts(tmp_path: Path) -> None:
    module = SecondOptimizer()
    trainer(tmp_path, precision="bf16-mixed", max_epochs=1).fit(module, DataLoader([X, X]))
    assert module.same == [False, False]


def test_a_forward_pass_casts_each_weight_once_and_equals_torchs() -> None:
    """Where weights do not change, casts are kept as in a hand-written loop, and gradients are summed alike."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.net(self.net(x))
            return out

    ours, by_hand = Twice(), Twice()
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    fabric.backward(fabric.setup(ours)(X).float().sum())
    with autocast():
        y = by_hand(X)
    y.float().sum().backward()
    for a, b in zip(ours.parameters(), by_hand.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.equal(a.grad, b.grad)


class LateGroup(L.LightningModule):
    """Steps an optimizer of its own, which gets the module's parameters later."""

    automatic_optimization = False

    def __init__(self) -> None:
        super().__init__()
        self.net = model()
        self.own = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
        self.steps: list[int] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        if batch_idx == 2:
            self.own.add_param_group({"params": [*self.net.parameters()]})
        self.own.step()
        self.steps.append(self.trainer.fit_progress.step)

    def configure_optimizers(self) -> None:
        return None


@pytest.mark.filterwarnings("ignore:.*this fit will run with no optimizer")
def test_an_optimizer_counts_from_the_step_at_which_it_got_parameters(tmp_path: Path) -> None:
    module = LateGroup()
    trainer(tmp_path, max_epochs=1).fit(module, DataLoader([X] * 4))
    assert module.steps == [0, 0, 1, 2]
