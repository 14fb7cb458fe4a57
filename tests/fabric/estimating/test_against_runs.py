"""What is estimated is what real processes allocate and send."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.processes import run_in_ranks
from torch import nn

from treadle_fabric import DDPStrategy, Fabric, FSDPStrategy, ModelParallelStrategy, estimate
from treadle_fabric.estimating.planned_step import _traffic
from treadle_fabric.estimating.recorder import Recorder
from treadle_fabric.estimating.step import Step


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 3 * width)
        self.down = nn.Linear(3 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.first = nn.Linear(7, width)  # 7 and 5 are not divided by the numbers of ranks
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))
        self.last = nn.Linear(width, 5)
        self.register_buffer("scale", torch.ones(width))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = self.first(x) * self.scale
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.last(x), y)


PLAN = {"blocks.*.up": "colwise", "blocks.*.down": "rowwise"}
LAYOUTS: dict[str, Any] = {
    "single_device": lambda: "single_device",
    "ddp": lambda: "ddp",
    "ddp views": lambda: DDPStrategy(gradient_as_bucket_view=True),
    "ddp small buckets": lambda: DDPStrategy(bucket_cap_mb=0.005),
    "ddp unused": lambda: "ddp_find_unused_parameters_true",
    "ddp bf16 hook": lambda: DDPStrategy(ddp_comm_hook=_bf16_hook()),
    "fsdp": lambda: "fsdp",
    "fsdp one group": lambda: FSDPStrategy(policy=lambda module: False),
    "fsdp grad op": lambda: FSDPStrategy(sharding_strategy="SHARD_GRAD_OP"),
    "fsdp recompute": lambda: FSDPStrategy(activation_checkpointing=True),
    "fsdp offload": lambda: FSDPStrategy(cpu_offload=True),
    "hybrid": lambda: FSDPStrategy(sharding_strategy="HYBRID_SHARD", device_mesh=(2, 2)),
    "tensor": lambda: ModelParallelStrategy(tensor_parallel_size=2, tensor_parallel_plan=PLAN),
}


def _bf16_hook() -> Any:
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

    return bf16_compress_hook


def _batch() -> Any:
    return torch.zeros(6, 7), torch.zeros(6, dtype=torch.long)


def _optimizers(module: nn.Module) -> list[torch.optim.Optimizer]:
    return [torch.optim.AdamW(module.parameters(), lr=1e-3)]


def _really_run(layout: str, ranks: int, precision: str, file: str) -> None:
    fabric = Fabric(accelerator="cpu", devices=ranks, strategy=LAYOUTS[layout](), precision=precision)  # type: ignore[arg-type]
    fabric.launch()
    torch.manual_seed(0)
    with Recorder(fake=False) as recorder:
        step = Step(fabric.strategy.precision.convert_module(Net()), _optimizers, fabric.strategy)
        batch = _batch()
        for _ in range(3):
            recorder.label(step.parameters, "parameters")
            recorder.label(step.buffers, "buffers")
            recorder.label(batch, "inputs")
            recorder.restart("forward")
            sizes = step.run(batch, recorder)
    found = {
        "parameters": _bytes(step.parameters),
        "optimizer_state": _bytes(step.optimizer_state),
        "gradients": sizes["gradients"],
        "activations": recorder.most("activations", ("forward", "backward")),
        "peak": recorder.peak().total,
        "traffic": {kind: each.payload for kind, each in _traffic(recorder.calls, ranks).items()},
    }
    if fabric.is_global_zero:
        Path(file).write_text(json.dumps(found))


def _bytes(tensors: list[Any]) -> int:
    storages = {}
    for tensor in tensors:
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        storages[local.untyped_storage()._cdata] = local.untyped_storage().nbytes()
    return sum(storages.values())


ROWS = [
    ("single_device", 1, "32-true"),
    ("ddp", 2, "32-true"),
    ("fsdp", 2, "32-true"),
]
MORE = [
    ("fsdp", 1, "32-true"),
    ("ddp", 4, "bf16-mixed"),
    ("ddp views", 2, "32-true"),
    ("ddp small buckets", 2, "32-true"),
    ("ddp unused", 2, "32-true"),
    ("ddp bf16 hook", 2, "32-true"),
    ("fsdp", 4, "32-true"),
    ("fsdp", 2, "bf16-true"),
    ("fsdp", 4, "bf16-mixed"),
    ("fsdp one group", 4, "32-true"),
    ("fsdp grad op", 4, "32-true"),
    ("fsdp recompute", 2, "32-true"),
    ("fsdp offload", 2, "32-true"),
    ("hybrid", 4, "32-true"),
    ("tensor", 2, "32-true"),
    ("tensor", 4, "32-true"),
]


@pytest.mark.parametrize(
    ("layout", "ranks", "precision"), [*ROWS, *(pytest.param(*row, marks=pytest.mark.faults) for row in MORE)]
)
def test_an_estimate_is_what_a_run_takes(layout: str, ranks: int, precision: str, tmp_path: Path) -> None:
    run_in_ranks(_really_run, layout, ranks, precision, str(tmp_path / "found"), devices=ranks)
    real = json.loads((tmp_path / "found").read_text())
    planned = estimate(
        Net(), torch.optim.AdamW, LAYOUTS[layout](), ranks, precision, _batch(), num_nodes=1, foreach=False
    )
    memory = planned.memory
    for part in ("parameters", "gradients", "optimizer_state"):
        assert getattr(memory, part) == real[part], part
    assert planned.traffic.keys() == real["traffic"].keys()
    for kind, payload in real["traffic"].items():
        assert planned.traffic[kind].payload == pytest.approx(payload, rel=0.05), kind
    assert memory.activations == pytest.approx(real["activations"], rel=0.1)


def _profiled(layout: str, ranks: int, file: str) -> None:
    """Run three steps by hand, and write what torch's profiler saw of the third."""
    from torch.profiler import ProfilerActivity, profile

    fabric = Fabric(accelerator="cpu", devices=ranks, strategy=LAYOUTS[layout]())
    fabric.launch()
    torch.manual_seed(0)
    net = Net()
    model: Any
    model, optimizer = fabric.setup(net, torch.optim.AdamW(net.parameters(), lr=1e-3))
    batch = _large_batch()

    def train() -> None:
        fabric.backward(model(*batch))
        optimizer.step()
        optimizer.zero_grad()

    train()
    train()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, profile_memory=True) as seen:
        train()
    if fabric.is_global_zero:
        seen.export_chrome_trace(f"{file}.trace")
        events = json.loads(Path(f"{file}.trace").read_text())["traceEvents"]
        memory = sorted((each["ts"], each["args"]) for each in events if each["name"] == "[memory]")
        most = max(values["Total Allocated"] for _, values in memory)
        first = memory[0][1]
        sent = _messages([(each.name, each.input_shapes) for each in seen.events()])
        grown = most - (first["Total Allocated"] - first["Bytes"])
        Path(file).write_text(json.dumps({"traffic": sent, "grown": grown}))


def _messages(events: list[tuple[str, Any]]) -> dict[str, int]:
    """The bytes of the collectives' messages, of numbers in single precision."""

    def sizes(name: str, argument: int) -> int:
        return sum(4 * prod(shapes[argument]) for each, shapes in events if each == name)

    gathered, scattered = sizes("c10d::_allgather_base_", 0), sizes("c10d::_reduce_scatter_base_", 1)
    reduced = sizes("gloo:all_reduce", 0) - scattered  # gloo scatters what it has reduced everywhere
    broadcast = sizes("gloo:broadcast", 0)
    found = {"all_reduce": reduced, "all_gather": gathered, "reduce_scatter": scattered, "broadcast": broadcast}
    return {kind: size for kind, size in found.items() if size}


def _large_batch() -> Any:
    return torch.zeros(4096, 7), torch.zeros(4096, dtype=torch.long)


@pytest.mark.faults
@pytest.mark.parametrize(("layout", "ranks"), [("ddp", 2), ("ddp", 4), ("fsdp", 2), ("fsdp", 4)])
def test_torchs_profiler_sees_what_was_estimated(layout: str, ranks: int, tmp_path: Path) -> None:
    """The memory that the allocator hands out, and the messages of the process group: no code of the estimate."""
    run_in_ranks(_profiled, layout, ranks, str(tmp_path / "found"), devices=ranks)
    real = json.loads((tmp_path / "found").read_text())
    planned = estimate(
        Net(), torch.optim.AdamW, LAYOUTS[layout](), ranks, None, _large_batch(), num_nodes=1, foreach=False
    )
    assert planned.traffic.keys() == real["traffic"].keys()
    for kind, payload in real["traffic"].items():
        assert planned.traffic[kind].payload == pytest.approx(payload, rel=0.05), kind
    assert planned.memory.activations == pytest.approx(real["grown"], rel=0.05)
