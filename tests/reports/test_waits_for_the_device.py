"""The host waits for the device only where values are logged: in a run with everything on, step by step.

The device is not there, see :mod:`tests.device_waits`.

Tests of ``treadle.numbers.host_copy``, ``treadle.numbers.losses``, ``treadle.metrics.reduction``,
``treadle.metrics.slot``, ``treadle_fabric.batches``, ``treadle_fabric.strategies.native_step``,
``treadle_fabric.strategies.ddp``.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.device_waits import DEVICE, CountedAccelerator, CountedDevice, DeviceTensor, elsewhere
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import treadle as L
from treadle.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from treadle.metrics.reduction import Row, reduce_over_ranks
from treadle.metrics.slot import stack
from treadle.numbers import host_copy
from treadle.numbers.host_copy import HostCopy
from treadle.numbers.losses import WeightedLosses, _power_of_two
from treadle_fabric import DDPStrategy, Fabric, MisconfigurationException, MixedPrecision, move_data_to_device
from treadle_fabric.loggers import TensorBoardLogger
from treadle_fabric.strategies.data_parallel import ddp_engine

STEPS = 200
AUTOCAST = "ignore:.*autocasts nothing"  # torch's own needs the real type of the device, which is that of the CPU


class Model(L.LightningModule):
    """Logs its loss, whose weight is a number, a tensor on the device, or none."""

    def __init__(self, weight: str = "", on_epoch: bool = False, weights: list[float] | None = None) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        self.weight, self.on_epoch = weight, on_epoch
        self.weights = weights or [3.0]
        self.backwards = 0

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        x, y = batch
        loss = (self.net(x) - y).square().mean()
        self.log("loss", loss, prog_bar=True, on_step=True, on_epoch=self.on_epoch)
        if not self.weight:
            return loss
        number = self.weights[batch_idx % len(self.weights)]
        here = self.weight == "host" or (self.weight == "either" and batch_idx % 2)
        return {"loss": loss, "weight": number if here else torch.full((), number, device=x.device)}

    def on_after_backward(self) -> None:
        self.backwards += 1

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val", (self.net(batch[0]) - batch[1]).square().mean(), prog_bar=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-3)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def samples(count: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(count, 4, generator=generator), torch.randn(count, 1, generator=generator))
    return DataLoader(data, batch_size=4)


@pytest.mark.filterwarnings(AUTOCAST)
@pytest.mark.filterwarnings("ignore:.*such values are kept pickled")  # tensors of the device that is not there
@pytest.mark.parametrize(
    ("model", "more"),
    [
        ({}, {}),
        ({"on_epoch": True, "weight": "device"}, {"gradient_clip_val": 1.0}),
        ({"weight": "host"}, {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"}),
        ({"on_epoch": True, "weight": "device"}, {"gradient_clip_val": 1.0, "precision": "16-mixed"}),
    ],
)
def test_a_step_waits_only_where_values_are_logged(tmp_path: Path, model: Any, more: dict[str, Any]) -> None:
    scaled = more.pop("precision", None)
    plugins = MixedPrecision(scaled, "cpu", torch.amp.GradScaler("cpu", init_scale=64.0)) if scaled else None
    with CountedDevice() as device:
        module = Model(**model)
        trainer = L.Trainer(
            accelerator=CountedAccelerator(),
            devices=1,
            plugins=plugins,
            max_epochs=1,
            logger=TensorBoardLogger(tmp_path),
            callbacks=[ModelCheckpoint(monitor="val"), EarlyStopping("val"), LearningRateMonitor("step")],
            log_every_n_steps=50,
            num_sanity_val_steps=0,
            **more,
        )
        device.moment = lambda: (trainer.global_step, module.backwards)
        trainer.fit(module, samples(4 * STEPS), samples(8))
    assert trainer.global_step == STEPS
    assert isinstance(module.net[0].weight, DeviceTensor)
    waits = [w for w in device.waits if w.passes("loops/epoch.py") and not w.passes("loops/evaluate.py")]
    bar = [wait for wait in waits if wait.passes("progress_bar.py")]
    assert len(bar) < 20  # it reads by time, not by step
    torchs_own = [wait for wait in waits if wait.passes("amp/grad_scaler.py")]
    assert len(torchs_own) == (STEPS if scaled else 0)
    events = [wait for wait in waits if wait.kind == "event"]
    # The sum of the weights is awaited when the backward pass of the same step is queued already
    assert [w.moment for w in events] == [(s, s + 1) for s in range(STEPS)] * (model.get("weight") == "device")
    others = [wait for wait in waits if wait not in bar and wait not in torchs_own and wait not in events]
    assert [(wait.kind, wait.moment[0]) for wait in others] == [
        ("read", 50),
        ("read", 100),
        ("read", 150),
        ("read", 200),
    ]


def trained(weight: str, weights: list[float], folder: Path, **more: Any) -> tuple[list[Tensor], int]:
    torch.manual_seed(1)
    with CountedDevice():
        module = Model(weight, weights=weights)
        trainer = L.Trainer(
            accelerator=CountedAccelerator(),
            devices=1,
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            limit_val_batches=0,
            **more,
        )
        trainer.fit(module, samples(40))
    return [p.detach().cpu() for p in module.parameters()], trainer.global_step


@pytest.mark.filterwarnings("ignore:The weights of an optimizer step are 0")
@pytest.mark.parametrize("weights", [[3.0, 5.0, 2.0], [0.0, 4.0], [1e5, 0.0, 0.0, 7.0, 0.0]])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_weights_on_the_device_do_what_numbers_do(tmp_path: Path, weights: list[float], accumulate: int) -> None:
    """Steps of weights that are all 0 are left out: Adam's momentum would move the parameters."""
    here, steps = trained("host", weights, tmp_path, accumulate_grad_batches=accumulate)
    given = [weights[i % len(weights)] for i in range(10)]
    assert steps == sum(any(given[i : i + accumulate]) for i in range(0, 10, accumulate))
    for where in ("device", "either"):
        there, same = trained(where, weights, tmp_path, accumulate_grad_batches=accumulate)
        assert steps == same
        for a, b in zip(here, there, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6 if 0.0 in weights else 0)  # another reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("own", "waits"), [(3.0, 0), (0.0, 1)])
def test_ranks_add_weights_up_without_a_wait(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, own: float, waits: int
) -> None:
    """One collective of two numbers; a rank without a weight asks whether others have one."""
    sent: list[list[float]] = []
    factors: list[Tensor] = []
    multiply = torch._foreach_mul_

    def all_reduce(pair: Tensor, reduce_op: str) -> Tensor:
        assert pair.device == DEVICE
        sent.append(elsewhere(pair.numbers).numbers.tolist())  # type: ignore[attr-defined]
        return pair + torch.tensor(1.0)  # the other rank has one loss of weight 1

    strategy: Any = SimpleNamespace(world_size=2, root_device=DEVICE, all_reduce=all_reduce)
    monkeypatch.setattr(torch, "_foreach_mul_", lambda group, by: (factors.append(by), multiply(group, by))[1])
    with CountedDevice() as device:
        parameters = [nn.Parameter(elsewhere(torch.ones(2, dtype=dtype))) for _ in range(3)]
        for parameter in parameters:
            parameter.grad = elsewhere(torch.full((2,), 2.0, dtype=dtype))
        losses = WeightedLosses(strategy, reference=4.0)
        losses.scale(elsewhere(torch.tensor(2.0)), own, 1, True)
        assert losses.prepare([torch.optim.SGD(parameters, lr=1.0)], 1, 1)
        assert sum(device.counts().values()) == waits
    assert sent == [[own, 1.0]]
    gradients = [p.grad.cpu().tolist() for p in parameters if p.grad is not None]
    assert gradients == [[2.0 * 2 * 4 / (own + 1)] * 2] * 3
    assert len(factors) == 1  # all gradients in one operation
    if own:
        assert factors[0].dtype is dtype  # which is the fast one for a factor of their dtype
        assert factors[0].device == DEVICE


@pytest.mark.parametrize("wrong", [-1.0, math.nan, math.inf])
def test_a_weight_on_the_device_that_is_none_is_refused_before_its_step(tmp_path: Path, wrong: float) -> None:
    with pytest.raises(MisconfigurationException, match="finite number of at least 0"):
        trained("device", [2.0, wrong], tmp_path)


def test_the_reference_of_a_weight_on_the_device_is_that_of_a_number() -> None:
    weights = [2.0**k * m for k in range(-20, 40, 3) for m in (1.0, 1.1, 1.41, 1.42, 1.9, 1.999)]
    found = _power_of_two(torch.tensor(weights, dtype=torch.float64))
    assert found.tolist() == [2.0 ** round(math.log2(w)) for w in weights]
    assert _power_of_two(torch.tensor(0.0)) == 1


def test_a_copy_to_the_host_without_events_reads_what_was_sent() -> None:
    copy = HostCopy()
    for numbers in ([1.0, 2.0], [3.0], [4.0], [math.nan], [5.0, 6.0]):
        copy.send(torch.tensor(numbers))
        assert str(copy.read()) == str(numbers)


def test_a_copy_that_has_not_come_is_read_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device without events does not tell that the copy has come; a number that is not there yet is NaN."""
    monkeypatch.setattr(host_copy, "_event", lambda device: None)
    for arrived, expected in (([3.0, 4.0], [3.0, 4.0]), ([3.0, math.nan], [1.0, 2.0])):
        copy = HostCopy()
        copy.send(torch.tensor([1.0, 2.0]))
        assert copy._target is not None
        copy._target.copy_(torch.tensor(arrived))
        assert copy.read() == expected


class Graph:
    """A batch that moves by itself."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def to(self, device: Any, non_blocking: bool = False) -> Graph:
        return Graph(self.x.to(device, non_blocking=non_blocking))


class PassingOn(Graph):
    def to(self, *args: Any, **kwargs: Any) -> Graph:  # type: ignore[override]
        return Graph(self.x.to(*args, **kwargs))


class Plain(Graph):
    def to(self, device: Any) -> Graph:  # type: ignore[override]
        return Graph(self.x.to(device))


class Strict(Graph):
    def to(self, device: Any, **options: Any) -> Graph:  # type: ignore[override]
        assert not options
        return Graph(self.x.to(device))


@pytest.mark.parametrize(("kind", "waits"), [(Graph, 0), (PassingOn, 0), (Plain, 1), (Strict, 1)])
def test_objects_that_move_by_themselves_are_told_not_to_wait(kind: type[Graph], waits: int) -> None:
    with CountedDevice() as device:
        moved = move_data_to_device({"graph": kind(torch.ones(2)), "n": 1}, DEVICE)
    assert isinstance(moved["graph"].x, DeviceTensor)
    assert device.counts() == ({"send": waits} if waits else {})


def counted_fabric() -> Fabric:
    return Fabric(accelerator=CountedAccelerator(), devices=1)


def test_values_of_a_callable_reduction_are_gathered_in_one_transfer() -> None:
    with CountedDevice() as device:
        fabric = counted_fabric()
        values = [torch.full((), float(i), device=DEVICE) for i in range(20)]
        found = reduce_over_ranks(fabric, [Row("median", "gather", [*values, 7.5, torch.tensor(8.5)], 0.0)])
    assert found.values["median"] == [*map(float, range(20)), 7.5, 8.5]
    gathering = [wait for wait in device.waits if wait.passes("metrics/values.py")]
    assert len(gathering) == 1
    assert not [wait for wait in device.waits if wait.kind == "send"]


def test_numbers_join_tensors_of_the_device_without_a_copy_that_waits() -> None:
    with CountedDevice() as device:
        joined = stack([1, elsewhere(torch.tensor(2.0)), 3.5, torch.tensor(4.5), elsewhere(torch.tensor(5))])
        assert not device.waits
        assert joined.device == DEVICE
        assert joined.tolist() == [1, 2, 3.5, 4.5, 5]


@pytest.mark.parametrize(
    ("options", "saved", "expected"),
    [
        ({"capturable": True}, "host", DEVICE),
        ({"fused": True}, "host", DEVICE),
        ({"capturable": True}, "device", DEVICE),
        ({}, "host", torch.device("cpu")),
        ({}, "device", torch.device("cpu")),  # the host would wait for it at each step
    ],
)
def test_a_step_counter_is_where_its_optimizer_reads_it(options: Any, saved: str, expected: torch.device) -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([parameter])
    parameter.grad = torch.ones(3)
    optimizer.step()
    with CountedDevice():
        there = nn.Parameter(elsewhere(parameter))
        state = optimizer.state.pop(parameter)
        if saved == "device":
            state["step"] = elsewhere(state["step"])
        optimizer.param_groups[0].update(options, params=[there])
        optimizer.state[there] = state
        counted_fabric().strategy.setup_optimizer(optimizer)
    assert {name: value.device for name, value in optimizer.state[there].items()} == {
        "step": expected,
        "exp_avg": DEVICE,
        "exp_avg_sq": DEVICE,
    }


def test_ddp_leaves_inputs_on_a_gpu_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """With device ids, DDP makes the containers of inputs anew, and not on the CPU."""
    seen: dict[str, Any] = {}

    def wrap(module: nn.Module, **arguments: Any) -> nn.Module:
        seen.update(arguments)
        module.static_graph = False
        return module

    monkeypatch.setattr(ddp_engine, "DistributedDataParallel", wrap)
    monkeypatch.setattr(DDPStrategy, "_check_later", lambda *_: None)
    monkeypatch.setattr(DDPStrategy, "root_device", torch.device("cuda", 1))
    DDPStrategy(parallel_devices=[torch.device("cuda", 1)], find_unused_parameters=True).setup_module(nn.Linear(2, 2))
    assert seen == {"find_unused_parameters": True}


@pytest.mark.filterwarnings(AUTOCAST)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_fabric_loop_does_not_wait(precision: Any) -> None:
    with CountedDevice() as device:
        plugins = MixedPrecision("bf16-mixed", "cpu") if precision == "bf16-mixed" else None
        fabric = Fabric(accelerator=CountedAccelerator(), devices=1, plugins=plugins)
        module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))
        module, optimizer = fabric.setup(module, torch.optim.Adam(fabric.to_device(module).parameters()))
        loader = fabric.setup_dataloaders(samples(80))
        device.waits.clear()
        for x, y in loader:
            assert isinstance(x, DeviceTensor)
            optimizer.zero_grad()
            with fabric.autocast():
                loss = (module(x) - y).square().mean()
            fabric.backward(loss)
            fabric.clip_gradients(module, optimizer, max_norm=1.0, error_if_nonfinite=False)
            optimizer.step()
        assert device.counts() == {}
        assert loss.item() > 0
        assert device.counts() == {"read": 1}  # the counter counts
