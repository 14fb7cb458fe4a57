"""What hand-written loops do with the parameters, gradients and states that a strategy has sharded.

Tests of ``treadle_fabric.strategies.sharding.sharding``, ``treadle_fabric.strategies.sharding.engine``,
``treadle_fabric.strategies.native_step``, ``treadle_fabric.strategies.states.checkpointing``.
"""

from __future__ import annotations

import copy
import functools
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint
import torch.distributed.fsdp
from tests.processes import run_in_ranks
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from treadle_fabric import (
    CheckpointMismatchError,
    Fabric,
    FSDPStrategy,
    MisconfigurationException,
    ModelParallelStrategy,
)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.linear(self.norm(x)).tanh()
        return out


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(x)
        return out

    def encode(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks[0](x))
        return out


class Average:
    """A moving average of the weights, as programs keep it: an object with a state of its own."""

    def __init__(self, model: nn.Module) -> None:
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        for name, p in model.named_parameters():
            self.weights[name].mul_(0.5).add_(p, alpha=0.5)

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weights = state["weights"]


BATCHES = torch.randn(6, 4, 8, generator=torch.Generator().manual_seed(3))


def backward(fabric: Fabric, model: nn.Module, x: Tensor) -> None:
    fabric.backward(model(x[fabric.global_rank :: fabric.world_size]).square().mean())


def whole(tensors: Any) -> dict[str, Tensor]:
    return {n: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for n, t in dict(tensors).items()}


def equal(found: Any, expected: Any) -> None:
    torch.testing.assert_close(whole(found), whole(expected))


def launched(**kwargs: Any) -> Fabric:
    fabric = Fabric(accelerator="cpu", devices=2, strategy=FSDPStrategy(**kwargs))
    fabric.launch()
    return fabric


def averages(folder: Path) -> None:
    """Tensors of the user's that are sharded are so again when they are loaded, and a step with them goes on."""
    fabric = launched()
    model, optimizer = fabric.setup(net := Net(), torch.optim.SGD(net.parameters(), 0.1))
    mine, average = {name: p.detach().clone() for name, p in model.named_parameters()}, Average(model)
    state = {"model": model, "mine": mine, "average": average, "all": [{"n": 3, "tensors": list(mine.values())}]}
    backward(fabric, model, BATCHES[0])
    optimizer.step()
    average.update(model)
    expected = whole(average.weights)
    fabric.save(folder / "averages", state)
    average.update(model)
    again = {**state, "mine": dict(mine), "average": Average(model)}
    fabric.load(folder / "averages", again)
    equal(again["mine"], mine)
    equal(again["average"].weights, expected)
    assert again["all"][0]["n"] == 3
    for loaded in (again["mine"].values(), again["all"][0]["tensors"], again["average"].weights.values()):
        assert {type(each) for each in loaded} == {DTensor}
    again["average"].update(model)


def loads(folder: Path) -> None:
    """``load_state_dict`` takes whole tensors; what does not fit is told without torch's words for the parts."""
    fabric = launched()
    saved = Net().state_dict()
    model = fabric.setup(Net())
    fabric.save(folder / "part", {"model": model}, filter={"model": lambda name, value: "norm" not in name})

    def zero() -> None:
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()

    zero()
    model.load_state_dict(saved)
    equal(model.state_dict(), saved)
    zero()
    for index, block in enumerate(model.blocks):
        own = f"blocks.{index}."
        block.load_state_dict({name.removeprefix(own): v for name, v in saved.items() if name.startswith(own)})
    equal(model.blocks.state_dict(), Net().blocks.state_dict())
    with pytest.raises(CheckpointMismatchError, match=r"(?s)of type Net: .*Missing key.*[^. ]\. Build") as raised:
        fabric.load(folder / "part", {"model": model})
    assert "DTensor" not in str(raised.value)


def evaluate(fabric: Fabric, model: nn.Module, optimizer: Any, x: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = model(x[fabric.global_rank :: fabric.world_size]).square().mean()
    fabric.backward(loss)
    reduced: Tensor = fabric.all_reduce(loss.detach())
    return reduced


def optimizers(folder: Path) -> None:
    """Optimizers whose constructor makes a state, or that keep a list of parameters, step those of the setup."""
    fabric = launched()
    make: list[Callable[[nn.Module], Any]] = [
        lambda m: torch.optim.Adagrad(m.parameters(), 0.1, initial_accumulator_value=0.1),
        lambda m: torch.optim.LBFGS(m.parameters(), 0.1, max_iter=3),
    ]
    for made in make:
        one, (model, optimizer) = Net(), fabric.setup(net := Net(), made(net))
        optimizer_of_one = made(one)
        for x in BATCHES[:3]:
            optimizer.step(functools.partial(evaluate, fabric, model, optimizer, x))
            optimizer_of_one.step(functools.partial(evaluate, Fabric(accelerator="cpu"), one, optimizer_of_one, x))
        equal(model.state_dict(), one.state_dict())
    with pytest.raises(MisconfigurationException, match="Adafactor cannot step sharded parameters: it takes sums"):
        fabric.setup(net := Net(), torch.optim.Adafactor(net.parameters()))
    plan = ModelParallelStrategy(
        data_parallel_size=1, tensor_parallel_size=2, tensor_parallel_plan={"blocks.0.linear": "colwise_gathered"}
    )
    other = Fabric(accelerator="cpu", devices=2, strategy=plan)
    other.launch()
    model, optimizer = other.setup(net := Net(), torch.optim.LBFGS(net.parameters()))
    with pytest.raises(MisconfigurationException, match=r"LBFGS cannot step sharded parameters: it uses aten\."):
        optimizer.step(functools.partial(evaluate, Fabric(accelerator="cpu"), model, optimizer, BATCHES[0]))
    stepped = torch.optim.Adagrad((net := Net()).parameters())
    net(BATCHES[0]).sum().backward()
    stepped.step()
    with pytest.raises(MisconfigurationException, match="Adagrad has stepped before"):
        fabric.setup(net, stepped)


def hooks(folder: Path) -> None:
    """Hooks of parameters are kept, and one that would never be called is told."""
    fabric = launched()

    def halve(p: Tensor) -> None:
        assert p.grad is not None
        p.grad.mul_(0.5)

    one, net = Net(), Net()
    for each in (one, net):
        each.head.weight.register_post_accumulate_grad_hook(halve)
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), 0.1))
    optimizer_of_one = torch.optim.SGD(one.parameters(), 0.1)
    backward(fabric, model, BATCHES[0])
    one(BATCHES[0]).square().mean().backward()
    optimizer.step()
    optimizer_of_one.step()
    equal(model.state_dict(), one.state_dict())
    (net := Net()).head.weight.register_hook(torch.neg)
    with pytest.raises(MisconfigurationException, match=r"'head.weight' has a hook .* register_post_accumulate"):
        fabric.setup(net)
    model, optimizer = fabric.setup(net := Net(), torch.optim.SGD(net.parameters(), 0.1))
    model.head.weight.register_hook(torch.neg)
    backward(fabric, model, BATCHES[0])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        optimizer.step()
    assert [str(w.message)[:62] for w in told] == (
        ["'head.weight' had a hook on the gradient, which was not called"] if fabric.global_rank == 0 else []
    )


def stays_gathered(folder: Path) -> None:
    """Where parameters stay gathered until a backward pass, a forward pass between it and a step is not used again."""
    fabric = launched(sharding_strategy="SHARD_GRAD_OP")
    model, optimizer = fabric.setup(net := Net(), torch.optim.SGD(net.parameters(), 0.5))
    optimizer_of_one = torch.optim.SGD((one := Net()).parameters(), 0.5)
    for x in BATCHES[:3]:
        backward(fabric, model, x)
        model(x)  # for a metric
        optimizer.step()
        optimizer.zero_grad()
        one(x).square().mean().backward()
        optimizer_of_one.step()
        optimizer_of_one.zero_grad()
        with torch.no_grad():
            model(x)
            for each in (one, model):
                for p in each.parameters():
                    p.mul_(0.9)
    equal(model.state_dict(), one.state_dict())


def refusals(folder: Path) -> None:
    fabric = launched()
    model = fabric.setup(Net())
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(MisconfigurationException, match=r"Net cannot be copied or pickled: this rank has a part"):
            copied(model)
    with pytest.raises(MisconfigurationException, match=r"'encode' runs the forward pass of Block .* after setup\.$"):
        model.encode(BATCHES[0])
    with torch.no_grad(), pytest.raises(MisconfigurationException, match=r"in 'head' \(Linear\).*mark_forward_method"):
        model.encode(BATCHES[0])
    x = BATCHES[0].clone().requires_grad_()
    with pytest.raises(MisconfigurationException, match="create_graph=True in a backward pass"):  # else a crash follows
        torch.autograd.grad(model(x).square().sum(), x, create_graph=True)


def everything(folder: Path) -> None:
    for each in (averages, loads, optimizers, hooks, stays_gathered, refusals):
        each(folder)


def test_sharded_by_hand(tmp_path: Path) -> None:
    run_in_ranks(everything, tmp_path)
