"""Norms, clipping and scaling of gradients of which each rank holds a part."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from tests.processes import run_in_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from treadle_fabric import Fabric, MisconfigurationException, MixedPrecision
from treadle_fabric.strategies.native_step import NativeStepStrategy
from treadle_fabric.strategies.parallel import ParallelStrategy
from treadle_fabric.strategies.sharding.norms import clip_norm, clip_value, total_norm, unscale
from treadle_fabric.strategies.states.whole_state import WholeStateStrategy


def wholes() -> list[Tensor]:
    """The same on every rank: sizes that no mesh divides, one without entries on most ranks, and a single number."""
    generator = torch.Generator().manual_seed(7)
    sizes = [(5, 3), (4, 6), (1,), (7,), (6, 4), ()]
    return [torch.randn(size, generator=generator) * 3 for size in sizes]


def gradients() -> list[Tensor]:
    """:func:`wholes`: each rank has its part on a mesh of 2 x 2 or a row of it, a summand, or the whole."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    line = init_device_mesh("cpu", (4,), mesh_dim_names=("all",))
    both: tuple[Placement, ...] = (Shard(0), Shard(1))
    parts = [distribute_tensor(each.clone(), mesh, both) for each in wholes()[:2]]
    parts.append(distribute_tensor(wholes()[2].clone(), line, [Shard(0)]))
    parts.append(distribute_tensor(wholes()[3].clone(), mesh["tensor"], [Shard(0)]))
    sum_of_four = DTensor.from_local(wholes()[4] / 2, mesh, [Replicate(), Partial()], run_check=False)
    return [*parts, sum_of_four, wholes()[5].clone()]


def parameters() -> list[Tensor]:
    """Parameters with these gradients, and one that has none."""
    made: list[Tensor] = [torch.zeros(3, requires_grad=True)]
    for gradient in gradients():
        made.append(torch.zeros_like(gradient).requires_grad_())
        if isinstance(gradient, DTensor) and any(p.is_partial() for p in gradient.placements):
            made[-1] = distribute_tensor(torch.zeros(gradient.shape), gradient.device_mesh, [Replicate()] * 2)
            made[-1].requires_grad_()
        made[-1].grad = gradient
    return made


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([whole(each).reshape(-1) for each in tensors])


def _norms() -> None:
    fabric = Fabric(accelerator="cpu", devices=4, strategy="ddp")
    fabric.launch()
    for p in (0.5, 1, 2, 3.5, math.inf):
        expected = torch.linalg.vector_norm(flat(wholes()), float(p))
        found = total_norm(gradients(), p)
        assert type(found) is Tensor and found.dtype is torch.float32
        torch.testing.assert_close(found, expected)
        # two of the ranks have other parts of a model than the two others, as stages of a pipeline have
        stages = init_device_mesh("cpu", (2, 2), mesh_dim_names=("stage", "data"))
        mine = wholes()[:2] if stages.get_local_rank("stage") == 0 else []
        parts = [distribute_tensor(each, stages["data"], [Shard(0)]) for each in mine]
        found = total_norm(parts, p, [stages.get_group("stage")])
        torch.testing.assert_close(found, torch.linalg.vector_norm(flat(wholes()[:2]), float(p)))
    for bad in (math.nan, math.inf):
        broken = gradients()
        if fabric.global_rank == 3:
            broken[0].to_local().fill_(bad)
        for p in (2, math.inf):
            assert str(total_norm(broken, p).item()) == str(bad)
    sparse = torch.sparse_coo_tensor(
        torch.tensor([[1, 1, 2]]), torch.tensor([3.0, 3.0, 8.0]), (4,), check_invariants=True
    )
    assert total_norm([sparse]).item() == 10.0
    half = [distribute_tensor(torch.full((8,), 3e4, dtype=torch.float16), init_device_mesh("cpu", (4,)), [Shard(0)])]
    torch.testing.assert_close(total_norm(half), torch.tensor(3e4 * math.sqrt(8)), rtol=1e-3, atol=0.0)
    with pytest.raises(MisconfigurationException, match="norm_type=0"):
        total_norm(half, 0)
    fabric.strategy.teardown()


class Sharded(ParallelStrategy, WholeStateStrategy, NativeStepStrategy):
    """Leaves modules as they are, whose parameters are DTensors."""

    shards_parameters = True

    def setup_module(self, module: nn.Module) -> nn.Module:
        return module

    def module_to_device(self, module: nn.Module) -> None:
        pass

    def no_backward_sync(self, module: nn.Module, enabled: bool = True) -> nullcontext[None]:
        return nullcontext()


class Given(nn.Module):
    """Holds given parameters."""

    def __init__(self, given: list[Tensor]) -> None:
        super().__init__()
        self.given = nn.ParameterList(given)
        for made, each in zip(self.given, given, strict=True):
            made.grad = each.grad


def _clips() -> None:
    fabric = Fabric(accelerator="cpu", devices=4, strategy=Sharded())
    fabric.launch()
    before = flat(wholes())
    for p in (1.0, 2.0, math.inf):
        model = fabric.setup(Given(parameters()))
        optimizer = fabric.setup_optimizers(torch.optim.SGD(model.parameters(), lr=1.0))
        norm = fabric.clip_gradients(model, optimizer, max_norm=3.0, norm_type=p)
        expected = torch.linalg.vector_norm(before, p)
        assert norm is not None
        torch.testing.assert_close(norm, expected)
        clipped = [each.grad for each in model.parameters() if each.grad is not None]
        torch.testing.assert_close(flat(clipped), before * min(1.0, 3.0 / float(expected)), rtol=1e-5, atol=1e-6)
        optimizer.step()
        torch.testing.assert_close(flat([*model.parameters()][1:]), -flat(clipped))
    fabric.clip_gradients(model, optimizer, clip_val=0.4)
    clipped = [each.grad for each in model.parameters() if each.grad is not None]
    torch.testing.assert_close(flat(clipped), (before * 3.0 / float(expected)).clamp(-0.4, 0.4))
    # a limit of the entries of a sum, and not of the summands
    model = fabric.setup(Given(parameters()))
    optimizer = fabric.setup_optimizers(torch.optim.SGD(model.parameters(), lr=1.0))
    fabric.clip_gradients(model, optimizer, clip_val=0.4)
    torch.testing.assert_close(
        flat([p.grad for p in model.parameters() if p.grad is not None]), before.clamp(-0.4, 0.4)
    )
    if fabric.global_rank == 2:
        model.given[2].grad.to_local().fill_(math.nan)
    with pytest.raises(RuntimeError, match="non-finite"):
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
    norm = fabric.clip_gradients(model, optimizer, max_norm=1.0, error_if_nonfinite=False)
    assert norm is not None and norm.isnan()
    fabric.strategy.teardown()


def _scales() -> None:
    """Of several steps, the one is left out on all ranks in which one rank alone has an infinite gradient."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000)
    fabric = Fabric(accelerator="cpu", devices=4, strategy=Sharded(), plugins=MixedPrecision("16-mixed", scaler=scaler))
    fabric.launch()
    model = fabric.setup(Given(parameters()))
    optimizer = fabric.setup_optimizers(torch.optim.SGD([*model.parameters()][::-1], lr=1.0))
    scale = 4.0
    for broken, clips in ((None, False), (0, False), (1, True), (3, False), (None, True)):
        for each, given in zip(model.parameters(), parameters(), strict=True):
            each.grad = None if given.grad is None else given.grad * scale
        before = flat([*model.parameters()]).clone()
        fabric.strategy.precision._scaling.scale(torch.ones(()))  # as a backward pass does
        if broken is not None and fabric.global_rank == 3:
            model.given[1 + broken].grad.to_local().reshape(-1)[:1] = math.inf
        if clips:
            fabric.clip_gradients(model, optimizer, max_norm=1e9)
        optimizer.step()
        changed = flat([*model.parameters()]) - before
        expected = torch.zeros(()) if broken is not None else torch.cat([torch.zeros(3), -flat(wholes())])
        torch.testing.assert_close(changed, expected.expand_as(changed), rtol=1e-5, atol=1e-5)
        if broken is not None:
            scale /= 2
        assert scaler.get_scale() == scale if fabric.strategy.precision.scaler is not None else False
    # what one stage of a pipeline finds, the others know
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("stage", "data"))
    own = torch.zeros(2, requires_grad=True)
    stage = torch.optim.SGD([own])
    own.grad = torch.full((2,), math.inf) if fabric.global_rank == 1 else None if fabric.global_rank else torch.ones(2)
    unscale(scaler, stage, [mesh.get_group("stage"), mesh.get_group("data")])
    assert scaler.step(stage) is None and not own.any()
    fabric.strategy.teardown()


def test_norm_over_all_shards_is_that_of_the_whole() -> None:
    run_in_ranks(_norms, devices=4)


def test_clipping_limits_norm_and_entries_of_the_whole() -> None:
    run_in_ranks(_clips, devices=4)


def test_step_is_left_out_on_all_ranks_where_one_part_is_infinite() -> None:
    run_in_ranks(_scales, devices=4)


def test_plain_and_sparse_gradients_alone() -> None:
    plain, sparse = torch.zeros(2, requires_grad=True), torch.zeros(3, requires_grad=True)
    plain.grad = torch.tensor([3.0, 0.0])
    sparse.grad = torch.sparse_coo_tensor(torch.tensor([[1, 1]]), torch.tensor([2.0, 2.0]), (3,), check_invariants=True)
    assert clip_norm([plain, sparse], 1.0).item() == pytest.approx(5.0)
    assert plain.grad.norm().item() == pytest.approx(0.6) and sparse.grad.to_dense()[1].item() == pytest.approx(0.8)
    clip_value([plain, sparse], 0.5)
    assert plain.grad.tolist() == [0.5, 0.0] and sparse.grad.to_dense().tolist() == [0.0, 0.5, 0.0]
    assert total_norm([], 2).item() == total_norm([], math.inf).item() == 0.0
    imaginary = torch.tensor([3.0 + 4.0j, 0.0])
    assert total_norm([imaginary, torch.full((1,), 12.0, dtype=torch.float64)], 1).item() == 17.0
