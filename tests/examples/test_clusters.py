"""The examples for clusters: their syntax, and what runs of them without a cluster."""

from __future__ import annotations

import argparse
import os
import re
import runpy
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from tests.processes import ROOT, importing_tests, run_in_ranks, wait_until
from tests.slurm import install_scontrol, task

from treadle_fabric import find_free_port

CLUSTERS = ROOT / "examples" / "clusters"


def example(name: str) -> dict[str, Any]:
    return runpy.run_path(str(CLUSTERS / name))


@pytest.mark.parametrize("name", ["slurm.sh", "lsf.sh"])
def test_the_batch_scripts_ask_for_what_they_start(name: str) -> None:
    subprocess.run(["bash", "-n", CLUSTERS / name], check=True)
    text = (CLUSTERS / name).read_text()
    per_node = re.search(r"--(?:ntasks-per-node|tasks_per_rs)[= ](\d+)", text)
    assert per_node is not None and f"--devices {per_node[1]}" in text
    given = example("train.py")["parse"](re.search(r"train\.py (.*)", text)[1].replace('"$SLURM_NNODES"', "2").split())  # type: ignore[index]
    assert (given.devices, given.nodes, given.root) == (per_node[1], 2, "runs/regression")


def test_the_job_for_kubernetes() -> None:
    job = yaml.safe_load((CLUSTERS / "pytorchjob.yaml").read_text())
    (container,) = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
    assert container["command"][0] == "torchrun"
    given = example("train.py")["parse"](container["command"][2:])
    assert given.devices == job["spec"]["nprocPerNode"] == str(container["resources"]["limits"]["nvidia.com/gpu"])
    assert job["spec"]["pytorchReplicaSpecs"]["Worker"]["replicas"] == job["spec"]["elasticPolicy"]["maxReplicas"]


def train(*arguments: str) -> None:
    sys.argv = ["train.py", "--accelerator=cpu", "--devices=1", *arguments]
    runpy.run_path(str(CLUSTERS / "train.py"), run_name="__main__")


def test_the_script_trains_and_goes_on() -> None:
    assert "trained to step 128 on 1 processes" in run_in_ranks(train, "--epochs=2", devices=1)
    said = run_in_ranks(train, "--epochs=3", devices=1)
    assert "Restoring states from" in said and "trained to step 192 on 1 processes" in said


@pytest.mark.filterwarnings("ignore")
def test_submitit_calls_the_script(monkeypatch: pytest.MonkeyPatch) -> None:
    submitit = pytest.importorskip("submitit")
    training = example("slurm_submitit.py")["Training"](["--epochs=1", "--accelerator=cpu", "--devices=1"])
    assert submitit.DebugExecutor(folder="submitit").submit(training).result() == 64


def loop(port: int, at: int | None) -> None:
    """The hand-written loop as a task of SLURM's; rank 1 gets the signal at its ``at``-th batch."""
    rank = int(os.environ["LOCAL_RANK"])
    os.environ.update(task(rank, 2, port=port))
    loss, calls = torch.nn.functional.mse_loss, []

    def counted(*tensors: Any) -> Any:
        calls.append(1)
        if len(calls) == at and rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return loss(*tensors)

    torch.nn.functional.mse_loss = counted
    status = 0
    try:
        example("fabric_loop.py")["main"](argparse.Namespace(accelerator="cpu", devices=2, nodes=1, steps=40))
    except SystemExit as end:
        status = int(str(end.code))
    assert status == (0 if at is None else 143)


def test_the_hand_written_loop_is_queued_again_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", install_scontrol(Path("bin").absolute(), 'cp "$here/../loop.ckpt" "$here"'))
    run_in_ranks(loop, find_free_port(), 21)
    assert Path("bin/asked").read_text() == "requeue 4711\n"
    assert Path("bin/loop.ckpt").exists()
    said = run_in_ranks(loop, find_free_port(), None)
    assert re.search(r"went on from step 2[12]\n", said) and "trained to step 40" in said


@pytest.mark.faults
def test_torchrun_in_a_job_ignores_the_signal_that_its_workers_take() -> None:
    """As docs/clusters/slurm.md has it: the agent and the workers are signalled; the job is queued again."""
    environ = importing_tests() | {"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "train"}
    environ |= {"PATH": install_scontrol(Path("bin").absolute())}
    script = "trap '' USR1; exec {} -m torch.distributed.run --nproc-per-node 2 --master-port {} {} --accelerator cpu"
    command = script.format(sys.executable, find_free_port(), CLUSTERS / "train.py") + " --devices 2 --epochs 400"
    everybody: list[psutil.Process] = []
    with Path("log").open("w") as log:
        agent = subprocess.Popen(["bash", "-c", command], env=environ, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_until(lambda: agent.poll() is not None or list(Path("runs").rglob("*.ckpt")), timeout=120)
        # SLURM signals all processes of a step; torchrun's workers have sessions of their own.
        everybody = [psutil.Process(agent.pid), *psutil.Process(agent.pid).children(recursive=True)]
        for process in everybody:
            process.send_signal(signal.SIGUSR1)
        assert agent.wait(120) == 1, Path("log").read_text()
    finally:
        for process in [*everybody, *([agent] if agent.poll() is None else [])]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
    assert Path("bin/asked").read_text() == "requeue 4711\n", Path("log").read_text()
    assert Path("runs/regression/hpc_ckpt_1.ckpt").exists()
