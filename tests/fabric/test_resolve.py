"""Tests of ``treadle_fabric.resolve``."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

from treadle_fabric.accelerators import ACCELERATOR_REGISTRY, CPUAccelerator, CUDAAccelerator
from treadle_fabric.checkpoint import TorchCheckpointIO
from treadle_fabric.environments import (
    KubeflowEnvironment,
    LightningEnvironment,
    MPIEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from treadle_fabric.errors import DeviceUnavailableError, MisconfigurationException
from treadle_fabric.precision import DoublePrecision, Precision
from treadle_fabric.resolve import Plan, available_devices, build, resolve
from treadle_fabric.strategies import (
    STRATEGY_REGISTRY,
    DDPStrategy,
    SingleDeviceStrategy,
    SingleDeviceXLAStrategy,
    XLAFSDPStrategy,
    XLAStrategy,
)

CPU = {"cuda": 0, "mps": 0, "cpu": 1}
GPUS = {"cuda": 4, "mps": 0, "cpu": 1}
TWO = {"cuda": 2, "mps": 0, "cpu": 1}
GPU = {"cuda": 1, "mps": 0, "cpu": 1}
MAC = {"cuda": 0, "mps": 1, "cpu": 1}
TPU = {"cuda": 0, "mps": 0, "tpu": 1, "cpu": 1}
TPUS = {"cuda": 0, "mps": 0, "tpu": 4, "cpu": 1}
PLAYED = {"cuda": 0, "mps": 0, "cpu": 1, "tpu": 2}  # by the host

TORCHRUN_2 = {
    "TORCHELASTIC_RUN_ID": "x",
    "WORLD_SIZE": "2",
    "LOCAL_WORLD_SIZE": "2",
    "RANK": "0",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "a",
    "MASTER_PORT": "1",
}
TORCHRUN_1 = {**TORCHRUN_2, "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
SLURM_2X4 = {
    "SLURM_NTASKS": "8",
    "SLURM_NTASKS_PER_NODE": "4",
    "SLURM_NNODES": "2",
    "SLURM_JOB_NAME": "x",
    "SLURM_JOB_ID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "0",
}
MPI_2 = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}
LAUNCHED_2 = {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2", "NODE_RANK": "0"}
TWO_NODES = {"MASTER_ADDR": "a", "MASTER_PORT": "1", "NODE_RANK": "0"}


def plan(available: dict[str, int] = CPU, environ: dict[str, str] | None = None, **arguments: Any) -> Plan:
    return resolve(**{"interactive": False, **arguments}, environ=environ or {}, available=available)


def summary(plan: Plan) -> tuple[Any, ...]:
    devices = ",".join(str(device) for device in plan.devices)
    return plan.accelerator.name(), devices, plan.strategy, plan.launcher


NOTEBOOK = {"interactive": True}


@pytest.mark.parametrize(
    ("available", "environ", "arguments", "expected"),
    [
        # auto picks the best there is, and all of it
        (CPU, {}, {}, ("cpu", "cpu", "single_device", "none")),
        (GPU, {}, {}, ("cuda", "cuda:0", "single_device", "none")),
        (GPUS, {}, {}, ("cuda", "cuda:0,cuda:1,cuda:2,cuda:3", "ddp", "subprocess")),
        (MAC, {}, {}, ("mps", "mps:0", "single_device", "none")),
        ({"cuda": 1, "mps": 1, "cpu": 1}, {}, {}, ("cuda", "cuda:0", "single_device", "none")),
        # accelerator names
        (GPUS, {}, {"accelerator": "cpu"}, ("cpu", "cpu", "single_device", "none")),
        (GPU, {}, {"accelerator": "gpu"}, ("cuda", "cuda:0", "single_device", "none")),
        (MAC, {}, {"accelerator": "gpu"}, ("mps", "mps:0", "single_device", "none")),
        (MAC, {}, {"accelerator": "mps", "devices": [0]}, ("mps", "mps:0", "single_device", "none")),
        (MAC, {}, {"accelerator": "cpu", "devices": 2}, ("cpu", "cpu,cpu", "ddp", "subprocess")),
        (GPU, {}, {"accelerator": "cuda"}, ("cuda", "cuda:0", "single_device", "none")),
        (GPUS, {}, {"accelerator": CUDAAccelerator(), "devices": 1}, ("cuda", "cuda:0", "single_device", "none")),
        # devices
        (GPUS, {}, {"devices": 1}, ("cuda", "cuda:0", "single_device", "none")),
        (GPUS, {}, {"devices": [3]}, ("cuda", "cuda:3", "single_device", "none")),
        (GPUS, {}, {"devices": "1,3"}, ("cuda", "cuda:1,cuda:3", "ddp", "subprocess")),
        (GPUS, {}, {"devices": -1}, ("cuda", "cuda:0,cuda:1,cuda:2,cuda:3", "ddp", "subprocess")),
        (GPUS, {}, {"devices": "2"}, ("cuda", "cuda:0,cuda:1", "ddp", "subprocess")),
        (CPU, {}, {"devices": 2}, ("cpu", "cpu,cpu", "ddp", "subprocess")),
        (CPU, {}, {"devices": -1}, ("cpu", "cpu", "single_device", "none")),
        # several machines
        (CPU, TWO_NODES, {"num_nodes": 2}, ("cpu", "cpu", "ddp", "subprocess")),
        (GPUS, TWO_NODES, {"num_nodes": 2, "devices": 2}, ("cuda", "cuda:0,cuda:1", "ddp", "subprocess")),
        # somebody else started the processes
        (CPU, TORCHRUN_2, {}, ("cpu", "cpu,cpu", "ddp", "external")),
        (GPUS, TORCHRUN_2, {}, ("cuda", "cuda:0,cuda:1", "ddp", "external")),
        (GPUS, TORCHRUN_2, {"devices": [2, 3]}, ("cuda", "cuda:2,cuda:3", "ddp", "external")),
        (GPUS, TORCHRUN_2, {"strategy": "ddp_spawn"}, ("cuda", "cuda:0,cuda:1", "ddp_spawn", "external")),
        (CPU, TORCHRUN_1, {}, ("cpu", "cpu", "single_device", "none")),
        (CPU, TORCHRUN_1, {"strategy": "ddp"}, ("cpu", "cpu", "ddp", "external")),
        (CPU, TORCHRUN_2, {"strategy": "single_device"}, ("cpu", "cpu", "single_device", "none")),
        (GPUS, SLURM_2X4, {"num_nodes": 2}, ("cuda", "cuda:0,cuda:1,cuda:2,cuda:3", "ddp", "external")),
        (CPU, SLURM_2X4, {"num_nodes": 2}, ("cpu", "cpu,cpu,cpu,cpu", "ddp", "external")),
        (CPU, MPI_2, {}, ("cpu", "cpu,cpu", "ddp", "external")),
        (CPU, LAUNCHED_2, {"devices": 2}, ("cpu", "cpu,cpu", "ddp", "external")),
        (CPU, LAUNCHED_2, {}, ("cpu", "cpu", "single_device", "none")),
        (CPU, SLURM_2X4, {"plugins": LightningEnvironment()}, ("cpu", "cpu", "single_device", "none")),
        # processes that each see one GPU
        (GPU, TORCHRUN_2, {}, ("cuda", "cuda:0,cuda:0", "ddp", "external")),
        (GPU, TORCHRUN_2, {"devices": 1}, ("cuda", "cuda:0,cuda:0", "ddp", "external")),
        (GPU, TORCHRUN_2, {"devices": "2"}, ("cuda", "cuda:0,cuda:0", "ddp", "external")),
        (GPU, TORCHRUN_2, {"devices": -1, "accelerator": "gpu"}, ("cuda", "cuda:0,cuda:0", "ddp", "external")),
        (GPU, TORCHRUN_2, {"devices": 1, "strategy": "single_device"}, ("cuda", "cuda:0", "single_device", "none")),
        (GPU, MPI_2, {"strategy": "ddp_spawn"}, ("cuda", "cuda:0,cuda:0", "ddp_spawn", "external")),
        (GPU, SLURM_2X4, {"num_nodes": 2}, ("cuda", "cuda:0,cuda:0,cuda:0,cuda:0", "ddp", "external")),
        (GPU, SLURM_2X4, {"num_nodes": 2, "devices": 4}, ("cuda", "cuda:0,cuda:0,cuda:0,cuda:0", "ddp", "external")),
        (GPU, SLURM_2X4, {"num_nodes": 2, "devices": 1}, ("cuda", "cuda:0,cuda:0,cuda:0,cuda:0", "ddp", "external")),
        (GPU, LAUNCHED_2, {"devices": 2}, ("cuda", "cuda:0,cuda:0", "ddp", "external")),
        (GPU, TORCHRUN_1, {"devices": 1}, ("cuda", "cuda:0", "single_device", "none")),
        (GPU, TORCHRUN_2, {"accelerator": "cpu"}, ("cpu", "cpu,cpu", "ddp", "external")),
        # notebooks
        (CPU, {}, NOTEBOOK, ("cpu", "cpu", "single_device", "none")),
        (GPUS, {}, NOTEBOOK, ("cuda", "cuda:0", "single_device", "none")),
        (GPUS, {}, {**NOTEBOOK, "devices": 2}, ("cuda", "cuda:0,cuda:1", "ddp_fork", "fork")),
        (GPU, {}, {**NOTEBOOK, "strategy": "ddp"}, ("cuda", "cuda:0", "ddp", "subprocess")),
    ],
)
def test_table(available: dict[str, int], environ: Any, arguments: dict[str, Any], expected: Any) -> None:
    result = plan(available, environ, **arguments)
    assert summary(result) == expected
    assert result.world_size == len(result.devices) * result.num_nodes


START = {"ddp": "subprocess", "ddp_spawn": "spawn", "ddp_fork": "fork", "ddp_notebook": "fork"}
DDP_NAMES = [
    (base + suffix, launcher)
    for base, launcher in START.items()
    for suffix in ("", "_find_unused_parameters_true", "_find_unused_parameters_false")
]


@pytest.mark.parametrize("environ", [{}, TORCHRUN_2, MPI_2, LAUNCHED_2], ids=["local", "torchrun", "mpi", "launched"])
@pytest.mark.parametrize(("available", "device"), [(CPU, "cpu"), (GPUS, "cuda"), (MAC, "mps")])
@pytest.mark.parametrize(("name", "launcher"), [*DDP_NAMES, ("single_device", "none")])
def test_every_strategy_on_every_accelerator(
    name: str, launcher: str, available: dict[str, int], device: str, environ: dict[str, str]
) -> None:
    single = name == "single_device"
    arguments: dict[str, Any] = {"strategy": name, "devices": 1 if single else 2, "accelerator": device}
    if device == "mps" and not single:
        with pytest.raises(DeviceUnavailableError, match="1 mps device"):
            plan(available, environ, **arguments)
        with pytest.raises(MisconfigurationException):
            plan(available, {}, strategy=name, devices=1)
        return
    result = plan(available, environ, **arguments)
    assert result.strategy == name
    assert result.launcher == ("external" if environ and not single else launcher)
    assert [d.type for d in result.devices] == [device] * arguments["devices"]
    expected = {"subprocess": "popen", "none": None}.get(launcher, launcher)
    assert result.start_method == expected


@pytest.mark.parametrize(
    ("available", "environ", "arguments", "says"),
    [
        # names, with near ones
        (CPU, {}, {"accelerator": "cude"}, "Did you mean 'cuda'"),
        (CPU, {}, {"accelerator": "abacus"}, "There is: auto, cpu, cuda, gpu, mps"),
        (CPU, {}, {"strategy": "dpd"}, "Did you mean 'ddp'"),
        (CPU, {}, {"strategy": "ddp_find_unused_parameter_true"}, "ddp_find_unused_parameters_true"),
        (CPU, {}, {"precision": "bf16-mixd"}, "Did you mean 'bf16-mixed'"),
        (CPU, {}, {"accelerator": None}, "neither a name nor"),
        (CPU, {}, {"strategy": 3}, "neither a name nor"),
        # hardware that is not there
        (CPU, {}, {"accelerator": "cuda"}, "no cuda device. There is: cpu"),
        (CPU, {}, {"accelerator": "gpu"}, "There is: cpu"),
        (GPUS, {}, {"accelerator": "mps"}, "There is: cuda, cpu"),
        (GPUS, {}, {"devices": 5}, r"has 4 cuda devices \(index 0 to 3\)"),
        (GPU, {}, {"devices": [1]}, r"has 1 cuda device \(index 0\)"),
        (MAC, {}, {"devices": 2}, "1 mps device"),
        (CPU, {}, {"devices": 0}, "number from 1"),
        (CPU, {}, {"devices": [0, 1]}, "Use devices=2"),
        (CPU, {}, {"devices": None}, "number from 1"),
        (GPUS, {}, {"devices": []}, "list of different"),
        (CPU, {}, {"num_nodes": 0}, "num_nodes=.* must be an integer of at least 1"),
        (CPU, {}, {"num_nodes": "2"}, "num_nodes=.* must be an integer of at least 1"),
        # combinations
        (MAC, {}, {"strategy": "ddp"}, "accelerator='mps'"),
        (MAC, {}, {"precision": 64}, "64-bit"),
        (CPU, {}, {"precision": "fp8"}, "precision='fp8-mixed' .* the run is on 'cpu'"),
        (MAC, {}, {"precision": "transformer-engine"}, "float8 numbers.* the run is on 'mps'"),
        (GPU, {}, {"precision": "nf4"}, r"plugins=BitsandbytesPrecision\('nf4'\)"),
        (CPU, {}, {"strategy": "single_device", "devices": 2}, "uses one device"),
        (CPU, TWO_NODES, {"strategy": "single_device", "num_nodes": 2}, "uses one device"),
        (CPU, {}, {"strategy": SingleDeviceStrategy(), "devices": 2}, "SingleDeviceStrategy.*uses one device"),
        (CPU, TWO_NODES, {"strategy": "ddp_spawn", "num_nodes": 2}, "one machine only"),
        (CPU, {}, {"num_nodes": 2}, "MASTER_ADDR, MASTER_PORT, NODE_RANK not set"),
        (CPU, {}, {**NOTEBOOK, "strategy": "ddp", "devices": 2}, "ddp_notebook"),
        (CPU, {}, {**NOTEBOOK, "strategy": "ddp_spawn", "devices": 2}, "ddp_notebook"),
        (CPU, TORCHRUN_2, {"devices": 1}, "torchrun started 2"),
        (CPU, TORCHRUN_2, {"num_nodes": 2}, "torchrun started 2"),
        (GPU, TORCHRUN_2, {"devices": 4}, "2 processes .* each of them sees one cuda device.* devices=2"),
        (GPU, TORCHRUN_2, {"devices": [1]}, "number 0"),
        (GPU, TORCHRUN_2, {"devices": [0]}, "number 0"),
        (GPU, LAUNCHED_2, {"devices": [0, 1]}, r"has 1 cuda device"),
        (TWO, SLURM_2X4, {"num_nodes": 2}, "has 2 cuda devices"),
        (CPU, SLURM_2X4, {}, "the SLURM job has 2 nodes"),
        (CPU, SLURM_2X4, {"devices": 2, "num_nodes": 2}, "4 tasks on each node"),
        (CPU, LAUNCHED_2, {"devices": 3}, "runs in 2 processes"),
        # plugins
        (CPU, {}, {"plugins": "16-mixed"}, "precision="),
        (CPU, {}, {"plugins": [object()]}, "takes a Precision"),
        (CPU, {}, {"plugins": [Precision(), DoublePrecision()]}, "Two objects for the precision"),
        (CPU, {}, {"plugins": [TorchCheckpointIO(), TorchCheckpointIO()]}, "Two objects for the checkpoint IO"),
        (CPU, {}, {"plugins": [LightningEnvironment(), KubeflowEnvironment()]}, "cluster environment"),
        (CPU, {}, {"plugins": DoublePrecision(), "precision": "32-true"}, "DoublePrecision.* as well"),
        (CPU, {}, {"strategy": DDPStrategy(precision=Precision()), "plugins": DoublePrecision()}, "Two objects"),
        (
            CPU,
            {},
            {"strategy": DDPStrategy(cluster_environment=MPIEnvironment()), "plugins": LightningEnvironment()},
            "Two objects for the cluster environment",
        ),
        (GPU, {}, {"strategy": DDPStrategy(accelerator=CPUAccelerator()), "accelerator": "cuda"}, "CPUAccelerator"),
    ],
)
def test_refused(available: dict[str, int], environ: Any, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(MisconfigurationException, match=f"(?s){says}"):
        plan(available, environ, **arguments)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (None, "32-true"),
        (32, "32-true"),
        ("64", "64-true"),
        (16, "16-mixed"),
        ("bf16", "bf16-mixed"),
        ("16-true", "16-true"),
        ("bf16-true", "bf16-true"),
    ],
)
def test_precision(given: Any, name: str) -> None:
    result = plan(precision=given)
    assert result.precision == name
    assert build(result).precision.precision == name


def test_environment_and_plugins() -> None:
    assert isinstance(plan(environ=TORCHRUN_2).environment, TorchElasticEnvironment)
    assert isinstance(plan(environ=SLURM_2X4, num_nodes=2).environment, SLURMEnvironment)
    environment, precision, io = KubeflowEnvironment(), DoublePrecision(), TorchCheckpointIO()
    environment.environ = {"WORLD_SIZE": "3"}
    result = plan(plugins=[environment, precision, io], num_nodes=3)
    assert (result.environment, result.precision, result.checkpoint_io) == (environment, precision, io)
    assert summary(result) == ("cpu", "cpu", "ddp", "external")
    assert plan(precision=DoublePrecision(), plugins=io).checkpoint_io is io


def test_notebook_note() -> None:
    assert "devices=4, strategy='ddp_notebook'" in plan(GPUS, interactive=True).notes[0]
    assert plan(GPUS, interactive=True, devices=4).notes == ()


class TestStrategyObjects:
    def test_bring_their_parts(self) -> None:
        precision, io, environment = DoublePrecision(), TorchCheckpointIO(), LightningEnvironment()
        cpu = torch.device("cpu")
        strategy = DDPStrategy(
            accelerator=CPUAccelerator(),
            parallel_devices=[cpu, cpu, cpu],
            cluster_environment=environment,
            checkpoint_io=io,
            precision=precision,
            start_method="fork",
        )
        result = plan(GPUS, strategy=strategy)
        assert summary(result) == ("cpu", "cpu,cpu,cpu", strategy, "fork")
        assert (result.environment, result.precision, result.checkpoint_io) == (environment, precision, io)
        assert build(result) is strategy
        again = plan(GPUS, strategy=strategy)  # a bound strategy can be given again
        assert summary(again) == summary(result)

    def test_a_device_of_their_own(self) -> None:
        strategy = SingleDeviceStrategy(torch.device("cuda", 2))
        result = plan(GPUS, strategy=strategy)
        assert summary(result) == ("cuda", "cuda:2", strategy, "none")

    def test_fill_in_the_rest(self) -> None:
        strategy = build(plan(GPUS, strategy=DDPStrategy(), devices=[1, 2], precision="bf16-mixed"))
        assert isinstance(strategy.accelerator, CUDAAccelerator)
        assert strategy.root_device == torch.device("cuda", 1)
        assert strategy.world_size == 2
        assert strategy.precision.precision == "bf16-mixed"


def test_build() -> None:
    strategy = build(plan(devices=2, strategy="ddp_fork"))
    assert isinstance(strategy, DDPStrategy)
    assert (strategy.world_size, strategy.num_processes, strategy.root_device.type) == (2, 2, "cpu")
    assert type(strategy.launcher).__name__ == "SpawnLauncher"
    single = build(plan())
    assert isinstance(single, SingleDeviceStrategy)
    assert single.launcher is None


def test_this_machine() -> None:
    there = available_devices()
    assert there["cpu"] == 1
    assert there["cuda"] == torch.cuda.device_count()
    assert resolve().accelerator.name() == next(name for name, count in there.items() if count)


@pytest.fixture
def tpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with four TPUs, as far as the plan looks."""
    Path(tmp_path, "torch_xla").mkdir()
    Path(tmp_path, "torch_xla", "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("treadle_fabric.accelerators.xla._count", lambda: 4)


@pytest.mark.usefixtures("tpus")
@pytest.mark.parametrize(
    ("available", "environ", "arguments", "expected"),
    [
        (TPU, {}, {}, ("tpu", "xla:0", "single_xla", "none")),
        (TPUS, {}, {}, ("tpu", "xla:0,xla:0,xla:0,xla:0", "xla", "subprocess")),
        (TPUS, {}, {"devices": 2, "accelerator": "tpu"}, ("tpu", "xla:0,xla:0", "xla", "subprocess")),
        (TPUS, {}, {"devices": [2]}, ("tpu", "xla:2", "single_xla", "none")),
        (TPUS, {}, {"accelerator": "cpu"}, ("cpu", "cpu", "single_device", "none")),
        (TPUS, LAUNCHED_2, {"devices": 2}, ("tpu", "xla:0,xla:0", "xla", "external")),
        (PLAYED, {}, {}, ("cpu", "cpu", "single_device", "none")),
        (PLAYED, {}, {"accelerator": "tpu", "devices": 1}, ("tpu", "xla:0", "single_xla", "none")),
    ],
)
def test_tpus(available: dict[str, int], environ: Any, arguments: dict[str, Any], expected: Any) -> None:
    assert summary(plan(available, environ, **arguments)) == expected


@pytest.mark.usefixtures("tpus")
@pytest.mark.parametrize(
    ("available", "arguments", "says"),
    [
        (TPUS, {"devices": 5}, r"has 4 tpu devices \(index 0 to 3\)"),
        (TPUS, {"strategy": "ddp"}, "strategy='ddp' does not run on accelerator='tpu'.*'single_xla' or 'xla'"),
        (TPUS, {"strategy": "fsdp"}, "strategy='fsdp' does not run on accelerator='tpu'"),
        (TPUS, {"strategy": "single_device", "devices": 1}, "strategy='single_device' does not run"),
        (TPUS, {"strategy": "xla", "accelerator": "cpu"}, "strategy='xla' runs on accelerator='tpu' only"),
        (TPUS, {"strategy": "single_xla", "devices": 2}, "uses one device"),
        (TPUS, {"precision": "bf16-mixed"}, "precision='bf16-mixed' is not there for accelerator='tpu'.*'bf16-true'"),
        (TPUS, {"precision": 64}, "no 64-bit floating point"),
        (CPU, {"accelerator": "gpu"}, "this machine has none"),
    ],
)
def test_tpus_refused(available: dict[str, int], arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(MisconfigurationException, match=f"(?s){says}"):
        plan(available, {}, **arguments)


def test_names_of_xla_need_no_package() -> None:
    assert {"single_xla", "xla", "xla_fsdp"} <= {*STRATEGY_REGISTRY.available_strategies()}
    assert "tpu" in ACCELERATOR_REGISTRY
    for kind in (SingleDeviceXLAStrategy, XLAStrategy, XLAFSDPStrategy):
        assert "precision" in inspect.signature(kind).parameters
