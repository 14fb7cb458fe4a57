"""What setup returns: transparent where nothing has to be added.

Tests of ``treadle_fabric.setup.module``, ``treadle_fabric.setup.optimizer``.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, Sampler

from treadle_fabric import (
    Fabric,
    FabricDataLoader,
    FabricModule,
    FabricOptimizer,
    MisconfigurationException,
    SingleDeviceStrategy,
    is_wrapped,
    method_of,
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("count", torch.zeros(()))
        self.note = "mine"

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.layer(x) * scale

    def encode(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def training_step(self, batch: Any, i: int) -> Tensor:
        return self(batch).sum() + i


def fabric(**kwargs: Any) -> Fabric:
    return Fabric(accelerator="cpu", devices=1, **kwargs)


# The module


def test_module_is_transparent() -> None:
    net = Net()
    model = fabric().setup(net)
    assert isinstance(model, FabricModule)
    assert isinstance(model, nn.Module)
    assert model.module is net
    assert model.note == "mine"
    assert model.layer is net.layer
    assert model.count is net.count
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in net.named_parameters()]
    assert [id(p) for p in model.parameters()] == [id(p) for p in net.parameters()]
    assert dict(model.named_buffers()) == dict(net.named_buffers())
    assert list(model.modules()) == list(net.modules())
    assert list(model.children()) == [net.layer]
    assert model.state_dict().keys() == net.state_dict().keys()
    assert model.get_submodule("layer") is net.layer
    assert "encode" in dir(model)
    assert "Net" in repr(model)
    with pytest.raises(AttributeError, match="nothing"):
        _ = model.nothing
    x = torch.ones(1, 3)
    assert torch.equal(model(x, scale=2.0), net(x, scale=2.0))
    assert torch.equal(model.forward(x), net(x))
    assert torch.equal(model.encode(x), net.encode(x))


def test_writes_reach_the_module() -> None:
    net = Net()
    model = fabric().setup(net)
    model.note = "new"
    model.extra = nn.Linear(1, 1)
    assert net.note == "new"
    assert "extra.weight" in net.state_dict()
    del model.extra
    assert not hasattr(net, "extra")
    other = Net()
    model.load_state_dict(other.state_dict())
    assert torch.equal(net.layer.weight, other.layer.weight)
    model.eval()
    assert (net.training, net.layer.training, model.training) == (False, False, False)
    model.train()
    assert (net.training, net.layer.training, model.training) == (True, True, True)
    net.eval()
    assert not model.training
    assert model.double() is model
    assert net.layer.weight.dtype == torch.float64
    model.requires_grad_(False)
    assert not net.layer.weight.requires_grad
    model.apply(lambda m: setattr(m, "seen", True))
    assert net.layer.seen


def test_hooks_registered_on_the_wrapper_run() -> None:
    net = Net()
    model = fabric().setup(net)
    calls: list[str] = []
    handle = model.register_forward_hook(lambda *_: calls.append("after"))
    model.register_forward_pre_hook(lambda *_: calls.append("before"))
    model.register_full_backward_hook(lambda *_: calls.append("backward"))
    model(torch.ones(1, 3, requires_grad=True)).sum().backward()
    assert calls == ["before", "after", "backward"]
    handle.remove()
    calls.clear()
    model(torch.ones(1, 3))
    assert calls == ["before"]


def test_method_costs_no_frame_where_nothing_is_to_be_added() -> None:
    net = Net()
    model = fabric().setup(net)
    assert method_of(model, "training_step") == net.training_step
    with pytest.raises(AttributeError, match="training_stepp"):
        method_of(model, "training_stepp")
    cast = method_of(fabric(precision="bf16-true").setup(Net()), "encode")
    assert cast(torch.ones(1, 3)).dtype == torch.bfloat16, "what a step returns is its own business"


def test_marked_methods() -> None:
    model = fabric(precision="bf16-true").setup(Net())
    x = torch.ones(1, 3)
    with pytest.raises(RuntimeError):
        model.encode(x)  # not marked: nobody casts its input
    model.mark_forward_method("encode")
    assert model.encode(x).dtype == torch.float32
    model.mark_forward_method(model.module.training_step)
    assert model.training_step(x, 0).dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "hint"), [("encod", "Did you mean 'encode'"), ("forward", "needs no mark"), ("note", "no method")]
)
def test_marking_what_is_no_method(name: str, hint: str) -> None:
    with pytest.raises(MisconfigurationException, match=hint):
        fabric().setup(Net()).mark_forward_method(name)


def test_copies_are_independent() -> None:
    model = fabric(precision="bf16-true").setup(Net())
    model.mark_forward_method("encode")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is FabricModule
        with torch.no_grad():
            other.layer.weight.zero_()
            other.layer.bias.zero_()
        x = torch.ones(1, 3)
        assert not other(x).any()
        assert not other.encode(x).any()
        assert model(x).any()


def test_nested_in_another_module() -> None:
    model = fabric().setup(Net())
    outer = nn.Sequential(model)
    assert set(outer.state_dict()) == {"0.layer.weight", "0.layer.bias", "0.count"}
    assert {n for n, _ in outer.named_parameters()} == {"0.layer.weight", "0.layer.bias"}
    assert outer(torch.ones(1, 3)).shape == (1, 2)


def test_compiled_module_keeps_its_names() -> None:
    compiled = torch.compile(Net(), backend="eager")
    model = fabric().setup(compiled)
    assert set(model.state_dict()) == {"layer.weight", "layer.bias", "count"}
    assert {n for n, _ in model.named_parameters()} == {"layer.weight", "layer.bias"}
    assert model(torch.ones(1, 3)).shape == (1, 2)
    assert model.note == "mine"


# The optimizer


def test_optimizer_is_transparent() -> None:
    net = Net()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    _, wrapped = fabric().setup(net, optimizer)
    assert isinstance(wrapped, FabricOptimizer)
    assert isinstance(wrapped, torch.optim.Adam)
    assert type(wrapped).__name__ == "FabricAdam"
    assert wrapped.optimizer is optimizer
    assert wrapped.param_groups is optimizer.param_groups
    assert wrapped.defaults is optimizer.defaults
    net(torch.ones(1, 3)).sum().backward()
    wrapped.step()
    assert wrapped.state is optimizer.state
    assert len(wrapped.state) == 2
    wrapped.zero_grad()
    assert net.layer.weight.grad is None
    state = copy.deepcopy(wrapped.state_dict())
    wrapped.load_state_dict(state)  # replaces state and param_groups inside
    assert wrapped.state is optimizer.state
    assert wrapped.param_groups is optimizer.param_groups
    wrapped.param_groups[0]["lr"] = 0.5
    assert optimizer.param_groups[0]["lr"] == 0.5
    wrapped.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    assert len(optimizer.param_groups) == 2
    assert "Adam" in repr(wrapped)
    calls: list[int] = []
    wrapped.register_step_post_hook(lambda *_: calls.append(1))
    wrapped.step()
    assert calls == [1]


def test_optimizer_steps_with_closure_and_arguments() -> None:
    net = Net()
    seen: dict[str, Any] = {}

    class Own(torch.optim.SGD):
        def step(self, closure: Any = None, *, factor: float = 1.0) -> Any:  # type: ignore[override]
            seen["factor"] = factor
            return super().step(closure)

        def swap(self) -> str:
            return "swapped"

    _, optimizer = fabric().setup(net, Own(net.parameters(), lr=0.1))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = net(torch.ones(1, 3)).sum()
        loss.backward()
        return loss

    expected = net(torch.ones(1, 3)).sum().item()
    assert optimizer.step(closure, factor=3.0).item() == expected
    assert seen == {"factor": 3.0}
    assert optimizer.swap() == "swapped"


def test_lbfgs() -> None:
    net = nn.Linear(1, 1)
    run = fabric()
    model, optimizer = run.setup(net, torch.optim.LBFGS(net.parameters(), max_iter=20))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (model(torch.ones(1, 1)) - 3).square().sum()
        run.backward(loss)
        return loss

    first = optimizer.step(closure).item()
    assert closure().item() < first * 1e-3


@pytest.mark.parametrize("before_setup", [True, False])
def test_schedulers_work_with_either_optimizer(before_setup: bool) -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    scheduler: Any = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1) if before_setup else None
    _, wrapped = fabric().setup(net, optimizer)
    scheduler = scheduler or torch.optim.lr_scheduler.StepLR(wrapped, 1, 0.1)
    net(torch.ones(1, 3)).sum().backward()
    for _ in range(2):
        wrapped.step()  # torch warns if it thinks that the scheduler stepped first, and warnings are errors here
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


def test_before_and_after_step() -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    calls: list[Any] = []
    strategy = SingleDeviceStrategy()
    wrapped = FabricOptimizer(
        optimizer, strategy, before_step=lambda o: calls.append(("before", o)), after_step=lambda o: calls.append(o)
    )
    wrapped.step()
    assert calls == [("before", optimizer), optimizer]


def test_optimizer_copies() -> None:
    net = Net()
    _, wrapped = fabric().setup(net, torch.optim.SGD(net.parameters(), lr=1.0))
    other = copy.deepcopy(wrapped)
    assert isinstance(other, torch.optim.SGD)
    other.param_groups[0]["lr"] = 5.0
    assert wrapped.param_groups[0]["lr"] == 1.0


# The loader


class Epochs(Sampler[int]):
    def __init__(self) -> None:
        self.epoch = 0
        self.seen: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.seen.append(self.epoch)
        return iter(range(4))

    def __len__(self) -> int:
        return 4


def test_loader_moves_and_passes_through() -> None:
    loader = DataLoader(torch.arange(4.0), batch_size=2)
    wrapped = fabric().setup_dataloaders(loader)
    assert isinstance(wrapped, FabricDataLoader)
    assert len(wrapped) == 2
    assert wrapped.batch_size == 2
    assert wrapped.dataset is loader.dataset
    assert wrapped.device == torch.device("cpu")
    assert [b.tolist() for b in wrapped] == [[0, 1], [2, 3]]
    on_meta = FabricDataLoader(loader, torch.device("meta"))
    assert {b.device.type for b in on_meta} == {"meta"}
    stays = FabricDataLoader(loader)
    assert {b.device.type for b in stays} == {"cpu"}
    copy.copy(wrapped)
    batches = [[torch.ones(1)], [torch.zeros(1)]]
    assert list(FabricDataLoader(batches, torch.device("cpu")))[0] is batches[0]


def test_every_iteration_is_an_epoch() -> None:
    sampler = Epochs()
    loader = fabric().setup_dataloaders(DataLoader(torch.arange(4.0), sampler=sampler))
    for _ in range(3):
        list(loader)
    assert sampler.seen == [0, 1, 2]
    loader.set_epoch(7)
    list(loader)
    list(loader)
    assert sampler.seen[3:] == [7, 8]


def test_the_user_may_count_epochs() -> None:
    """A loop that sets the epoch itself, as after a resume, is not overruled."""
    sampler = Epochs()
    loader = fabric().setup_dataloaders(DataLoader(torch.arange(4.0), sampler=sampler))
    for epoch in (5, 6, 7):
        sampler.set_epoch(epoch)
        list(loader)
    list(loader)
    assert sampler.seen == [5, 6, 7, 8]


def test_a_distributed_sampler_shuffles_anew() -> None:
    data = torch.arange(16)
    loader = fabric().setup_dataloaders(
        DataLoader(data, batch_size=16, sampler=DistributedSampler(data, num_replicas=1, rank=0))  # type: ignore[arg-type]
    )
    orders = [next(iter(loader)).tolist() for _ in range(2)]
    assert orders[0] != orders[1]


def test_is_wrapped() -> None:
    net = Net()
    run = fabric()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    loader = [1]
    assert not any(map(is_wrapped, (net, optimizer, loader)))
    assert all(map(is_wrapped, (*run.setup(net, optimizer), run.setup_dataloaders(loader))))
