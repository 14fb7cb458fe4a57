"""Modules from the meta device: values as if they had been made without it, and no rank has memory for the whole.

Tests of ``treadle_fabric.strategies.sharding.materialize``.
"""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.processes import run_in_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from treadle_fabric import MisconfigurationException, Precision
from treadle_fabric.strategies.sharding.materialize import give_values, materialize

CPU = torch.device("cpu")


class Rotary(nn.Module):
    cos: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cos", torch.empty(5, 3), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.cos = torch.outer(torch.arange(5.0), torch.arange(3.0)).cos()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)  # its method is `_reset_parameters`
        self.layer = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.rotary = Rotary()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Changes what submodules have drawn."""
        nn.init.orthogonal_(self.layer.weight)
        self.layer.weight.data.mul_(0.5)
        self.layer.bias.data = torch.full((8,), 0.25)
        with torch.no_grad():
            self.attention.in_proj_bias[3:5] = 1.0
            self.layer.weight[0] /= self.layer.weight.norm()


class Assigned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(7, 3))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.weight = nn.Parameter(torch.randn(7, 3) / math.sqrt(3))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8, padding_idx=2)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(8, 11)
        self.head.weight = self.embed.weight
        self.assigned = Assigned()
        self.recurrent = nn.LSTM(8, 5)
        self.filters = nn.Conv2d(3, 5, 3)
        self.filters.weight.requires_grad_(False)


class Initialized(Net):
    """As nanoGPT and others have it."""

    def __init__(self) -> None:
        super().__init__()
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
        for name, parameter in module.named_parameters():
            if name.endswith("out_proj.weight"):
                nn.init.normal_(parameter, std=0.01)


class WithoutArguments(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self._init_weights()

    def _init_weights(self) -> None:
        nn.init.constant_(self.layer.bias, 3.0)


def equal(made: nn.Module, expected: nn.Module) -> bool:
    """Bit for bit, the buffers that are not persistent too."""
    pairs = zip(
        (*made.named_parameters(), *made.named_buffers()),
        (*expected.named_parameters(), *expected.named_buffers()),
        strict=True,
    )
    for (name, tensor), (other, wanted) in pairs:
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if name != other or not torch.equal(whole, wanted) or tensor.requires_grad != wanted.requires_grad:
            return False
    return True


@pytest.mark.parametrize("kind", [Net, Initialized, WithoutArguments])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_as_without_the_meta_device(kind: type[nn.Module], dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    torch.set_default_dtype(dtype)
    expected, then = kind(), torch.rand(3)
    with torch.device("meta"):
        model = kind()
    torch.manual_seed(3)
    tagged = next(model.parameters())
    tagged.no_decay = True  # type: ignore[attr-defined]
    assert materialize(model, CPU) == []
    assert equal(model, expected)
    assert torch.equal(torch.rand(3), then)
    assert next(model.parameters()).no_decay
    if isinstance(model, Net):
        assert model.head.weight is model.embed.weight


def test_values_that_are_there_are_kept() -> None:
    torch.manual_seed(3)
    expected = Net()
    with torch.device("meta"):
        model = Net()
    kept = model.blocks[0].layer = nn.Linear(8, 8)
    model.filters.bias = nn.Parameter(torch.ones(5))
    weight, copy = kept.weight, kept.weight.detach().clone()
    torch.manual_seed(3)
    assert materialize(model, CPU) == []
    assert kept.weight is weight
    assert torch.equal(weight, copy)
    assert torch.equal(model.filters.bias, torch.ones(5))
    assert torch.equal(model.embed.weight, expected.embed.weight)
    assert not any(t.is_meta for t in model.state_dict().values())


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.ones(3))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.scale


def test_without_initialization(caplog: pytest.LogCaptureFixture) -> None:
    """A checkpoint may be loaded next: only what is used without values is an error."""
    torch.manual_seed(3)
    expected = nn.Linear(3, 3)
    with torch.device("meta"):
        model = Bare()
    torch.manual_seed(3)
    caplog.set_level("INFO", "treadle_fabric")
    give_values(model, Precision(), CPU, lambda state: state)
    assert "scale, steps" in caplog.text
    assert torch.equal(model.layer.weight, expected.weight)
    assert model.scale.isnan().all()
    with pytest.raises(MisconfigurationException, match=r"Without values: scale, steps\. .*reset_parameters"):
        model(torch.ones(3))

    with torch.device("meta"):
        model = Bare()
    give_values(model, Precision(), CPU, lambda state: state)
    model.load_state_dict(Bare().state_dict())
    assert model(torch.ones(3)).isfinite().all()
    give_values(model, Precision(), CPU, lambda state: 1 / 0)  # nothing to do


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(3), persistent=False)


class Attribute(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.angles = torch.ones(3)
        self.layer = nn.Linear(2, 2)


class Other(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3))

    def reset_parameters(self) -> None:
        self.weight = nn.Parameter(torch.ones(4))


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (Masked, "0.mask: made on the meta device, so without values, and no checkpoint has them. Compute them in"
                 " Masked.reset_parameters()"),
        (Attribute, "0.angles: made on the meta device"),
        (Other, "a parameter of shape (3,) by one of shape (4,)"),
    ],
)  # fmt: skip
def test_refused(kind: type[nn.Module], told: str) -> None:
    with torch.device("meta"):
        model = nn.Sequential(kind())
    with pytest.raises(MisconfigurationException) as error:
        materialize(model, CPU)
    assert told in str(error.value)


def parts() -> None:
    rank = int(os.environ["LOCAL_RANK"])
    os.environ["RANK"] = str(rank)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))

    def broadcast(value: Any) -> Any:
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    for kind in (Net, Initialized):
        torch.manual_seed(3)
        expected, then = kind(), torch.rand(3)
        torch.manual_seed(3 + rank)
        before = torch.get_rng_state()
        with torch.device("meta"):
            model = kind()
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert materialize(model, CPU, None, broadcast) == []
        assert equal(model, expected)
        assert model.head.weight is model.embed.weight
        assert all(isinstance(p, DTensor) and p.device == CPU for p in model.parameters())
        held = sum(p.to_local().untyped_storage().nbytes() for p in model.parameters())
        assert held <= 0.6 * sum(p.nbytes for p in expected.parameters())  # no part holds on to what it was cut from
        if rank == 0:
            assert torch.equal(torch.rand(3), then)
        else:  # which drew as rank 0 did, and goes on with its own
            assert torch.equal(torch.get_rng_state(), before)

    torch.manual_seed(3)
    expected = Net()
    torch.manual_seed(3)
    with torch.device("meta"):
        model = Net()
    kept = model.blocks[0].layer = nn.Linear(8, 8)  # alike on both ranks
    copy = kept.weight.detach().clone()
    fully_shard(model, mesh=mesh)
    torch.manual_seed(3)
    assert materialize(model, CPU, None, broadcast) == []
    assert torch.equal(kept.weight.full_tensor(), copy)
    assert torch.equal(model.embed.weight.full_tensor(), expected.embed.weight)

    with torch.device("meta"):  # cut along another dimension, as tensor parallelism does
        layer = nn.Linear(4, 6)
    layer.weight = nn.Parameter(distribute_tensor(layer.weight, mesh, [Shard(1)]))
    torch.manual_seed(3)
    materialize(layer, CPU, None, broadcast)
    torch.manual_seed(3)
    assert torch.equal(layer.weight.full_tensor(), nn.Linear(4, 6).weight)

    with torch.device("meta"):
        bare = fully_shard(Bare(), mesh=mesh)
    assert materialize(bare, CPU, None, broadcast) == ["scale", "steps"]
    assert bare.scale.full_tensor().isnan().all()
    dist.destroy_process_group()


def test_each_rank_keeps_its_part() -> None:
    run_in_ranks(parts)
