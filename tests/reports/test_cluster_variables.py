"""Variables of a cluster contradicted one another, or the job's options, and a run waited, or trained the wrong ranks.

Tests of ``treadle_fabric.environments.environment``, ``treadle_fabric.environments.detection``,
``treadle_fabric.environments.slurm``, ``treadle_fabric.environments.lsf``, ``treadle_fabric.environments.mpi``,
``treadle_fabric.environments.kubeflow``, ``treadle_fabric.environments.torchelastic``,
``treadle_fabric.environments.local``.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.processes import importing_tests
from tests.slurm import install_scontrol

import treadle as L
from treadle_fabric import (
    KubeflowEnvironment,
    LightningEnvironment,
    LSFEnvironment,
    MisconfigurationException,
    MPIEnvironment,
    PossibleUserWarning,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from treadle_fabric.cli import main
from treadle_fabric.environments import detect, refuse_contradiction
from treadle_fabric.resolve import resolve

MEETING = {"MASTER_ADDR": "first", "MASTER_PORT": "29400"}
TORCHRUN = {**MEETING, "TORCHELASTIC_RUN_ID": "r", "WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}
TORCHRUN |= {"LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2", "TORCHELASTIC_RESTART_COUNT": "0"}
SRUN = {"SLURM_JOB_ID": "12", "SLURM_JOB_NAME": "train", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "4", "SLURM_NNODES": "2"}
SRUN |= {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_NODELIST": "a[1-2]"}
SRUN |= {"SLURM_NTASKS_PER_NODE": "2"}
STEP = {**SRUN, "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}
JSRUN = {"LSB_JOBID": "7", "LSB_HOSTS": "batch a a b b", "JSM_NAMESPACE_SIZE": "4", "JSM_NAMESPACE_RANK": "3"}
JSRUN |= {"JSM_NAMESPACE_LOCAL_RANK": "1", "JSM_NAMESPACE_LOCAL_SIZE": "2"}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
OPEN_MPI |= {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_NAMESPACE": "n", **MEETING}
HYDRA = {"PMI_SIZE": "4", "PMI_RANK": "3", "MPI_LOCALNRANKS": "2", "MPI_LOCALRANKID": "1", **MEETING}
PODS = {**MEETING, "WORLD_SIZE": "2", "RANK": "1"}
HAND = {**MEETING, "NODE_RANK": "1"}

NOT_USED = "The `srun` command is available on your system but is not used"


def plan(environ: dict[str, str], **asked: Any) -> Any:
    asked = {"devices": 2, "num_nodes": 2, **asked}
    return resolve(environ=environ, available={"cpu": 1}, interactive=False, **asked)


@pytest.mark.parametrize(
    ("environ", "kind"),
    [
        (TORCHRUN, TorchElasticEnvironment),
        (SRUN, SLURMEnvironment),
        (STEP, SLURMEnvironment),
        (JSRUN, LSFEnvironment),
        (OPEN_MPI, MPIEnvironment),
        (HYDRA, MPIEnvironment),
        (HAND, LightningEnvironment),
        ({**HAND, "WORLD_SIZE": "4"}, LightningEnvironment),
        ({**HAND, "WORLD_SIZE": "2"}, LightningEnvironment),  # which some set to the number of machines
        ({**HAND, "LOCAL_RANK": "1", "WORLD_SIZE": "4", "RANK": "3"}, LightningEnvironment),
    ],
)
def test_variables_that_agree(environ: dict[str, str], kind: type) -> None:
    found = plan(environ)
    assert type(found.environment) is kind
    assert found.world_size == 4
    assert (found.notes, found.warnings) == ((), ())


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({**TORCHRUN, "RANK": "4"}, "RANK=4, but WORLD_SIZE=4: ranks go from 0 to 3.*torchrun.*unset RANK WORLD_SIZE"),
        ({**TORCHRUN, "LOCAL_RANK": "2"}, "LOCAL_RANK=2, but LOCAL_WORLD_SIZE=2"),
        ({**TORCHRUN, "GROUP_RANK": "2"}, "GROUP_RANK=2, but GROUP_WORLD_SIZE=2"),
        ({**TORCHRUN, "WORLD_SIZE": "2", "RANK": "1"}, "torchrun started 2.*--nnodes 1:2.*GROUP_WORLD_SIZE"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "4"}, "devices=2, but torchrun started 4 processes on this machine"),
        ({**TORCHRUN, "RANK": "-1"}, "RANK='-1', and this number has to be 0 or more"),
        ({**TORCHRUN, "WORLD_SIZE": "0"}, "WORLD_SIZE='0', and this number has to be 1 or more"),
        ({**TORCHRUN, "WORLD_SIZE": "four"}, "WORLD_SIZE='four' is no whole number"),
        ({**SRUN, "SLURM_PROCID": "4"}, "SLURM_PROCID=4, but SLURM_NTASKS=4"),
        ({**STEP, "SLURM_PROCID": "5"}, "SLURM_PROCID=5, but SLURM_STEP_NUM_TASKS=4"),
        ({**SRUN, "SLURM_PROCID": "5", "SLURM_HET_SIZE": "2"}, "heterogeneous job of 2 components"),
        ({**SRUN, "SLURM_NODEID": "2"}, "SLURM_NODEID=2, but SLURM_NNODES=2"),
        ({**SRUN, "SLURM_LOCALID": "2"}, "SLURM_LOCALID=2, but there are 2 tasks on the node"),
        ({**SRUN, "SLURM_NTASKS": "6"}, "SLURM_NTASKS=6, SLURM_NTASKS_PER_NODE=2, but 2 nodes with 2 tasks each are 4"),
        ({**SRUN, "SLURM_TASKS_PER_NODE": "3,1"}, "SLURM started 3, 1 tasks on the 2 nodes"),
        ({**SRUN, "SLURM_NTASKS_PER_NODE": "4", "SLURM_NTASKS": "8"}, "devices=2, but SLURM started 4 tasks on each"),
        ({**SRUN, "SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, "has 1 nodes"),
        ({**JSRUN, "JSM_NAMESPACE_RANK": "4"}, "JSM_NAMESPACE_RANK=4, but JSM_NAMESPACE_SIZE=4"),
        ({**JSRUN, "JSM_NAMESPACE_LOCAL_RANK": "2"}, "JSM_NAMESPACE_LOCAL_RANK=2, but JSM_NAMESPACE_LOCAL_SIZE=2"),
        ({**JSRUN, "JSM_NAMESPACE_LOCAL_SIZE": "4"}, "devices=2, but jsrun started 4 processes on this machine"),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_RANK": "9"}, "OMPI_COMM_WORLD_RANK=9, but OMPI_COMM_WORLD_SIZE=4"),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "3"}, "devices=2, but MPI started 3 processes on this machine"),
        ({**HYDRA, "MPI_LOCALRANKID": "2"}, "MPI_LOCALRANKID=2, but MPI_LOCALNRANKS=2"),
        ({**HAND, "NODE_RANK": "2"}, "NODE_RANK=2, but num_nodes=2: the machines are numbered from 0 to 1"),
        ({**HAND, "WORLD_SIZE": "8"}, "WORLD_SIZE=8, but devices=2 and num_nodes=2 ask for 4"),
        ({**HAND, "LOCAL_RANK": "1", "WORLD_SIZE": "3"}, "WORLD_SIZE=3, but devices=2 and num_nodes=2"),
        ({**HAND, "LOCAL_RANK": "2"}, "LOCAL_RANK=2, but devices=2"),
        ({**HAND, "LOCAL_RANK": "1", "RANK": "0"}, "RANK=0, but NODE_RANK=1 node 1"),
        ({**HAND, "MASTER_PORT": "70000"}, "MASTER_PORT='70000', and this number has to be from 1 to 65535"),
    ],
)
def test_variables_that_contradict_one_another_are_refused(environ: dict[str, str], says: str) -> None:
    with pytest.raises(MisconfigurationException, match=says):
        plan(environ)


@pytest.mark.parametrize("environ", [TORCHRUN, STEP, JSRUN, OPEN_MPI, PODS, HAND])
@pytest.mark.parametrize(("port", "says"), [("0", "from 1 to 65535"), ("65536", "from 1 to 65535"), ("", "no whole")])
def test_a_port_that_is_none(environ: dict[str, str], port: str, says: str) -> None:
    environment = KubeflowEnvironment() if environ is PODS else detect(environ).environment
    environment.environ = {**environ, "MASTER_PORT": port}
    with pytest.raises(MisconfigurationException, match=says):
        _ = environment.main_port


@pytest.mark.parametrize("environ", [TORCHRUN, PODS, HAND])
def test_an_empty_address_is_none(environ: dict[str, str]) -> None:
    environment = KubeflowEnvironment() if environ is PODS else detect(environ).environment
    environment.environ = {**environ, "MASTER_ADDR": ""}
    with pytest.raises(MisconfigurationException, match="MASTER_ADDR is empty"):
        _ = environment.main_address


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"RANK": "2"}, "RANK=2, but WORLD_SIZE=2"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK=1.*torchrun train.py"),
        ({"PET_NPROC_PER_NODE": "4", "WORLD_SIZE": "8"}, "PET_NPROC_PER_NODE=4.*torchrun train.py"),
        ({"PET_NODE_RANK": "0"}, "RANK=1, PET_NODE_RANK=0: Kubeflow sets both"),
        ({"WORLD_SIZE": "3"}, "Kubeflow started 3 pods"),
        (TORCHRUN, "Leave out plugins=KubeflowEnvironment.*: torchrun is detected"),
    ],
)
def test_pods(more: dict[str, str], says: str) -> None:
    def in_pods(environ: dict[str, str]) -> Any:
        environment = KubeflowEnvironment()
        environment.environ = environ
        return plan(environ, devices=1, plugins=environment)

    assert in_pods({**PODS, "PET_NODE_RANK": "1", "PET_NPROC_PER_NODE": "1"}).world_size == 2
    with pytest.raises(MisconfigurationException, match=says):
        in_pods({**PODS, **more})


@pytest.mark.parametrize(
    ("environ", "chosen", "says"),
    [
        # one agent of torchrun's on each node, started by srun: all its workers inherit the task's rank
        (
            {**STEP, "SLURM_PROCID": "0", **TORCHRUN},
            SLURMEnvironment,
            "says rank 0 of 4 .*torchrun started.*rank 3 of 4",
        ),
        # mpirun in a batch script
        ({**SRUN, "SLURM_STEP_ID": "4294967291", "SLURM_PROCID": "0", **OPEN_MPI}, SLURMEnvironment, "mpirun started"),
        ({**STEP, "PMI_SIZE": "8", "PMI_RANK": "1", "SLURM_TASK_PID": "{pid}"}, MPIEnvironment, "srun started"),
    ],
)
def test_two_environments_that_claim_a_process(environ: dict[str, str], chosen: Any, says: str) -> None:
    """The user chose the outer one, whose rank all processes of the inner one have inherited."""
    environ = {name: value.format(pid=os.getpid()) for name, value in environ.items()}
    environment = chosen()
    environment.environ = environ
    with pytest.raises(MisconfigurationException, match=f"{says}.*Leave out plugins={chosen.__name__}"):
        plan(environ, plugins=environment)
    own = LightningEnvironment()
    own.environ = environ
    refuse_contradiction(own, environ)  # messages name it as the way to have Treadle start the processes


def test_srun_and_mpi_s_variables_that_agree_are_one_claim() -> None:
    environ = {**STEP, "PMI_SIZE": "4", "PMI_RANK": "3"}
    environment = MPIEnvironment()
    environment.environ = environ
    assert plan(environ, plugins=environment).world_size == 4


# What the options of a SLURM job say, and how the script was started.

BATCH = {"SLURM_JOB_ID": "12", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "1", "SLURM_NNODES": "1", "SLURM_PROCID": "0"}


def test_srun_that_was_at_hand_and_not_used(tmp_path: Path) -> None:
    install_scontrol(tmp_path)
    (tmp_path / "scontrol").rename(tmp_path / "srun")
    environ = {**BATCH, "PATH": str(tmp_path)}
    (warning,) = plan(environ, num_nodes=1).warnings
    assert (
        "The `srun` command is available on your system but is not used" in warning
        and "`srun python ...`" in warning
        and "nodes" not in warning.split(":")[0]
    )
    (warning,) = plan({**environ, "SLURM_NTASKS": "8", "SLURM_NNODES": "2"}, num_nodes=1).warnings
    assert "has 2 nodes, and only the first one works" in warning
    for none in ({"PATH": "/nowhere"}, {"SLURM_JOB_NAME": "bash"}, {"SLURM_JOB_NAME": "interactive"}):
        assert plan({**environ, **none}, num_nodes=1).warnings == ()
    assert plan({**STEP, "PATH": str(tmp_path)}).warnings == ()
    assert plan({"PATH": str(tmp_path)}, num_nodes=1).warnings == ()


def test_ntasks_without_ntasks_per_node() -> None:
    less = {name: value for name, value in STEP.items() if name != "SLURM_NTASKS_PER_NODE"}
    (warning,) = plan(less).warnings
    assert warning.startswith("--ntasks=4 is set, and --ntasks-per-node is not")
    one = {**less, "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_NODEID": "0"}
    assert plan(one, devices=4, num_nodes=1).warnings == ()  # SLURM has no choice there
    with pytest.raises(MisconfigurationException, match="--ntasks-per-node"):
        plan({**less, "SLURM_STEP_TASKS_PER_NODE": "3,1"})


def test_a_component_of_a_heterogeneous_job() -> None:
    (warning,) = plan({**STEP, "SLURM_HET_SIZE": "2"}).warnings
    assert "SLURM_HET_SIZE=2" in warning and "--het-group=0" in warning


def test_a_warning_is_given_once_by_fabric_and_trainer_and_printed_by_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install_scontrol(tmp_path)
    (tmp_path / "scontrol").rename(tmp_path / "srun")
    for name, value in {**BATCH, "PATH": f"{tmp_path}:{os.environ['PATH']}"}.items():
        monkeypatch.setenv(name, value)
    with pytest.warns(PossibleUserWarning, match=NOT_USED):
        L.Fabric(accelerator="cpu")
    with pytest.warns(PossibleUserWarning, match=NOT_USED) as told:
        L.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    assert len(told) == 1
    assert main(["environment"]) == 0
    assert f"Warnings:\n  1: {NOT_USED}" in capsys.readouterr().out


def test_pods_that_would_train_alone() -> None:
    found = plan({**PODS, "KUBERNETES_SERVICE_HOST": "10.0.0.1"}, devices=1, num_nodes=1)
    assert "plugins=KubeflowEnvironment()" in found.warnings[0] and "trains on its own" in found.warnings[0]
    assert found.notes == ()


# Where the hosts of an LSF job come from.


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ({"LSB_HOSTS": "batch a a b b"}, "a"),
        ({"LSB_HOSTS": "a a b b"}, "a"),
        ({"LSB_MCPU_HOSTS": "batch 1 a 42 b 42"}, "a"),
        ({"LSB_MCPU_HOSTS": "a 2 b 2"}, "a"),
        ({"LSB_HOSTS": "a b", "JSM_NAMESPACE_SIZE": "2", "JSM_NAMESPACE_LOCAL_SIZE": "1"}, "a"),  # one slot on each
        ({"LSB_HOSTS": "b a", "LSB_DJOB_RANKFILE": "hosts"}, "c"),  # the file wins
        ({"MASTER_ADDR": "given"}, "given"),
    ],
)
def test_the_first_host_of_an_lsf_job(hosts: dict[str, str], first: str) -> None:
    Path("hosts").write_text("batch\nc\nc\nd\nd\n")
    environ = {name: value for name, value in JSRUN.items() if name != "LSB_HOSTS"} | hosts
    found = detect(environ).environment
    assert type(found) is LSFEnvironment
    assert found.main_address == first


def test_an_lsf_job_whose_hosts_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for hosts, says in [
        ({"LSB_DJOB_RANKFILE": "gone"}, "LSB_DJOB_RANKFILE='gone' cannot be read.*Set MASTER_ADDR"),
        ({"LSB_HOSTS": " "}, "LSB_HOSTS is empty"),
        ({"LSB_MCPU_HOSTS": "a b 4"}, "LSB_MCPU_HOSTS='a b 4' has to have a number of slots after each host"),
    ]:
        environ = {name: value for name, value in JSRUN.items() if name != "LSB_HOSTS"} | hosts
        with pytest.raises(MisconfigurationException, match=says):
            _ = detect(environ).environment.main_address
    host = socket.gethostname()
    found = detect({**JSRUN, "LSB_HOSTS": f"batch a a {host}.example.org {host}.example.org"}).environment
    assert found.node_rank() == 1
    with pytest.raises(MisconfigurationException, match="not among those of LSB_HOSTS: a, b"):
        detect(JSRUN).environment.node_rank()
    without = {name: value for name, value in JSRUN.items() if name != "LSB_HOSTS"}
    assert "LSB_DJOB_RANKFILE not set" in LSFEnvironment.examine(without).reason


PROGRAM = """
import sys, torch
import treadle as L
from tests.trainer.models import Net, loader
fabric = L.Fabric(accelerator="cpu", devices="auto")
fabric.launch()
assert type(fabric.strategy.cluster_environment).__name__ == "MPIEnvironment"
total = fabric.all_reduce(torch.tensor([1.0 + fabric.global_rank]), reduce_op="sum")
trainer = L.Trainer(accelerator="cpu", devices=2, max_epochs=1, logger=False, enable_progress_bar=False,
                    enable_model_summary=False, enable_checkpointing=False)
trainer.fit(Net(), loader(8))
sys.stdout.write(f"{fabric.global_rank} of {fabric.world_size}: {total.item()} {trainer.global_step}\\n")
"""


@pytest.mark.faults
@pytest.mark.skipif(shutil.which("mpirun") is None, reason="mpirun is not installed (apt-get install openmpi-bin)")
def test_mpirun_starts_fabric_and_trainer() -> None:
    """Real ranks of Open MPI's, without mpi4py."""
    Path("program.py").write_text(PROGRAM)
    command = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable, "program.py"]
    done = subprocess.run(command, env=importing_tests(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(line for line in done.stdout.splitlines() if " of " in line) == ["0 of 2: 3.0 2", "1 of 2: 3.0 2"]


@pytest.mark.faults
@pytest.mark.skipif(shutil.which("mpirun") is None, reason="mpirun is not installed (apt-get install openmpi-bin)")
def test_a_number_of_devices_that_mpirun_did_not_start() -> None:
    program = "import treadle as L; L.Fabric(accelerator='cpu', devices=3).launch()"
    command = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable, "-c", program]
    done = subprocess.run(command, env=importing_tests(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "ask for 3 processes, but MPI started 2" in done.stderr
