"""What is right for a CUDA device with an index is right for any device: without one, of another kind, or not here.

Tests of ``treadle_fabric.accelerators.accelerator``, ``treadle_fabric.precision.autocast``, ``treadle_fabric.batches``,
``treadle_fabric.strategies.parallel``, ``treadle_fabric.strategies.single_device``,
``treadle_fabric.strategies.states.whole_state``, ``treadle_fabric.checkpoint.values.standard_kinds``,
``treadle.module.loading``, ``treadle.metrics.values``, ``treadle.metrics.reduction``, ``treadle.run.signals``.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.device_waits import CountedAccelerator, CountedDevice
from tests.processes import run_in_ranks
from tests.trainer.models import Net, Samples, trainer
from torch import Tensor

from treadle.callbacks import EarlyStopping, ModelCheckpoint
from treadle.metrics.reduction import Row, reduce_over_ranks
from treadle.module.loading import _where_saved
from treadle.run.signals import SIGTERMException, _share_status
from treadle_fabric import DDPStrategy, Fabric, FSDPStrategy, MixedPrecision, SingleDeviceStrategy, move_data_to_device
from treadle_fabric.accelerators import count_devices
from treadle_fabric.checkpoint.values.kinds import make_kind
from treadle_fabric.data import PrivateStream
from treadle_fabric.strategies import parallel

# --- a device without an index ---


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("cuda", "cuda:0"),
        (torch.device("cuda"), "cuda:0"),
        ("cuda:3", "cuda:3"),
        ("mps", "mps:0"),
        ("xpu", "xpu:0"),
        ("cpu", "cpu"),
        ("meta", "meta"),
    ],
)
def test_a_device_without_an_index_is_the_one_that_tensors_name(given: Any, expected: str) -> None:
    assert SingleDeviceStrategy(given).root_device == torch.device(expected)
    assert DDPStrategy(parallel_devices=[torch.device(given)]).parallel_devices == [torch.device(expected)]


def test_a_device_without_an_index_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    assert SingleDeviceStrategy("cuda").root_device == torch.device("cuda", 2)


# --- devices of other kinds ---


class Moved(Tensor):
    """Notes how it is moved."""

    asked: tuple[Any, ...] = ()

    def to(self, device: Any, non_blocking: bool = False) -> Any:  # type: ignore[override]
        Moved.asked = (str(device), non_blocking)
        return self


class Graph:
    asked: tuple[Any, ...] = ()

    def to(self, device: Any, non_blocking: bool = False) -> Graph:
        Graph.asked = (str(device), non_blocking)
        return self


@pytest.mark.parametrize(("kind", "waits"), [("cuda", False), ("xpu", False), ("hpu", False), ("mps", True)])
def test_copies_to_any_accelerator_are_queued(kind: str, waits: bool) -> None:
    move_data_to_device([torch.ones(2).as_subclass(Moved), Graph()], torch.device(kind, 1))
    assert Moved.asked == Graph.asked == (f"{kind}:1", not waits)


@pytest.mark.parametrize(("kind", "backend"), [("cuda", "nccl"), ("xpu", "xccl"), ("cpu", "gloo"), ("mps", "gloo")])
def test_the_group_is_that_of_the_device(kind: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DDPStrategy, "root_device", torch.device(kind))
    assert DDPStrategy().process_group_backend == backend
    assert DDPStrategy(process_group_backend="mpi").process_group_backend == "mpi"


class Begun(Exception):
    """The group would have been made."""


@pytest.mark.parametrize(
    ("device", "here", "backend", "bound", "claimed"),
    [
        ("cuda:1", "cuda", None, "cuda:1", "cuda:1"),
        ("cuda:1", "cuda", "gloo", "cuda:1", None),
        ("xpu:1", "xpu", None, "xpu:1", None),
        ("cpu", "cuda", None, None, None),
        ("cpu", None, None, None, None),
    ],
)
def test_a_group_is_bound_to_an_accelerator(
    device: str, here: Any, backend: Any, bound: Any, claimed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL begins at once where the device is known, and needs a GPU of its own for each rank."""
    seen: dict[str, Any] = {}

    def init(backend: str, **given: Any) -> None:
        seen.update(backend=backend, **given)
        raise Begun

    def meet(environment: Any, rank: int, size: int, timeout: timedelta, exclusive: Any) -> None:
        seen["claimed"] = exclusive

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: here is not None)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(here))
    monkeypatch.setattr(parallel, "meet", meet)
    monkeypatch.setattr(dist, "init_process_group", init)
    environment: Any = SimpleNamespace(
        creates_processes_externally=True, started_nodes=lambda: None,
        global_rank=lambda: 0, local_rank=lambda: 0, node_rank=lambda: 0,
        set_global_rank=lambda rank: None, set_world_size=lambda size: None, main_address="localhost", main_port=1,
    )  # fmt: skip
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
    strategy = DDPStrategy(
        parallel_devices=[torch.device(device)], cluster_environment=environment, process_group_backend=backend
    )
    with pytest.raises(Begun):
        strategy.setup_environment()
    assert (seen["device_id"], seen["claimed"]) == (
        None if bound is None else torch.device(bound),
        None if claimed is None else torch.device(claimed),
    )


@pytest.mark.filterwarnings("ignore:.*GradScaler is enabled, but CUDA is not available")
@pytest.mark.parametrize("name", ["16-mixed", "bf16-mixed"])
def test_a_precision_object_is_for_the_devices_of_the_run(name: Any) -> None:
    """On a GPU, autocast for the CPU does nothing, without a word."""
    for _ in range(2):  # an object may serve several runs
        precision = MixedPrecision(name)
        Fabric(accelerator=CountedAccelerator(), devices=1, plugins=precision)
        assert precision.device == "cuda"
        assert precision.scaler is None or precision.scaler._device == "cuda"
        assert (precision.scaler is None) == (name == "bf16-mixed")
    given = torch.amp.GradScaler("cpu", init_scale=8.0)
    own = MixedPrecision("16-mixed", scaler=given)
    Fabric(accelerator=CountedAccelerator(), devices=1, plugins=own)
    assert own.scaler is given and own.device == "cuda"
    strategy = SingleDeviceStrategy("cuda:0", accelerator=CountedAccelerator(), precision=(own := MixedPrecision(name)))
    Fabric(accelerator="auto", strategy=strategy)
    assert own.device == "cuda"
    with pytest.warns(UserWarning, match="autocasts nothing on 'cuda'"):
        Fabric(accelerator=CountedAccelerator(), devices=1, plugins=MixedPrecision(name, "cpu"))


# --- devices that are not here ---


@pytest.mark.parametrize(
    ("location", "absent"),
    [("cpu", False), ("meta", False), ("cuda:0", False), ("cuda:1", False), ("cuda:2", True), ("xpu:0", True)],
)
def test_weights_of_a_device_that_is_not_here_come_to_the_cpu(
    location: str, absent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.xpu, "device_count", lambda: 0)
    assert (_where_saved("the storage", location) == "the storage") == absent
    assert count_devices("of a vendor") == 0


@pytest.mark.parametrize(("saved", "comes"), [("cuda:1", "cuda:1"), ("cuda:5", "cuda:0")])
def test_a_generator_comes_back_on_a_device_that_is_here(
    saved: str, comes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []

    def generator(device: Any) -> Any:
        made.append(str(device))
        return SimpleNamespace(set_state=made.append)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "Generator", generator)
    state = torch.arange(16, dtype=torch.uint8)
    make_kind("Generator", state, saved)
    assert made[0] == comes and torch.equal(made[1], state)


def test_a_generator_of_a_device_that_is_not_here_draws_the_same_in_each_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The state of a generator of CUDA, 16 bytes, is none of the CPU's."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    drawn = []
    for first in (1, 1, 2):
        with pytest.warns(UserWarning, match="generator of cuda:1 comes back as one of the CPU"):
            generator = make_kind("Generator", torch.arange(first, first + 16, dtype=torch.uint8), "cuda:1")
        drawn.append(torch.rand(3, generator=generator).tolist())
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_learning_rate_comes_back_to_its_device(tmp_path: Path) -> None:
    """Torch moves the states of parameters, and leaves what groups hold where the file was read."""
    fabric = Fabric(accelerator="cpu", devices=1)

    def optimizer(device: str) -> torch.optim.SGD:
        made = torch.optim.SGD([torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(1))], lr=0.1)
        made.param_groups[0].update(lr=torch.tensor(0.5, device=device), more=torch.ones(1) if device == "cpu" else 1)
        return made

    fabric.save(tmp_path / "a.ckpt", {"optimizer": optimizer("cpu")})
    fabric.load(tmp_path / "a.ckpt", {"optimizer": (found := optimizer("meta"))})
    assert found.param_groups[0]["lr"].device.type == "meta"
    assert found.param_groups[0]["more"].device.type == "cpu"
    FSDPStrategy().load_optimizer_state(found := optimizer("meta"), optimizer("cpu").state_dict())
    assert found.param_groups[0]["lr"].device.type == "meta"


# --- a default device ---


class Logs(Net):
    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.log("number", float(batch_idx), on_step=True, on_epoch=True)
        self.log("mixed", 1.0 if batch_idx % 2 else torch.ones((), device="cpu"), on_epoch=True)
        return super().training_step(batch, batch_idx)


def test_numbers_of_the_host_stay_there_whatever_the_default_device(tmp_path: Path) -> None:
    """As a user sets it: ``torch.set_default_device("cuda")``. What is on the meta device cannot be read."""
    module, batches = Logs(), [Samples(4)[i][None] for i in range(4)]
    stopping = EarlyStopping("number", patience=1, mode="max")
    with torch.device("meta"):
        saving = ModelCheckpoint(tmp_path, monitor="mixed", save_top_k=2)
        run = trainer(tmp_path, max_epochs=3, enable_checkpointing=True, callbacks=[saving, stopping])
        run.fit(module, batches, batches)
        metrics = {name: float(value) for name, value in run.callback_metrics.items()}
        assert len([*PrivateStream(iter([1, 2]))]) == 2
    assert metrics["number"] == 1.5 and metrics["mixed"] == 1.0
    assert stopping.stopped_epoch == 1 and float(stopping.best_score) == 1.5
    assert [float(score) for score in saving.best_k_models.values()] == [1.0, 1.0]


# --- waits at the end of an epoch, and of a run ---


@pytest.mark.parametrize("count", [1, 5])
def test_counts_of_ranks_are_read_together(count: int) -> None:
    with CountedDevice() as device:
        fabric = Fabric(accelerator=CountedAccelerator(), devices=1)
        found = reduce_over_ranks(fabric, [Row(f"metric {i}", "count", 0.0, 1.0) for i in range(count)])
        reading = [wait for wait in device.waits if wait.passes("metrics/reduction.py")]
    assert found.values == {f"metric {i}": 1 for i in range(count)}
    assert len(reading) == 2  # whether the names are alike, and the counts


def ends_with_a_status() -> None:
    dist.Backend.register_backend("gpusonly", lambda *given: dist.ProcessGroupGloo(*given), devices=["cuda"])
    fabric = Fabric(accelerator="cpu", devices=2, strategy=DDPStrategy(process_group_backend="gpusonly"))
    fabric.launch()
    error = SystemExit(7) if fabric.global_rank else SIGTERMException()
    _share_status(error, fabric.strategy)
    assert error.code == 7


def test_a_status_is_shared_on_the_hosts() -> None:
    """Devices may hang where a run ends; a group of NCCL would not come to an end before its timeout."""
    run_in_ranks(ends_with_a_status)
