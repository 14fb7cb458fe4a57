"""Tests of ``treadle_fabric.environments.environment``, ``treadle_fabric.environments.local``,
``treadle_fabric.environments.lsf``, ``treadle_fabric.environments.mpi``, ``treadle_fabric.environments.slurm``,
``treadle_fabric.environments.torchelastic``.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.processes import run_in_ranks

from treadle_fabric import Fabric
from treadle_fabric.environments import (
    ClusterEnvironment,
    KubeflowEnvironment,
    LightningEnvironment,
    LSFEnvironment,
    MPIEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
    detect_environment,
    find_free_port,
)
from treadle_fabric.errors import MisconfigurationException

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "x",
    "MASTER_ADDR": "first",
    "MASTER_PORT": "29400",
    "WORLD_SIZE": "8",
    "RANK": "5",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
}
SLURM = {
    "SLURM_NTASKS": "8",
    "SLURM_NTASKS_PER_NODE": "4",
    "SLURM_NNODES": "2",
    "SLURM_JOB_ID": "1234567",
    "SLURM_JOB_NAME": "train",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NODELIST": "alpha[03-04]",
}
LSF = {
    "LSB_JOBID": "4321",
    "LSB_DJOB_RANKFILE": "ranks",
    "JSM_NAMESPACE_SIZE": "8",
    "JSM_NAMESPACE_RANK": "5",
    "JSM_NAMESPACE_LOCAL_RANK": "1",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "3",
    "PMIX_NAMESPACE": "prterun-host-77@1",
}
MPI_OF_8 = {"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_RANK": "5"}  # as srun and jsrun set them, too
KUBEFLOW = {"MASTER_ADDR": "pod-0", "MASTER_PORT": "23456", "WORLD_SIZE": "4", "RANK": "2"}


def use(kind: type[ClusterEnvironment], environ: dict[str, str]) -> Any:
    environment = kind()
    environment.environ = environ
    return environment


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, LightningEnvironment),
        (TORCHRUN, TorchElasticEnvironment),
        (SLURM, SLURMEnvironment),
        (LSF, LSFEnvironment),
        (OPEN_MPI, MPIEnvironment),
        ({"PMI_SIZE": "2", "PMI_RANK": "0"}, MPIEnvironment),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, LightningEnvironment),
        (KUBEFLOW, LightningEnvironment),  # only on request
        ({"LOCAL_RANK": "1"}, LightningEnvironment),
        ({**SLURM, **TORCHRUN}, TorchElasticEnvironment),
        ({**SLURM, **LSF, **MPI_OF_8}, SLURMEnvironment),
        ({**LSF, **MPI_OF_8}, LSFEnvironment),
        ({**SLURM, **OPEN_MPI}, MPIEnvironment),  # mpirun used srun to start its helpers
        ({**LSF, **OPEN_MPI}, MPIEnvironment),
        ({**SLURM, "SLURM_JOB_NAME": "bash"}, SLURMEnvironment),  # srun in salloc's shell
        ({**SLURM, "SLURM_JOB_NAME": "interactive"}, SLURMEnvironment),
        ({k: v for k, v in LSF.items() if k != "JSM_NAMESPACE_SIZE"}, LightningEnvironment),
    ],
)
def test_detection(environ: dict[str, str], expected: type, monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(detect_environment(environ)) is expected
    for name in {**TORCHRUN, **SLURM, **LSF, **OPEN_MPI, **KUBEFLOW}:
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert type(detect_environment()) is expected
    assert expected is LightningEnvironment or expected.detect()


@pytest.mark.parametrize(
    ("kind", "environ", "address", "port", "world", "rank", "places"),
    [
        (TorchElasticEnvironment, TORCHRUN, "first", 29400, 8, 5, (1, 1, 4)),
        (SLURMEnvironment, SLURM, "alpha03", 15000 + 4567, 8, 5, (1, 1, 4)),
        (SLURMEnvironment, {**SLURM, "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "a", 1, 8, 5, (1, 1, 4)),
        (MPIEnvironment, OPEN_MPI, "127.0.0.1", None, 4, 3, (3, 0, 4)),
        (KubeflowEnvironment, KUBEFLOW, "pod-0", 23456, 4, 2, (0, 2, 1)),
    ],
)
def test_ranks_and_meeting_point(
    kind: Any, environ: dict[str, str], address: str, port: int | None, world: int, rank: int, places: Any
) -> None:
    environment = use(kind, environ)
    assert environment.creates_processes_externally
    assert environment.main_address == address
    assert port is None or environment.main_port == port
    assert 1 <= environment.main_port == use(kind, environ).main_port < 65536
    assert (environment.world_size(), environment.global_rank()) == (world, rank)
    assert (environment.local_rank(), environment.node_rank(), environment.processes_per_node()) == places
    environment.set_world_size(99)
    environment.set_global_rank(99)
    assert (environment.world_size(), environment.global_rank()) == (world, rank)  # the cluster knows


@pytest.mark.parametrize(
    ("kind", "environ", "devices", "nodes", "says"),
    [
        (TorchElasticEnvironment, TORCHRUN, 8, 2, "torchrun started 8"),
        (SLURMEnvironment, SLURM, 8, 1, "4 tasks on each node"),
        (SLURMEnvironment, SLURM, 4, 1, "has 2 nodes"),
        (SLURMEnvironment, {"SLURM_NTASKS": "1"}, 4, 1, "SLURM started 1"),
        (LSFEnvironment, LSF, 4, 1, "jsrun started 8"),
        (MPIEnvironment, OPEN_MPI, 2, 1, "MPI started 4"),
        (KubeflowEnvironment, KUBEFLOW, 4, 1, "devices=1"),
        (LightningEnvironment, {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}, 3, 1, "runs in 2 processes"),
        (LightningEnvironment, {"MASTER_ADDR": "a"}, 1, 2, "MASTER_PORT, NODE_RANK"),
    ],
)
def test_settings_that_do_not_fit(kind: Any, environ: dict[str, str], devices: int, nodes: int, says: str) -> None:
    with pytest.raises(MisconfigurationException, match=says):
        use(kind, environ).validate_settings(devices, nodes)


@pytest.mark.parametrize(
    ("kind", "environ", "devices", "nodes"),
    [
        (TorchElasticEnvironment, TORCHRUN, 4, 2),
        (SLURMEnvironment, SLURM, 4, 2),
        (LSFEnvironment, LSF, 4, 2),
        (MPIEnvironment, OPEN_MPI, 4, 1),
        (KubeflowEnvironment, KUBEFLOW, 1, 4),
        (LightningEnvironment, {}, 5, 1),
        (LightningEnvironment, {"MASTER_ADDR": "a", "MASTER_PORT": "1", "NODE_RANK": "1"}, 5, 2),
    ],
)
def test_settings_that_fit(kind: Any, environ: dict[str, str], devices: int, nodes: int) -> None:
    use(kind, environ).validate_settings(devices, nodes)  # passes if nothing is raised


@pytest.mark.parametrize(
    ("kind", "call"),
    [
        (TorchElasticEnvironment, "world_size"),
        (SLURMEnvironment, "global_rank"),
        (LSFEnvironment, "local_rank"),
        (KubeflowEnvironment, "world_size"),
    ],
)
def test_a_missing_variable_is_named(kind: Any, call: str) -> None:
    with pytest.raises(MisconfigurationException, match=r"variable [A-Z_]+ is not set"):
        getattr(use(kind, {}), call)()


@pytest.mark.parametrize(
    ("kind", "environ", "name", "call"),
    [
        (TorchElasticEnvironment, TORCHRUN, "WORLD_SIZE", "world_size"),
        (TorchElasticEnvironment, TORCHRUN, "LOCAL_WORLD_SIZE", "processes_per_node"),
        (SLURMEnvironment, SLURM, "SLURM_PROCID", "global_rank"),
        (LSFEnvironment, LSF, "JSM_NAMESPACE_LOCAL_RANK", "local_rank"),
        (MPIEnvironment, OPEN_MPI, "OMPI_COMM_WORLD_RANK", "global_rank"),
        (KubeflowEnvironment, KUBEFLOW, "RANK", "node_rank"),
        (LightningEnvironment, {}, "GROUP_RANK", "node_rank"),
    ],
)
def test_a_variable_that_is_no_number_is_named(kind: Any, environ: dict[str, str], name: str, call: str) -> None:
    with pytest.raises(MisconfigurationException, match=rf"{name}='two' is no whole number.* set it to one"):
        getattr(use(kind, {**environ, name: "two"}), call)()


def test_a_port_that_is_no_number_is_named() -> None:
    for kind in (LightningEnvironment, TorchElasticEnvironment, SLURMEnvironment, LSFEnvironment, MPIEnvironment):
        with pytest.raises(MisconfigurationException, match="MASTER_PORT='http' is no whole number"):
            _ = use(kind, {"MASTER_PORT": "http"}).main_port
    with pytest.raises(MisconfigurationException, match="PMI_SIZE='' is no whole number"):
        detect_environment({"PMI_SIZE": ""})


class TestLocal:
    def test_alone(self) -> None:
        environment = use(LightningEnvironment, {})
        assert not environment.creates_processes_externally
        assert environment.main_address == "127.0.0.1"
        assert (environment.world_size(), environment.global_rank()) == (1, 0)
        assert (environment.local_rank(), environment.node_rank()) == (0, 0)

    def test_the_port_is_free_and_stays(self) -> None:
        environment = use(LightningEnvironment, {})
        port = environment.main_port
        assert port == environment.main_port
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", port))
        assert find_free_port() > 0

    def test_started_by_hand(self) -> None:
        environ = {"MASTER_ADDR": "a", "MASTER_PORT": "7", "NODE_RANK": "1", "LOCAL_RANK": "2", "WORLD_SIZE": "8"}
        environment = use(LightningEnvironment, environ)
        assert environment.creates_processes_externally
        assert (environment.main_address, environment.main_port) == ("a", 7)
        assert (environment.world_size(), environment.local_rank(), environment.node_rank()) == (8, 2, 1)
        environment.set_global_rank(6)
        assert environment.global_rank() == 6
        environment.set_world_size(9)
        assert environment.world_size() == 9

    def test_launched_processes_compute_their_rank(self) -> None:
        environment = use(LightningEnvironment, {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "NODE_RANK": "2"})
        environment.set_global_rank(0)  # as pickled in another process
        assert environment.global_rank() == 9


class TestSLURM:
    @pytest.mark.parametrize(
        ("nodes", "root"),
        [
            ("alpha", "alpha"),
            ("alpha,beta", "alpha"),
            ("alpha beta", "alpha"),
            ("host[22-24,26]", "host22"),
            ("host[7,9]", "host7"),
            ("host05[1-3].site", "host051.site"),
            ("beta3,host[22-24]", "beta3"),
        ],
    )
    def test_root_node(self, nodes: str, root: str) -> None:
        assert SLURMEnvironment.resolve_root_node_address(nodes) == root

    def test_job(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("SLURM_JOB_ID", raising=False)
        assert SLURMEnvironment.job_id() is None
        monkeypatch.setenv("SLURM_JOB_ID", "77")
        monkeypatch.setenv("SLURM_JOB_NAME", "train")
        assert (SLURMEnvironment.job_id(), SLURMEnvironment.job_name()) == (77, "train")
        monkeypatch.setenv("SLURM_JOB_NAME", "bash")
        assert SLURMEnvironment.job_id() is None

    def test_requeue(self) -> None:
        assert SLURMEnvironment().auto_requeue
        assert SLURMEnvironment().requeue_signal is signal.SIGUSR1
        assert SLURMEnvironment(auto_requeue=False, requeue_signal=signal.SIGHUP).requeue_signal is signal.SIGHUP


class TestLSF:
    @pytest.mark.parametrize(
        ("ranks", "main", "node"),
        [
            ("launch\n{me}\n{me}\nother\nother\n", "{me}", 0),
            ("launch\nother\nother\n{me}\n{me}\n", "other", 1),
            ("{me}\n{me}\n", "{me}", 0),
            ("{me}\n", "{me}", 0),
        ],
    )
    def test_rank_file(self, tmp_path: Path, ranks: str, main: str, node: int) -> None:
        me = socket.gethostname()
        (tmp_path / "ranks").write_text(ranks.format(me=me))
        environment = use(LSFEnvironment, {**LSF, "LSB_DJOB_RANKFILE": str(tmp_path / "ranks")})
        assert environment.main_address == main.format(me=me)
        assert environment.node_rank() == node
        assert environment.main_port == 10321
        assert (environment.world_size(), environment.global_rank(), environment.local_rank()) == (8, 5, 1)

    @pytest.mark.parametrize(
        ("content", "says"), [(None, "cannot be read"), ("", "empty"), ("a\nb\nb\n", "not among those")]
    )
    def test_bad_rank_file(self, tmp_path: Path, content: str | None, says: str) -> None:
        if content is not None:
            (tmp_path / "ranks").write_text(content)
        environment = use(LSFEnvironment, {**LSF, "LSB_DJOB_RANKFILE": str(tmp_path / "ranks")})
        with pytest.raises(MisconfigurationException, match=says):
            environment.node_rank()


class TestMPI:
    def test_several_nodes_without_mpi4py(self) -> None:
        if "mpi4py" in sys.modules:
            pytest.skip("mpi4py is there")
        environ = {**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "8"}
        with pytest.raises(MisconfigurationException, match="Install mpi4py"):
            _ = use(MPIEnvironment, environ).main_address
        environ |= {"MASTER_ADDR": "a", "MASTER_PORT": "5"}
        assert (use(MPIEnvironment, environ).main_address, use(MPIEnvironment, environ).main_port) == ("a", 5)

    def test_several_nodes_ask_mpi4py(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class World:
            def bcast(self, value: Any, root: int) -> Any:
                return "host-of-0" if isinstance(value, str) else 4242

            def allgather(self, value: str) -> list[str]:
                return ["a", "b", "a", "b"]

        package, module = types.ModuleType("mpi4py"), types.ModuleType("mpi4py.MPI")
        package.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
        package.MPI = module  # type: ignore[attr-defined]
        module.COMM_WORLD = World()  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "mpi4py", package)
        monkeypatch.setitem(sys.modules, "mpi4py.MPI", module)
        environment = use(MPIEnvironment, {"PMI_SIZE": "4", "PMI_RANK": "3"})
        assert (environment.main_address, environment.main_port) == ("host-of-0", 4242)
        assert (environment.node_rank(), environment.local_rank()) == (1, 1)


class OfThePlatform(LightningEnvironment):
    """Learns ranks and port of its own service, which does not number machines."""

    main_port = property(lambda self: int(self.variables["MASTER_PORT_OF_SERVICE"]))

    def world_size(self) -> int:
        return 2

    def global_rank(self) -> int:
        return int(self.variables["RANK"])


def _train_on_the_platform(replaced: bool) -> None:
    os.environ |= {"RANK": os.environ.pop("LOCAL_RANK"), "LOCAL_RANK": "0"}
    environment: Any = LightningEnvironment() if replaced else OfThePlatform()
    if replaced:  # as some services tell their users to
        environment.world_size, environment.global_rank = lambda: 2, lambda: int(os.environ["RANK"])
    else:
        os.environ["MASTER_PORT_OF_SERVICE"] = os.environ.pop("MASTER_PORT")
    del os.environ["NODE_RANK"]
    fabric = Fabric(accelerator="cpu", devices=1, num_nodes=2, plugins=environment)
    fabric.launch()
    assert fabric.world_size == 2 and fabric.global_rank == int(os.environ["RANK"])
    assert fabric.all_reduce(torch.tensor(fabric.global_rank), reduce_op="sum") == 1


@pytest.mark.parametrize("replaced", [True, False])
def test_a_program_may_know_ranks_and_port_from_elsewhere(replaced: bool) -> None:
    run_in_ranks(_train_on_the_platform, replaced)
