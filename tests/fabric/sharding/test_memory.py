"""What a rank keeps of a sharded model: the whole divided by the number of ranks, and no gathered copy after a step.

Tests of ``treadle_fabric.strategies.sharding.shard``, ``treadle_fabric.strategies.model_parallel``.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.tensor.parallel  # heavy, as those before; the forks inherit them
from tests.processes import run_in_ranks
from torch import Tensor, nn

from treadle_fabric import Fabric
from treadle_fabric.strategies import FSDPStrategy, ModelParallelStrategy

WIDTH, LAYERS = 128, 3
PLAN = {"blocks.*.up": "colwise", "blocks.*.down": "rowwise"}


class Block(nn.Module):
    """Two layers of which each dimension divides by four; one of the biases is not shared out by tensor parallelism."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


def kept(model: nn.Module, optimizer: Any) -> Iterator[Any]:
    """Parameters, gradients and what AdamW keeps of them."""
    for parameter in model.parameters():
        yield from (parameter, parameter.grad)
        yield from (value for value in optimizer.state[parameter].values() if value.ndim)


def local(tensor: Any) -> Tensor:
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def storages(size: int) -> dict[int, int]:
    """The bytes of all storages of at least this size that any tensor in this process has, by their addresses."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if type(t) in (Tensor, nn.Parameter)]
    found = [t.untyped_storage() for t in tensors if t.layout is torch.strided and not t.is_meta]
    return {s.data_ptr(): s.size() for s in found if s.size() >= size}


def measure(strategy: Callable[[], Any], ranks: int, whole: int) -> None:
    before, layer = storages(1), 4 * WIDTH * WIDTH * 4

    def hidden(mine: dict[int, int]) -> dict[int, int]:
        """Storages of at least a rank's part of a layer, of none of the tensors that are kept."""
        return {at: size for at, size in storages(layer // ranks).items() if at not in mine and at not in before}

    fabric = Fabric(accelerator="cpu", devices=ranks, strategy=strategy())
    fabric.launch()
    model: Any = Wide()
    optimizer: Any = torch.optim.AdamW(model.parameters())
    model, optimizer = fabric.setup(model, optimizer)
    for step in range(2):
        optimizer.zero_grad()
        fabric.backward(model(torch.ones(4, WIDTH)).square().mean())
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        parts = [local(tensor) for tensor in kept(model, optimizer)]
        assert sum(part.nbytes for part in parts) == pytest.approx(whole / ranks, rel=0.02), step
        mine = {part.untyped_storage().data_ptr(): part.untyped_storage().size() for part in parts}
        assert sum(mine.values()) == pytest.approx(whole / ranks, rel=0.02), step
        # what a step gathered is freed
        assert not hidden(mine), step
    gathered: Any = next(model.parameters())
    gathered = gathered.full_tensor()
    assert sum(hidden(mine).values()) >= gathered.nbytes, "would be seen"


TWO_BY_TWO = {"data_parallel_size": 2, "tensor_parallel_size": 2, "tensor_parallel_plan": PLAN}


@pytest.mark.faults  # takes long
@pytest.mark.parametrize(
    ("ranks", "strategy"),
    [
        (2, lambda: FSDPStrategy(policy={Block})),
        (4, lambda: FSDPStrategy(policy={Block})),
        (4, lambda: ModelParallelStrategy(policy={Block}, **TWO_BY_TWO)),
    ],
    ids=["fsdp2", "fsdp4", "tensor2_fsdp2"],
)
def test_a_rank_keeps_its_part(ranks: int, strategy: Callable[[], Any]) -> None:
    numbers = sum(math.prod(p.shape) for p in Wide().parameters())
    run_in_ranks(measure, strategy, ranks, 4 * 4 * numbers, devices=ranks)
