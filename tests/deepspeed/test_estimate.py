"""What is estimated for DeepSpeed is what its engine allocates and sends.

Tests of ``treadle_fabric.estimating.zero``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.processes import run_in_ranks
from treadle_fabric import Fabric, estimate
from treadle_fabric.strategies import DeepSpeedStrategy

pytestmark = [pytest.mark.deepspeed, pytest.mark.timeout(200)]

ROWS = [(stage, precision) for precision in ("32-true", "bf16-mixed") for stage in (1, 2, 3)]
ROWS += [(4, "32-true")]  # stage 3, which gathers everything again for the backward pass
KEPT = 100  # numbers: the two matrices are larger


def strategy(row: int) -> DeepSpeedStrategy:
    zero = {"stage": min(row, 3), "stage3_param_persistence_threshold": KEPT}
    if row == 4:
        zero |= {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
    return DeepSpeedStrategy(stage=min(row, 3), reduce_bucket_size=5000, config={"zero_optimization": zero})


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(7, 33), nn.ReLU(), nn.Linear(33, 5))  # numbers that two ranks cannot share evenly


def storages(*values: Any) -> int:
    """The bytes of all tensors in values, each storage once."""
    found = {}
    for tensor in tensors(values):
        found[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
    return sum(found.values())


def tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            yield from tensors(each)


def in_engine(stage: int, precision: str) -> dict[str, Any]:
    """Train three steps; what this rank holds, and the messages of the third, as torch's profiler saw them."""
    from torch.profiler import ProfilerActivity, profile

    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy(stage), precision=precision)  # type: ignore[arg-type]
    fabric.launch()
    torch.manual_seed(0)
    module = net()
    parameters = list(module.parameters())
    model: Any
    model, optimizer = fabric.setup(module, torch.optim.AdamW(parameters, lr=1e-3))
    zero = fabric.strategy.engine.optimizer  # type: ignore[attr-defined]
    for _ in range(2):
        fabric.backward(model(torch.ones(6, 7)).sum())
        optimizer.step()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        fabric.backward(model(torch.ones(6, 7)).sum())
        if stage >= 3:
            gradients, masters = zero.grad_partitions_flat_buffer, zero.fp32_partitioned_groups_flat
        else:
            gradients = [zero.all_grad_tensors, [p.grad for p in parameters]]
            masters = zero.single_partition_of_fp32_groups
        held = storages(gradients)
        optimizer.step()
    return {
        "parameters": storages(parameters) + storages([getattr(p, "ds_tensor", None) for p in parameters]),
        "gradients": held,
        "optimizer_state": storages(masters, [dict(state) for state in zero.optimizer.state.values()]),
        "messages": messages([(each.name, each.input_shapes) for each in seen.events()], 4 if "32" in precision else 2),
    }


def messages(events: list[tuple[str, Any]], width: int) -> dict[str, int]:
    """The bytes of the collectives' messages; those of one number are left out, such as the norm of the gradients."""

    def sizes(name: str, argument: int) -> int:
        counts = [prod(shapes[argument]) for each, shapes in events if each == name]
        return width * sum(count for count in counts if count > 1)

    gathered, scattered = sizes("c10d::_allgather_base_", 0), sizes("c10d::_reduce_scatter_base_", 1)
    reduced = sizes("gloo:all_reduce", 0) - scattered  # gloo scatters what it has reduced everywhere
    found = {"all_reduce": reduced, "all_gather": gathered, "reduce_scatter": scattered}
    return {kind: size for kind, size in found.items() if size}


def run_all(file: Path) -> None:
    found = [in_engine(*row) for row in ROWS]
    if torch.distributed.get_rank() == 0:
        file.write_text(json.dumps(found))


def test_the_arithmetic_is_that_of_deepspeed(tmp_path: Path) -> None:
    run_in_ranks(run_all, tmp_path / "found")
    for (stage, precision), real in zip(ROWS, json.loads((tmp_path / "found").read_text()), strict=True):
        planned = estimate(net, torch.optim.AdamW, strategy(stage), 2, precision, lambda: torch.ones(6, 7))
        for part in ("parameters", "gradients", "optimizer_state"):
            assert getattr(planned.memory, part) == real[part], (stage, precision, part)
        planned_messages = {kind: each.payload for kind, each in planned.traffic.items()}
        assert planned_messages == pytest.approx(real["messages"], rel=0.05), (stage, precision)
