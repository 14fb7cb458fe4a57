"""Activation checkpointing: less is kept, and the gradients are the same to the last bit.

Tests of ``treadle_fabric.strategies.sharding.recompute``.
"""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from treadle_fabric import HalfPrecision, MisconfigurationException
from treadle_fabric.strategies.sharding.recompute import recompute

calls: list[str] = []


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, scale: float = 1.0, *, preserve_rng_state: bool = False) -> dict[str, Tensor]:
        calls.append("block")
        x = x + torch.ones(4)  # of the default dtype
        return {"x": x + scale * self.dropout(self.down(self.up(x).relu()))}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, scale=0.5, preserve_rng_state=True)["x"]
        return self.head(x)


def gradients(model: nn.Module, **options: Any) -> list[Tensor]:
    torch.manual_seed(1)
    model.zero_grad()
    loss = model(torch.linspace(-1, 1, 20).reshape(5, 4).to(next(model.parameters()).dtype)).square().mean()
    loss.backward(**options)
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def kept(model: nn.Module) -> int:
    """How many numbers a forward pass keeps for its backward pass."""
    seen: dict[int, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.update({t.data_ptr(): t.numel()}) or t, lambda t: t):
        model(torch.ones(50, 4))
    return sum(seen.values())


MM = torch.ops.aten.addmm.default


@pytest.mark.parametrize(
    ("policy", "saved"),
    [(None, ()), ({Block}, ()), (lambda m: isinstance(m, Block), ()), (None, [MM]), (None, [torch.ops.aten.addmm])],
)  # fmt: skip
def test_same_gradients_of_less_memory(policy: Any, saved: Any) -> None:
    torch.manual_seed(0)
    plain = Net()
    model = copy.deepcopy(plain)
    chosen = recompute(model, policy, saved)
    assert list(map(id, chosen)) == list(map(id, model.blocks))
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]

    calls.clear()
    expected = gradients(plain)
    assert len(calls) == 3
    assert all(map(torch.equal, gradients(model), expected))
    assert len(calls) == 3 + 6  # once forward, once more in the backward pass
    assert saved or kept(model) < kept(plain) / 2

    calls.clear()
    with torch.no_grad():
        model(torch.ones(5, 4))
    assert len(calls) == 3
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.blocks[0].up.weight.data.zero_()
        assert not all(map(torch.equal, gradients(other), expected))  # its own weights
        assert all(map(torch.equal, gradients(model), expected))


def test_saved_operators_are_not_computed_again() -> None:
    counted: list[Any] = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            counted.append(func)
            return func(*args, **(kwargs or {}))

    for saved, times in ((), 12), ((MM,), 6):  # two layers in each of three blocks
        model = nn.Sequential(*(Block2() for _ in range(3)))
        recompute(model, saved=saved)
        counted.clear()
        with Count():
            model(torch.ones(5, 4)).sum().backward()
        assert counted.count(MM) == times


class Block2(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh())


def test_the_default_dtype_of_the_forward_pass() -> None:
    """A precision's context is over when the backward pass begins."""
    torch.manual_seed(0)
    precision = HalfPrecision("bf16-true")
    plain = precision.convert_module(Net())
    model = copy.deepcopy(plain)
    recompute(model)
    results = []
    for each in (plain, model):
        torch.manual_seed(1)
        with precision.forward_context():
            loss = each(torch.ones(5, 4)).sum()
        loss.backward()
        results.append([p.grad for p in each.parameters()])
    assert all(map(torch.equal, *results))


def test_autocast_of_the_forward_pass() -> None:
    torch.manual_seed(0)
    plain = Net()
    model = copy.deepcopy(plain)
    recompute(model)
    results = []
    for each in (plain, model):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            loss = each(torch.ones(5, 4)).sum()
        loss.backward()
        results.append([p.grad for p in each.parameters()])
    assert all(map(torch.equal, *results))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks
def test_compiled_layers_and_several_calls() -> None:
    torch.manual_seed(0)
    plain = Net()
    model = copy.deepcopy(plain)
    model.blocks[1] = torch.compile(model.blocks[1], backend="eager")  # type: ignore[assignment]
    recompute(model)
    assert list(model.state_dict()) == [name.replace(".1.", ".1._orig_mod.") for name in plain.state_dict()]
    assert recompute(model)  # once more changes nothing
    calls.clear()
    assert all(map(torch.equal, gradients(model), gradients(plain)))
    assert calls.count("block") >= 3 + 4  # of those that are not compiled: the trace is not called
    signature = inspect.signature(model.blocks[0].forward)
    assert "scale" in signature.parameters


class InPlace(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(2))


def test_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), InPlace(2, 2))
    recompute(model, {InPlace})
    with pytest.raises(MisconfigurationException, match="InPlace changes its inputs in place"):
        model(torch.ones(1, 2))
    with pytest.raises(MisconfigurationException, match="no submodule of Linear to work on"):
        recompute(nn.Linear(2, 2))
    with pytest.raises(MisconfigurationException, match="no module of this class"):
        recompute(Net(), {nn.Conv2d})
    for wrong in (torch.mm, "aten.mm", nn.Linear):
        with pytest.raises(MisconfigurationException, match=r"torch.ops.aten.mm.default"):
            recompute(Net(), saved=[wrong])
