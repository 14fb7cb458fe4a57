"""A snapshot puts back, in place, what objects of any kind hold.

Tests of ``treadle.searches.snapshot``.
"""

from __future__ import annotations

import copy
import functools
import random
from collections import OrderedDict, defaultdict, deque
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from treadle.searches.snapshot import Snapshot


class Slotted:
    __slots__ = ("count", "unset")

    def __init__(self) -> None:
        self.count = 1


class Holder:
    """An object with one attribute."""

    def __init__(self, value: Any) -> None:
        self.value = value


def change_list(value: list[Any]) -> None:
    value[0] = 7
    value.append(8)


def grow(value: Any) -> None:
    value.count, value.unset = 2, 3


CHANGES: dict[str, tuple[Any, Any, Any]] = {
    "list": (lambda: [1, 2], change_list, list),
    "deque": (lambda: deque([1, 2], maxlen=3), lambda d: d.append(3), list),
    "set": (lambda: {1, 2}, lambda s: s.add(3), set),
    "ordered": (lambda: OrderedDict(a=1, b=2), lambda d: d.move_to_end("a"), lambda d: list(d.items())),
    "default": (lambda: defaultdict(list, a=[1]), lambda d: (d["a"].append(2), d["b"]), copy.deepcopy),
    "array": (lambda: np.arange(3), lambda a: a.fill(9), lambda a: a.tolist()),
    "generator": (
        lambda: torch.Generator().manual_seed(1),
        lambda g: torch.rand(3, generator=g),
        lambda g: g.get_state().tolist(),
    ),
    "python": (lambda: random.Random(1), lambda r: r.random(), lambda r: r.getstate()),
    "numpy": (lambda: np.random.default_rng(1), lambda r: r.random(), lambda r: str(r.bit_generator.state)),
    "old numpy": (lambda: np.random.RandomState(1), lambda r: r.rand(), lambda r: str(r.get_state())),
    "slots": (Slotted, grow, lambda s: (s.count, hasattr(s, "unset"))),
    "partial": (lambda: functools.partial(max, [1]), lambda p: p.args[0].append(2), lambda p: list(p.args[0])),
    "method": (lambda: Holder([1]).value.append, lambda m: m(2), lambda m: list(m.__self__)),
    "tensor": (lambda: torch.zeros(3), lambda t: t.fill_(float("nan")), lambda t: t.tolist()),
    "view": (lambda: torch.arange(4.0)[1:3], lambda t: t.zero_(), lambda t: t.tolist()),
    "half": (lambda: torch.ones(2, dtype=torch.bfloat16), lambda t: t.zero_(), lambda t: t.tolist()),
    "sparse": (lambda: torch.eye(2).to_sparse(), lambda t: t.mul_(3), lambda t: t.to_dense().tolist()),
    "expanded": (lambda: torch.zeros(1).expand(3), lambda t: None, lambda t: t.tolist()),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_an_attribute_holds(name: str) -> None:
    make, change, look = CHANGES[name]
    holder = Holder(make())
    before, value = look(holder.value), holder.value
    snapshot = Snapshot(holder)
    for _ in range(2):  # as often as one likes
        change(holder.value)
        assert name == "expanded" or look(holder.value) != before
        holder.value, holder.other = None, 1  # type: ignore[attr-defined]
        snapshot.restore()
        assert holder.value is value
        assert look(value) == before
        assert not hasattr(holder, "other")


def test_a_slot_that_was_not_set_is_unset_again() -> None:
    slotted = Slotted()
    snapshot = Snapshot(slotted)
    slotted.unset = 1  # type: ignore[attr-defined]
    snapshot.restore()
    assert not hasattr(slotted, "unset")


def test_a_module_with_its_gradients_and_an_optimizer() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
    module[0].bias.requires_grad_(False)
    module[2].weight.grad = torch.ones(1, 2)
    gradient, weight = module[2].weight.grad, module[0].weight
    tied = module[0].weight
    module.register_parameter("tied", tied)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    shared = weight.detach().numpy()
    before, options = copy.deepcopy(module.state_dict()), copy.deepcopy(optimizer.state_dict())
    snapshot = Snapshot(module, optimizer)
    for _ in range(3):
        module(torch.randn(4, 2)).sum().backward()
        optimizer.step()
    module.zero_grad()
    module[0] = nn.Linear(2, 2)
    module.to(torch.float64)
    module.requires_grad_(False).eval()
    optimizer.param_groups[0]["lr"] = 5
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    snapshot.restore()
    assert module[0].weight is weight is module.tied
    assert all(
        torch.equal(value, before[name]) and value.dtype == before[name].dtype
        for name, value in module.state_dict().items()
    )
    assert (shared == before["0.weight"].numpy()).all()  # the memory is the same, too
    assert module[2].weight.grad is gradient
    assert gradient.tolist() == [[1, 1]]
    assert module[0].weight.grad is None
    assert [p.requires_grad for p in module[0].parameters()] == [True, False]
    assert module.training
    assert optimizer.state_dict() == options
    assert not optimizer.state


def test_a_lazy_layer_is_lazy_again() -> None:
    module = nn.Sequential(nn.LazyLinear(2))
    snapshot = Snapshot(module)
    module(torch.zeros(1, 3))
    assert type(module[0]) is nn.Linear
    snapshot.restore()
    assert type(module[0]) is nn.LazyLinear
    assert module(torch.zeros(1, 5)).shape == (1, 2)


def test_large_data_is_not_copied() -> None:
    data = TensorDataset(torch.zeros(1 << 19))  # 2 MiB
    small = Holder(TensorDataset(torch.zeros(3)))
    snapshot = Snapshot(small, data=[data])
    data.tensors[0].fill_(1)
    small.value.tensors[0].fill_(1)
    snapshot.restore()
    assert data.tensors[0][0] == 1
    assert small.value.tensors[0][0] == 0


def test_without_values_only_what_is_new_goes() -> None:
    module = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(module.parameters())
    snapshot = Snapshot(module, optimizer, values=False)
    module(torch.ones(1, 2)).sum().backward()
    before = module.weight.tolist()
    optimizer.step()
    module.kept = [torch.zeros(3)]
    snapshot.restore()
    assert module.weight.tolist() != before
    assert module.weight.grad is None
    assert not optimizer.state
    assert not hasattr(module, "kept")


def test_an_object_that_refuses_is_told_and_keeps_nothing_else_from_its_place() -> None:
    class Refusing(dict):  # type: ignore[type-arg]
        def update(self, *args: Any, **kwargs: Any) -> None:
            raise TypeError("read only")

    refusing, other = Refusing(a=1), [1]
    snapshot = Snapshot(refusing, other)
    refusing["b"] = 2
    other.append(2)
    with pytest.warns(UserWarning, match=r"Refusing \(TypeError: read only\)"):
        snapshot.restore()
    assert other == [1]
