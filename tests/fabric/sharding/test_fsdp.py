"""What the layers of a model may be and do under FSDP, and where they come from: as with one process.

Tests of ``treadle_fabric.strategies.sharding.shard``, ``treadle_fabric.strategies.fsdp``,
``treadle_fabric.strategies.sharding.replicated``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint
import torch.distributed.tensor
from tests.processes import run_in_ranks
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

import treadle as L
from treadle_fabric import Fabric, MisconfigurationException
from treadle_fabric.strategies import FSDPStrategy
from treadle_fabric.strategies.sharding.replicated import ReplicatedGradients


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return x


class Twice(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in (*self.blocks, *self.blocks):
            x = block(x)
        return x


class Skipping(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[1](self.first(x))


class InPlaceBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        x.mul_(0.9)
        return super().forward(x).view(-1, 8)


class InPlace(Net):
    """Changes what goes into a block, and what comes out as a view, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(InPlaceBlock() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
            x += 1
        return x.view(-1, 2, 4)


class CompiledBlocks(Net):
    def __init__(self) -> None:
        super().__init__()
        self.blocks[0] = torch.compile(self.blocks[0], backend="eager")  # type: ignore[assignment]
        self.blocks[1].compile(backend="eager")


def compiled() -> nn.Module:
    return torch.compile(Net(), backend="eager")  # type: ignore[return-value]


class Kinds(nn.Module):
    """Parameters in another memory format, frozen ones of other dtypes, one without numbers, normalized weights."""

    def __init__(self) -> None:
        super().__init__()
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.filters = nn.Conv1d(1, 4, 3, padding=1)
        self.images = nn.Conv2d(4, 1, 1).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.counts = nn.Parameter(torch.arange(8), requires_grad=False)
        self.low = nn.Parameter(torch.ones(8, dtype=torch.bfloat16), requires_grad=False)
        self.none = nn.Parameter(torch.zeros(0, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.filters(self.normed(x)[:, None])[..., None]
        return self.images(x).flatten(1) * self.low + self.counts / 10 + self.none.sum()


def train(fabric: Fabric, make: Callable[[], nn.Module], meta: bool = False) -> list[float]:
    """Three steps, before the last of which a layer freezes and another one is trained; and an evaluation."""
    L.seed_everything(fabric.global_rank if make is Net else 0, verbose=False)  # all begin with what rank 0 has
    with fabric.init_module(empty_init=meta):
        model: Any = make()
    changing = [p for name, p in model.named_parameters() if name.startswith("first")]
    if changing:
        changing[0].requires_grad_(False)
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer = fabric.setup(model, optimizer)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for step in range(4):
        if step == 2 and changing:
            model.first.weight.requires_grad_(True)
            model.first.bias.requires_grad_(False)
        x = torch.randn(8, 8, generator=generator).chunk(fabric.world_size)[fabric.global_rank]
        with torch.set_grad_enabled(step < 3):
            output = model(x)
            output += 0.5
            loss = output.square().mean()
        if step < 3:
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(fabric.all_reduce(loss.detach()).item())
    return losses


def rows() -> list[tuple[str, Any, dict[str, Any]]]:
    named = [(kind.__name__, kind, {}) for kind in (Net, Twice, Skipping, InPlace, CompiledBlocks, Kinds)]
    return [
        *named,
        ("compiled", compiled, {"policy": {Block}}),
        ("nested", Net, {"policy": {Block, nn.Linear}}),
        ("recomputed", Net, {"policy": {nn.Linear}, "activation_checkpointing": {Block}}),
        ("recomputed in part", Twice, {"activation_checkpointing_saves": [torch.ops.aten.addmm.default]}),
    ]


def train_in_ranks(devices: int, table: list[tuple[str, Any, dict[str, Any]]]) -> None:
    for name, make, arguments in table:
        alone = train(Fabric(accelerator="cpu", devices=1), make)
        for meta in (False, True) if make in (Net, Twice) else (False,):
            fabric = Fabric(accelerator="cpu", devices=devices, strategy=FSDPStrategy(**arguments))
            fabric.launch()
            assert train(fabric, make, meta) == pytest.approx(alone, rel=1e-5), (name, meta)
    if devices == 2:
        what_differs()


def what_differs() -> None:
    fabric = Fabric(accelerator="cpu", devices=2, strategy="fsdp")
    fabric.launch()
    half = FSDPStrategy(mixed_precision=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    alone = train(Fabric(accelerator="cpu", devices=1), Net)
    mixed = Fabric(accelerator="cpu", devices=2, strategy=half)
    mixed.launch()
    losses = train(mixed, Net)
    assert losses == pytest.approx(alone, rel=2e-2)
    assert losses != pytest.approx(alone, rel=1e-5)

    model = Net()
    whole = model.first.weight
    keeping = Fabric(accelerator="cpu", devices=2, strategy=FSDPStrategy(ignored_parameters=[model.first]))
    keeping.launch()
    wrapped = keeping.setup(model)
    assert model.first.weight is whole
    assert wrapped(torch.ones(4, 8)).shape == (4, 8)

    class Direct(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.blocks[0].up.weight.sum() * self.first.weight.sum()

    direct = fabric.setup(Direct())
    with pytest.raises(MisconfigurationException, match=r"used elsewhere.*weight\.sum.*'blocks.0' \(Block\)"):
        direct(torch.ones(4, 8))

    class Twofold(nn.Linear):
        def __init__(self) -> None:
            super().__init__(8, 8)
            self.wide = nn.Parameter(torch.ones(8, dtype=torch.float64))

    with pytest.raises(MisconfigurationException, match=r"several dtypes.*'wide' \(torch.float64\)"):
        fabric.setup(Twofold())
    with pytest.raises(MisconfigurationException, match=r"no shape yet cannot be shared out: 'weight', 'bias'"):
        fabric.setup(nn.LazyLinear(3))
    for mesh in ((3,), (4,)):
        with pytest.raises(MisconfigurationException, match="there are 2 processes. Give device_mesh="):
            Fabric(accelerator="cpu", devices=2, strategy=FSDPStrategy(device_mesh=mesh))

    layer: Any = nn.Linear(8, 8)
    engine = fabric.strategy.setup_module(layer)
    engine(torch.ones(4, 8))  # no backward pass follows, so that the parameters stay gathered
    assert fabric.strategy.setup_module(layer) is engine

    layer = nn.Linear(8, 8)
    optimizer: Any = torch.optim.AdamW(layer.parameters())
    layer, optimizer = fabric.setup(layer, optimizer)
    fabric.backward(layer(torch.ones(4, 8)).sum())
    optimizer.step()
    state, row, weight = optimizer.optimizer.state_dict(), torch.arange(3.0), layer.module.weight
    for entry in state["state"].values():  # as a single process has it; and a factor of the matrix
        entry.update({name: v.full_tensor() for name, v in entry.items() if isinstance(v, DTensor)}, row=row)
    fabric.strategy.load_optimizer_state(optimizer.optimizer, state)
    loaded: Any = optimizer.optimizer.state[weight]
    assert loaded["exp_avg"].placements == weight.placements
    assert torch.equal(loaded["exp_avg"].full_tensor(), state["state"][0]["exp_avg"])
    assert torch.equal(loaded["row"].to_local(), row)

    class Scaled(nn.Linear):
        def __init__(self) -> None:
            super().__init__(8, 8)
            self.scale = nn.Parameter(torch.tensor(2.0), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.scale

    scaled: Any = fabric.setup(Scaled())
    scaled.scale.requires_grad_(True)
    fabric.backward(scaled(torch.full((4, 8), 1.0 + fabric.global_rank)).sum())
    assert fabric.all_reduce(scaled.scale.grad.clone()) == scaled.scale.grad != 0

    scalar = nn.Parameter(torch.tensor(1.0))
    scalar.grad = torch.tensor(float(fabric.global_rank))
    replicated = ReplicatedGradients([scalar], [dist.group.WORLD], lambda: True)
    with mock.patch.object(Tensor, "tolist") as tolist, mock.patch.object(Tensor, "item") as item:
        replicated.average()
    assert scalar.grad == 0.5
    assert not tolist.called and not item.called  # each waits for a device
    if fabric.global_rank == 0:
        scalar.grad = None
    replicated.average()
    assert scalar.grad == 0.25


def test_layers_of_all_kinds() -> None:
    run_in_ranks(train_in_ranks, 2, rows())


def test_parts_of_a_part_and_copies() -> None:
    hybrid = {"device_mesh": (2, 2), "sharding_strategy": "_HYBRID_SHARD_ZERO2"}
    table = [("four", Net, {"reshard_after_forward": 2}), ("copies", Net, hybrid)]
    run_in_ranks(train_in_ranks, 4, table, devices=4)


class Module(L.LightningModule):
    """Made where the strategy says, in ``configure_model``."""

    def __init__(self, meta: bool) -> None:
        super().__init__()
        self.meta = meta

    def configure_model(self) -> None:
        if not hasattr(self, "model"):
            with self.trainer.init_module(empty_init=self.meta):
                self.model = Net()
            assert self.model.first.weight.is_meta == self.meta

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.model(batch).square().mean()
        self.log("loss", loss, on_epoch=True, sync_dist=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def fit(folder: Path, devices: int, strategy: Any, meta: bool, **arguments: Any) -> tuple[float, Module]:
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    L.seed_everything(1, verbose=False)
    module = Module(meta)
    data = torch.randn(16, 8, generator=torch.Generator().manual_seed(2))
    trainer.fit(module, DataLoader(data, batch_size=4 // devices), **arguments)  # type: ignore[arg-type]
    if "ckpt_path" not in arguments and devices > 1:
        trainer.save_checkpoint(folder / "saved")
    return float(trainer.callback_metrics["loss_epoch"]), module


def fit_in_ranks(folder: Path) -> None:
    alone, _ = fit(folder, 1, "auto", False)
    for strategy in ("fsdp", "fsdp_cpu_offload", FSDPStrategy(policy={Block}, activation_checkpointing=Block)):
        found, module = fit(folder, 2, strategy, True)
        assert found == pytest.approx(alone, rel=1e-5)
        assert module.model.first.weight.shape == (8, 8)
        assert module.model.first.weight.to_local().shape == (4, 8)  # type: ignore[operator]
    for meta in (True, False):
        again = Module(meta)
        expected = {name: p.full_tensor() for name, p in module.state_dict().items()}
        fit_more(folder, again, meta)
        assert all(torch.equal(p.full_tensor(), expected[name]) for name, p in again.state_dict().items())


def fit_more(folder: Path, module: Module, meta: bool) -> None:
    """Load what was saved at the end: nothing is left to train."""
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="fsdp",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = torch.randn(16, 8, generator=torch.Generator().manual_seed(2))
    trainer.fit(module, DataLoader(data, batch_size=2), ckpt_path=str(folder / "saved"))  # type: ignore[arg-type]


def test_the_trainer_makes_the_model_in_parts(tmp_path: Path) -> None:
    run_in_ranks(fit_in_ranks, tmp_path)


def mebibytes(field: str) -> float:
    """Of this process: its memory now (VmRSS), or at most (VmHWM)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) / 1024


def measure_memory() -> None:
    fabric = Fabric(accelerator="cpu", devices=2, strategy="fsdp")
    fabric.launch()

    def make(layers: int, width: int) -> nn.Module:
        with fabric.init_module(empty_init=True):
            model = nn.Sequential(*(nn.Linear(1024, width, bias=False) for _ in range(layers)))
        return fabric.setup(model)

    make(2, 8)
    ctypes.CDLL(None).malloc_trim(0)  # what earlier tests freed would be used again, and not be seen as growth
    Path("/proc/self/clear_refs").write_text("5")  # forget the most that was used
    before = mebibytes("VmRSS")
    model = make(16, 2048)
    grown = mebibytes("VmHWM") - before
    held = sum(p.to_local().untyped_storage().nbytes() for p in model.parameters()) / 2**20  # type: ignore[operator]
    assert held == 64  # half of 16 layers of 8 MiB
    assert 0.9 * held < grown < held + 8 + 8, grown  # and a whole layer


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux says how much memory was used")
def test_a_rank_needs_memory_for_its_parts_and_a_layer() -> None:
    run_in_ranks(measure_memory)
