"""A process followed variables that describe another one: the shell of salloc, the job around a step, its parent.

Tests of ``treadle_fabric.environments.detection``, ``treadle_fabric.environments.taken``,
``treadle_fabric.environments.slurm``, ``treadle_fabric.cli.main``, ``treadle_fabric.cli.environment``.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tomllib
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.processes import ROOT, run_in_ranks

from treadle_fabric import Fabric
from treadle_fabric.cli import main
from treadle_fabric.environments import (
    KubeflowEnvironment,
    LightningEnvironment,
    LSFEnvironment,
    MPIEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
    detect,
    detect_environment,
    mark_rank_as_taken,
)
from treadle_fabric.environments.taken import describing_variables, taken_by
from treadle_fabric.errors import MisconfigurationException
from treadle_fabric.rank_zero import rank_zero_only
from treadle_fabric.resolve import resolve
from treadle_fabric.strategies import DDPStrategy

pytestmark = pytest.mark.timeout(60)

JOB = {
    "SLURM_JOBID": "4242",
    "SLURM_JOB_ID": "4242",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NNODES": "2",
    "SLURM_NODELIST": "gpu[07-08]",
    "SLURM_NPROCS": "8",
    "SLURM_NTASKS": "8",
    "SLURM_NTASKS_PER_NODE": "4",
    "SLURM_TASKS_PER_NODE": "4(x2)",
    "SLURM_SUBMIT_DIR": "/home/a",
}
# salloc names the job after the shell, or "interactive" (SLURM 20 and newer)
SALLOC_20 = {**JOB, "SLURM_JOB_NAME": "bash"}
SALLOC_24 = {**JOB, "SLURM_JOB_NAME": "interactive"}
# LaunchParameters=use_interactive_step: the shell is step 0xfffffffa of its own
INTERACTIVE_STEP = {
    **SALLOC_24,
    "SLURM_STEP_ID": "4294967290",
    "SLURM_STEPID": "4294967290",
    "SLURM_STEP_NODELIST": "gpu07",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_STEP_TASKS_PER_NODE": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_PTY_PORT": "40001",
    "SLURM_TASK_PID": "100",
}
SBATCH_20 = {
    **JOB,
    "SLURM_JOB_NAME": "train",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_GTIDS": "0",
    "SLURM_TASK_PID": "100",
    "ENVIRONMENT": "BATCH",
}
SBATCH_24 = {**SBATCH_20, "SLURM_STEP_ID": "4294967291", "SLURM_STEPID": "4294967291", "SLURM_JOB_NAME": "interactive"}
SBATCH_TEXT = {**SBATCH_20, "SLURM_STEP_ID": "batch"}
EXTERN = {**JOB, "SLURM_JOB_NAME": "train", "SLURM_STEP_ID": "4294967292", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


def srun(outer: dict[str, str], **more: str) -> dict[str, str]:
    """What ``srun -N1 -n2`` sets for its second task, on top of what it inherits."""
    step = {"SLURM_STEP_ID": "3", "SLURM_STEPID": "3", "SLURM_STEP_NODELIST": "gpu08", "SLURM_STEP_NUM_NODES": "1"}
    step |= {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}
    return {**outer, **step, "SLURM_NODEID": "0", "SLURM_TASK_PID": "200", **more}


def resolved(environ: dict[str, str], cpus: int | str = "auto", **arguments: Any) -> Any:
    return resolve(devices=cpus, environ=environ, available={"cpu": 1}, interactive=False, **arguments)


OUTER = {
    "salloc of 20": SALLOC_20,
    "salloc of 24": SALLOC_24,
    "salloc as a step": INTERACTIVE_STEP,
    "sbatch of 20": SBATCH_20,
    "sbatch with a step": SBATCH_24,
    "sbatch with a step's name": SBATCH_TEXT,
}


@pytest.mark.parametrize("outer", OUTER)
def test_srun_in_a_job_is_one_run_of_as_many_ranks_as_the_step_has(outer: str) -> None:
    for newer in ({}, {"SLURM_NTASKS": "2", "SLURM_NPROCS": "2", "SLURM_NNODES": "1"}):  # later ones set these anew
        plan = resolved(srun(OUTER[outer], **newer))
        environment = plan.environment
        assert isinstance(environment, SLURMEnvironment)
        assert (environment.world_size(), environment.global_rank(), environment.local_rank()) == (2, 1, 1)
        assert (environment.processes_per_node(), environment.main_address) == (2, "gpu08")
        assert (plan.launcher, plan.num_processes, plan.world_size, plan.notes) == ("external", 2, 2, ())
        assert environment.evidence()["SLURM_STEP_NUM_TASKS"] == "2"


@pytest.mark.parametrize("outer", [*OUTER, "extern"])
def test_python_in_a_job_is_no_rank_of_slurm(outer: str) -> None:
    environ = {**OUTER, "extern": EXTERN}[outer]
    plan = resolved(environ, 2)
    assert isinstance(plan.environment, LightningEnvironment)
    assert (plan.launcher, plan.world_size) == ("subprocess", 2)
    assert len(plan.notes) == 1
    assert "SLURM_NTASKS=8" in plan.notes[0] and "is not followed" in plan.notes[0] and "srun python" in plan.notes[0]
    assert resolved(environ).launcher == "none"
    assert plan.environment.announcing_signal() == signal.SIGUSR1  # of --signal=B:SIGUSR1, which would end the process
    with pytest.raises(MisconfigurationException, match="In a SLURM job, start the script with `srun python"):
        resolved(environ, 2, num_nodes=2)


def test_one_task_is_no_matter_for_a_note() -> None:
    assert resolved({**SBATCH_20, "SLURM_NTASKS": "1", "SLURM_NPROCS": "1"}).notes == ()


@pytest.mark.parametrize("job_name", ["bash", "train"])
def test_python_in_a_shell_that_srun_started(job_name: str) -> None:
    one = {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    pty = srun({**JOB, "SLURM_JOB_NAME": job_name}, **one, SLURM_PTY_PORT="40001")
    assert resolved(pty, 2).launcher == "subprocess"
    assert isinstance(detect_environment(srun(pty)), SLURMEnvironment)  # and srun -n2 in that shell
    assert isinstance(detect_environment({**pty, "SLURM_STEP_NUM_TASKS": "2"}), SLURMEnvironment)


def test_two_steps_of_a_job_meet_at_different_ports() -> None:
    first, second = (detect_environment(srun(SBATCH_20, SLURM_STEP_ID=step)) for step in "01")
    assert first.main_port != second.main_port


def test_a_step_with_different_numbers_of_tasks_on_its_nodes_is_refused() -> None:
    environ = srun(SBATCH_20, SLURM_STEP_NUM_TASKS="5", SLURM_STEP_NUM_NODES="3", SLURM_STEP_TASKS_PER_NODE="2(x2),1")
    environment = detect_environment(environ)
    assert environment.processes_per_node() == 2
    assert detect_environment({**environ, "SLURM_NODEID": "2"}).processes_per_node() == 1
    with pytest.raises(MisconfigurationException, match="2, 2, 1 tasks on the 3 nodes"):
        environment.validate_settings(2, 3)


def test_the_count_per_node_of_the_job_is_not_that_of_a_smaller_step() -> None:
    environ = {k: v for k, v in srun(SBATCH_20).items() if k not in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_NNODES")}
    assert detect_environment(environ).processes_per_node() == 2
    assert detect_environment({**environ, "SLURM_STEP_NUM_NODES": "2"}).processes_per_node() is None


TORCHRUN = {"TORCHELASTIC_RUN_ID": "r", "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
TORCHRUN |= {"GROUP_RANK": "1", "MASTER_ADDR": "gpu07", "MASTER_PORT": "29400"}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
JSRUN = {"LSB_JOBID": "1", "LSB_DJOB_RANKFILE": "f", "JSM_NAMESPACE_SIZE": "4", "JSM_NAMESPACE_RANK": "3"}
JSRUN |= {"JSM_NAMESPACE_LOCAL_RANK": "1"}
KUBEFLOW = {"MASTER_ADDR": "pod-0", "MASTER_PORT": "23456", "WORLD_SIZE": "2", "RANK": "1"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        # one program started the other: the inner one describes the process
        (srun(SBATCH_20) | TORCHRUN, TorchElasticEnvironment),
        (srun(SBATCH_20, SLURM_TASK_PID="77") | TORCHRUN, SLURMEnvironment),  # 77 is this process
        (SBATCH_20 | OPEN_MPI, MPIEnvironment),  # on the machine where mpirun is called
        (srun(SBATCH_20, SLURM_PROCID="0", SLURM_STEP_NUM_TASKS="1") | OPEN_MPI, MPIEnvironment),  # on the others
        (srun(SBATCH_20) | OPEN_MPI, MPIEnvironment),
        (JSRUN | OPEN_MPI, LSFEnvironment),  # jsrun sets both, alike
        (JSRUN | OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "8"}, MPIEnvironment),  # mpirun in jsrun's task
        (srun(SBATCH_20) | {"PMI_RANK": "1", "PMI_SIZE": "2", "PMI_FD": "9"}, SLURMEnvironment),  # --mpi=pmi2
        (srun(SBATCH_20) | {"PMI_RANK": "3", "PMI_SIZE": "4"}, MPIEnvironment),  # hydra, which uses srun
        (srun(SBATCH_20) | {"PMI_RANK": "x", "PMI_SIZE": "2"}, SLURMEnvironment),
        # the batch script of LSF, outside of jsrun
        ({k: v for k, v in JSRUN.items() if k.startswith("LSB")}, LightningEnvironment),
        ({k: v for k, v in JSRUN.items() if k != "JSM_NAMESPACE_RANK"}, LightningEnvironment),
        # what torchrun left after a script removed the ranks
        ({"TORCHELASTIC_RUN_ID": "r", "MASTER_PORT": "1"}, LightningEnvironment),
        # only on request
        (KUBEFLOW, LightningEnvironment),
        (KUBEFLOW | TORCHRUN, TorchElasticEnvironment),
    ],
)
def test_of_several_programs_the_inner_one_describes_the_process(environ: dict[str, str], expected: type) -> None:
    assert type(detect(environ, pid=77).environment) is expected


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({"TORCHELASTIC_RUN_ID": "r"}, "TORCHELASTIC_RUN_ID is not followed.*RANK, LOCAL_RANK, WORLD_SIZE"),
        (KUBEFLOW, "RANK=1.*are not followed.*plugins=KubeflowEnvironment"),
        ({k: v for k, v in srun(SBATCH_20).items() if k != "SLURM_LOCALID"}, "SLURM_LOCALID"),
    ],
)
def test_variables_that_nothing_follows_are_told(environ: dict[str, str], says: str) -> None:
    (note,) = detect(environ).notes
    assert re.search(says, note)


def test_kubeflow_is_refused_where_torchrun_runs_in_the_pod() -> None:
    environment = KubeflowEnvironment()
    environment.environ = KUBEFLOW | TORCHRUN
    with pytest.raises(MisconfigurationException, match="torchrun started this process in its pod"):
        environment.validate_settings(1, 4)


STARTED = {
    "torchrun": TORCHRUN,
    "srun": srun(SBATCH_20),
    "mpirun": OPEN_MPI,
    "jsrun": JSRUN,
    "by hand": {"LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1", "LOCAL_WORLD_SIZE": "2"},
}


@pytest.mark.parametrize("how", STARTED)
def test_a_script_that_a_rank_starts_is_no_rank(how: str) -> None:
    environ = dict(STARTED[how])
    expected = type(detect(environ, pid=10).environment)
    mark_rank_as_taken(environ, pid=10)
    assert type(detect(environ, pid=10).environment) is expected  # the rank itself
    nested = detect(environ, pid=11)
    assert type(nested.environment) is LightningEnvironment
    assert not nested.environment.creates_processes_externally and nested.environment.main_address == "127.0.0.1"
    assert "process 10, from which it inherited them" in nested.notes[0] and len(nested.notes) <= 2
    # a process that the rank makes a rank of another run, with variables of its own
    again = {**environ, **{name: "0" for name in environ if name.endswith(("RANK", "PROCID"))}, "MASTER_PORT": "2"}
    assert taken_by(again, pid=11) is None
    assert type(detect(again, pid=11).environment) is expected
    assert "SLURM_JOB_ID" not in describing_variables(environ)  # it is right in every process of the job


def _with_a_script() -> None:
    strategy = DDPStrategy(parallel_devices=[torch.device("cpu")] * 2, cluster_environment=LightningEnvironment())
    strategy.setup_environment()
    if strategy.global_rank == 1:
        script = (
            "import os; from treadle_fabric import Fabric, rank_zero_only\n"
            "fabric = Fabric(accelerator='cpu', devices=1, strategy='ddp'); fabric.launch()\n"
            "print('world', fabric.world_size, rank_zero_only.rank, 'LOCAL_RANK' in os.environ)"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
        print(done.stdout, done.stderr)
    strategy.barrier()
    strategy.leave_environment()


def test_a_real_script_that_a_real_rank_starts() -> None:
    said = run_in_ranks(_with_a_script)
    assert "world 1 0 False" in said, said
    assert "This process is no rank of the run that started it" in said and "LOCAL_RANK=1" in said
    assert rank_zero_only.rank == 0


def _sum(fabric: Fabric) -> float:
    return float(fabric.all_reduce(torch.tensor(1.0), reduce_op="sum"))


def test_what_torchrun_left_does_not_lead_launched_ranks_to_its_store(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TORCHELASTIC_RUN_ID": "r", "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():
        monkeypatch.setenv(name, value)
    strategy = DDPStrategy(start_method="fork", timeout=timedelta(seconds=20))
    assert Fabric(accelerator="cpu", devices=2, strategy=strategy).launch(_sum) == 2


# treadle-fabric environment


def said_by_command(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["environment", *arguments]) == 0
    return capsys.readouterr().out


class TestCommand:
    @pytest.fixture(autouse=True)
    def clean(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in describing_variables(os.environ):
            monkeypatch.delenv(name)

    def test_what_is_detected_and_what_would_be_started(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        before = dict(os.environ)
        said = said_by_command(capsys, "--devices", "2", "--strategy", "ddp_spawn", "--accelerator", "cpu")
        assert "LightningEnvironment: LOCAL_RANK is not set" in said
        assert "processes: 2 on this machine, 2 in all" in said and "starts: 2 new processes, by spawn" in said
        assert "TorchElasticEnvironment: torchrun did not start this process: TORCHELASTIC_RUN_ID, RANK" in said
        assert "cpu: 1" in said
        assert dict(os.environ) == before and not torch.cuda.is_initialized()

    def test_in_an_srun_step(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        for name, value in srun(SALLOC_24).items():
            monkeypatch.setenv(name, value)
        said = said_by_command(capsys)
        assert "srun started this process as rank 1 of 2." in said
        assert "SLURM_STEP_NUM_TASKS=2" in said and "global rank: 1 of 2" in said and "local rank: 1" in said
        assert "meeting point: gpu08:" in said
        assert "starts: nothing: the processes are there already" in said

    @pytest.mark.parametrize(
        ("environ", "arguments", "words"),
        [
            (SBATCH_20, ["--devices", "2"], ["Notes:", "SLURM_NTASKS=8", "starts: the script again"]),
            (TORCHRUN, ["--num-nodes", "3"], ["refused: devices=2 and num_nodes=3", "torchrun started 4"]),
            ({"LOCAL_RANK": "0"}, ["--devices", "2"], ["refused: LOCAL_RANK=0", "unset LOCAL_RANK"]),
            ({"PMI_SIZE": "2", "PMI_RANK": "0"}, [], ["mpi4py tells it when the run starts", "PMI_SIZE=2"]),
            ({"PMI_SIZE": "two"}, [], ["PMI_SIZE='two' is no whole number"]),
            ({**TORCHRUN, "RANK": "x"}, [], ["incomplete: RANK='x'"]),
            ({}, ["--strategy", "dpd", "--accelerator", "cpu"], ["Did you mean 'ddp'"]),
        ],
    )
    def test_it_ends_well_whatever_is_found(
        self,
        environ: dict[str, str],
        arguments: list[str],
        words: list[str],
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        said = said_by_command(capsys, *arguments)
        assert all(word in said for word in words), said

    def test_it_is_installed(self) -> None:
        scripts = tomllib.loads((Path(ROOT) / "pyproject.toml").read_text())["project"]["scripts"]
        assert scripts["treadle-fabric"] == "treadle_fabric.cli:main"


STARTED_BY_HAND = {"MASTER_ADDR": "a", "MASTER_PORT": "7", "LOCAL_RANK": "1"}


@pytest.mark.parametrize(("node", "rank"), [(None, 1), ("0", 1), ("1", 5), ("2", 9)])
def test_ranks_started_by_hand_are_counted_over_the_machines(node: str | None, rank: int) -> None:
    environ = {**STARTED_BY_HAND, **({} if node is None else {"NODE_RANK": node})}
    for more in ({}, {"RANK": str(rank)}, {"RANK": str(rank), "WORLD_SIZE": "12"}):
        plan = resolved(environ | more, 4, num_nodes=3)
        assert (plan.launcher, plan.world_size, plan.environment.global_rank()) == ("external", 12, rank)


def test_a_rank_that_is_not_the_one_of_machine_and_place_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="RANK=5, but NODE_RANK is not set, so node 0 .* is rank 1"):
        resolved({**STARTED_BY_HAND, "RANK": "5"}, 4, num_nodes=2)
    with pytest.raises(MisconfigurationException, match="RANK=1, but NODE_RANK=1 .* is rank 5"):
        resolved({**STARTED_BY_HAND, "RANK": "1", "NODE_RANK": "1"}, 4, num_nodes=2)
    left_over = {"RANK": "0", "WORLD_SIZE": "1", "TREADLE_LAUNCH_DIR": "d", "LOCAL_WORLD_SIZE": "4"}
    assert resolved({**STARTED_BY_HAND, **left_over}, 4).environment.global_rank() == 1
