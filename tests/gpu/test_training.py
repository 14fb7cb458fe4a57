"""Training on one CUDA device gives what training on the CPU in float32 gives, within the precision's error.

``TREADLE_GPU_TESTS_ON=cpu`` runs the same on the CPU, where torch has it there: float8 is then emulated, and compiled
models run uncompiled.

Tests of ``treadle_fabric.precision``, ``treadle_fabric.checkpoint``, ``treadle_fabric.strategies``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.equality.model import (
    BATCH,
    Block,
    Model,
    Tokens,
    fabric_loop,
    optimizer_state,
    parameter_groups,
    trainer_fit,
)
from torch import Tensor
from torch.utils.data import DataLoader

from treadle_fabric import AsyncCheckpointIO, Fabric, TorchCheckpointIO
from treadle_fabric.plugins import MixedPrecision
from treadle_fabric.strategies import FSDPStrategy

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
ON = "cpu" if os.environ.get("TREADLE_GPU_TESTS_ON") == "cpu" else "cuda"
DEVICE = torch.device("cpu" if ON == "cpu" else "cuda:0")

# How far losses may be from those in float32, of the largest. AdamW makes a whole step of the rounding of a gradient.
TOLERANCES = {"32-true": 1e-4, "16-mixed": 1e-2, "bf16-mixed": 5e-2, "bf16-true": 5e-2, "fp8-mixed": 0.1}
PROGRAMS = {"fabric": fabric_loop, "trainer": trainer_fit}
needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")


@cache
def on_the_cpu() -> dict[str, Any]:
    """The losses and weights of the hand-written loop, in float32."""
    return fabric_loop("auto", 1)


@pytest.fixture
def one_rank() -> Iterator[None]:
    """Ends the process group of this process, which a strategy for several made."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def compare(found: dict[str, Any], tolerance: float) -> None:
    expected = on_the_cpu()["losses"]
    assert len(found["losses"]) == len(expected)
    assert found["losses"] == pytest.approx(expected, abs=tolerance * max(expected))
    assert len({*found["losses"]}) == len(expected)


def precision_of(name: str) -> Any:
    """The precision; a scale with which no gradient overflows, so that no step is left out."""
    if name != "16-mixed":
        return name
    return MixedPrecision("16-mixed", DEVICE.type, scaler=torch.amp.GradScaler(DEVICE.type, init_scale=256.0))


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("precision", [p for p in TOLERANCES if not p.startswith("fp8")])
def test_precisions(precision: str, program: str) -> None:
    found = PROGRAMS[program]("auto", 1, precision_of(precision), accelerator=ON)  # type: ignore[operator]
    compare(found, TOLERANCES[precision])
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert found["weights"]["blocks.0.up.weight"].dtype == dtype
    assert found["weights"]["blocks.0.up.weight"].device == DEVICE


@needs_torchao
@pytest.mark.parametrize("program", PROGRAMS)
def test_float8(program: str) -> None:
    if ON == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("float8 needs compute capability 8.9")
    found = PROGRAMS[program]("auto", 1, "fp8-mixed", accelerator=ON)  # type: ignore[operator]
    compare(found, TOLERANCES["fp8-mixed"])
    assert found["losses"] != fabric_loop("auto", 1, "bf16-mixed", accelerator=ON)["losses"], "no layer was converted"


@pytest.mark.parametrize(
    "options", [{"fused": True}, {"foreach": True}, {"capturable": True}], ids=lambda o: next(iter(o))
)
@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_optimizers(precision: str, options: dict[str, bool]) -> None:
    if ON == "cpu" and "capturable" in options:
        pytest.skip("capturable optimizers are for accelerators")
    found = fabric_loop("auto", 1, precision_of(precision), accelerator=ON, **options)
    compare(found, TOLERANCES[precision])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_compiled(precision: str) -> None:
    compiled = partial(torch.compile, backend="inductor" if ON == "cuda" else "eager")
    found = fabric_loop("auto", 1, precision, accelerator=ON, compiled=compiled)
    compare(found, TOLERANCES[precision])


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_fsdp_on_one_device(precision: str, program: str, one_rank: None) -> None:
    strategy = FSDPStrategy(policy={Block})
    found = PROGRAMS[program](strategy, 1, precision_of(precision), accelerator=ON)  # type: ignore[operator]
    compare(found, 2 * TOLERANCES[precision])
    assert ON == "cpu" or "nccl" in torch.distributed.get_backend()


def state(accelerator: str, strategy: Any = "auto", path: Path | None = None, steps: int = 2) -> Any:
    """Train some steps, from a checkpoint if one is given; returns Fabric, what is saved, and tensors on the CPU."""
    fabric = Fabric(accelerator=accelerator, devices=1, strategy=strategy)
    fabric.launch()
    torch.manual_seed(0)
    model: Any = Model()
    optimizer: Any = torch.optim.AdamW(parameter_groups(model), lr=1e-2)
    model, optimizer = fabric.setup(model, optimizer)
    model.mark_forward_method("loss_of")
    content = {"model": model, "optimizer": optimizer}
    if path is not None:
        fabric.load(path, content)
    batches = [*fabric.setup_dataloaders(DataLoader(Tokens(), batch_size=BATCH))][:steps]
    for batch in batches:
        fabric.backward(model.loss_of(batch))
        optimizer.step()
        optimizer.zero_grad()
    return fabric, content, tensors(content)


def tensors(content: dict[str, Any]) -> dict[str, Tensor]:
    model, optimizer = content["model"], content["optimizer"]
    found = {**model.state_dict(), **optimizer_state(model, optimizer)}
    return {name: (t.full_tensor() if hasattr(t, "full_tensor") else t).cpu() for name, t in found.items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("strategy", ["auto", "fsdp"])
def test_checkpoints_go_to_the_cpu_and_back(strategy: str, tmp_path: Path, one_rank: None) -> None:
    fabric, content, saved = state(ON, strategy)
    fabric.save(tmp_path / "there", content)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    fabric, content, found = state("cpu", path=tmp_path / "there", steps=0)
    assert same(found, saved) and all(p.device.type == "cpu" for p in content["model"].parameters())
    fabric.save(tmp_path / "back", content)
    _, content, found = state(ON, strategy, tmp_path / "back", steps=0)
    assert same(found, saved) and all(p.device.type == DEVICE.type for p in content["model"].parameters())


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    """What is written is copied, through pinned memory on a GPU, before the next step changes it."""
    io = AsyncCheckpointIO()
    weights = {f"w{i}": torch.full((1 << 18,), float(i), device=DEVICE) for i in range(4)}
    for turn in range(3):
        io.save_checkpoint(weights, tmp_path / f"{turn}.ckpt")
        for weight in weights.values():
            weight += 1
    io.wait()
    for turn in range(3):
        found = TorchCheckpointIO().load_checkpoint(tmp_path / f"{turn}.ckpt")
        assert all(bool((found[f"w{i}"] == i + turn).all()) for i in range(4)), turn
    io.teardown()


def test_batches_come_through_pinned_memory() -> None:
    pinned = {"pin_memory": ON == "cuda"}
    loader = Fabric(accelerator=ON, devices=1).setup_dataloaders(DataLoader(Tokens(), batch_size=BATCH, **pinned))
    plain = list(DataLoader(Tokens(), batch_size=BATCH))
    moved = [*loader]
    assert all(part.device == DEVICE for batch in moved for part in batch)
    assert all(torch.equal(a.cpu(), b) for one, other in zip(moved, plain, strict=True) for a, b in zip(one, other))
