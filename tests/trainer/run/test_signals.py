"""Two ranks, and one of them is asked to stop: both stop after the same batch.

Tests of ``treadle.run.signals``, ``treadle_fabric.coordination.stop_agreement``, ``treadle.loops.stopping``.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.processes import importing_tests, run_in_ranks, session, wait_until
from tests.slurm import install_scontrol, task
from tests.trainer import preempted
from tests.trainer.models import Net, loader, trainer
from tests.trainer.preempted import say
from torch import Tensor

import treadle as L
from treadle_fabric import StopAgreement, find_free_port


def forked(mode: str, ckpt_path: str | None = None) -> int:
    """Train in two forks of this process; returns the exit status that a program would have."""
    try:
        preempted.fit(mode, "ddp_fork", ckpt_path)
    except SystemExit as end:
        return int(str(end.code))
    return 0


def start(mode: str, strategy: str = "auto", **environ: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, preempted.__file__, mode, strategy],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**importing_tests(), **environ},
        start_new_session=True,
    )


def said() -> list[str]:
    """What the ranks have written since it was asked last."""
    lines = Path("said").read_text().splitlines()
    Path("said").unlink()
    return sorted(lines)


@pytest.mark.parametrize("mode", ["stop", "everybody"])
def test_a_stop_on_one_rank_stops_all_after_the_same_batch(mode: str) -> None:
    assert forked(mode) == 0
    lines = said()
    steps = {line.split()[2] for line in lines}
    assert [line.split()[:2] for line in lines] == [["ended", "0"], ["ended", "1"]]
    assert len(steps) == 1
    assert steps == {"6"} if mode == "everybody" else int(steps.pop()) in (6, 7)


def stop_apart(ahead: int, wishes: int) -> None:
    """Rank 1 is ``ahead`` steps further when rank ``wishes`` wants to stop; no rank waits for the other in a step."""
    fabric = L.Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    store: Any = dist.distributed_c10d._get_default_store()
    agreement, step = StopAgreement(), 1
    leads = fabric.global_rank == 1
    while True:
        if leads and step == ahead:
            store.set("ahead", "")
        if not leads and step == 2:
            store.wait(["ahead"])  # rank 0 is slow
        wish = fabric.global_rank == wishes and step >= (ahead if leads else 2)
        if reason := agreement.at_boundary(step, "enough" if wish else ""):
            break
        step += 1
    say(f"{reason} {fabric.global_rank} {step}")
    agreement.close()
    fabric.barrier()


@pytest.mark.parametrize(("ahead", "wishes"), [(9, 1), pytest.param(50, 0, marks=pytest.mark.faults)])
def test_ranks_that_are_many_steps_apart_stop_after_the_same_one(ahead: int, wishes: int) -> None:
    run_in_ranks(stop_apart, ahead, wishes)
    (_, _, first), (_, _, second) = (line.split() for line in said())
    assert first == second
    assert int(first) >= ahead


@pytest.mark.parametrize(
    ("mode", "strategy"), [("term", "auto"), ("term", "ddp_fork"), ("term of the parent", "ddp_fork")]
)
def test_sigterm_saves_and_ends_all_with_143_and_the_run_goes_on_from_there(mode: str, strategy: str) -> None:
    """It comes to one rank, or to the process that waits for forked ranks."""
    process = start(mode, strategy)
    _, stderr = communicate(process)
    assert process.returncode == 143, stderr
    assert "Traceback" not in stderr
    assert stderr.count("preempted.ckpt. ckpt_path='last' goes on from there.") == 1
    lines = said()
    assert {line.split()[3] for line in lines} == {"SIGTERMException"}
    steps = {int(line.split()[2]) for line in lines}
    assert len(lines) == 2
    assert len(steps) == 1
    saved = torch.load(Path("checkpoints") / "preempted.ckpt", weights_only=True)
    assert saved["global_step"] == steps.pop()
    assert forked("none", "last") == 0
    assert said() == ["ended 0 30", "ended 1 30", "from 0 preempted.ckpt", "from 1 preempted.ckpt"]


def test_sigterm_in_a_long_validation_ends_it_on_all_ranks_and_it_begins_anew() -> None:
    assert forked("term in validation") == 143
    lines = said()
    ends = [line.split()[:3] for line in lines if line.startswith("exception")]
    assert ends == [["exception", "0", "10"], ["exception", "1", "10"]]
    batches = [int(line.split()[2]) for line in lines if line.startswith("validated")]  # of the 300 that each rank has
    assert max(batches) < 100
    assert forked("validation goes on", "last") == 0
    lines = said()
    assert lines[:4] == ["ended 0 30", "ended 1 30", "from 0 preempted.ckpt", "from 1 preempted.ckpt"]
    assert len(lines) == 4 + 2 * 3 * 30  # the interrupted one, and those of the two other epochs


def test_sigterm_in_validation_in_one_process(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Model(Net):
        def __init__(self, kill: bool) -> None:
            super().__init__()
            self.kill, self.validated = kill, 0

        def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.validated += 1
            if self.kill and batch_idx == 2:  # in the first; a second would be known to be short
                os.kill(os.getpid(), signal.SIGTERM)
            self.log("val", self.loss(batch) + torch.rand(()))

    def fit(kill: bool, folder: str, ckpt_path: str | None = None) -> tuple[L.Trainer, Model]:
        L.seed_everything(1, verbose=False)
        model, run = Model(kill), trainer(tmp_path / folder, max_epochs=3, enable_checkpointing=True)
        run.fit(model, loader(8, shuffle=True), loader(40), ckpt_path=ckpt_path)
        return run, model

    whole, expected = fit(False, "whole")
    with pytest.raises(SystemExit) as ended:
        fit(True, "killed")
    assert ended.value.code == 143
    caplog.clear()
    run, model = fit(False, "killed", "last")
    assert "preempted.ckpt" in caplog.text
    assert model.validated == 2 + 3 * 20
    assert run.callback_metrics == whole.callback_metrics
    assert torch.equal(model.layer.weight, expected.layer.weight)


def communicate(process: subprocess.Popen[str]) -> tuple[str, str]:
    """What it says to its end; one that hangs is ended, and says where, if faulthandler is on."""
    try:
        return process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)
        return process.communicate()


@pytest.mark.parametrize("to", [pytest.param("waiting", marks=pytest.mark.faults), "all"])
def test_sigterm_ends_a_run_that_is_stuck_and_says_where_each_rank_was(to: str) -> None:
    process = start("stuck", TREADLE_SIGTERM_GRACE="2")
    wait_until(lambda: Path("stuck").exists() and Path("waiting").exists())
    if to == "all":
        os.killpg(process.pid, signal.SIGTERM)
    else:
        process.terminate()
    _, stderr = process.communicate(timeout=2 + 10)
    assert process.returncode == 143, stderr
    assert not session(process.pid)
    assert stderr.count("SIGTERM came, and the batch did not end within 2 s") == 1
    assert "threading.Event().wait(60)" in stderr[stderr.index("Where each rank was:") :]
    assert "Traceback" not in stderr
    assert torch.load(Path("checkpoints") / "last.ckpt", weights_only=True)["global_step"] == 5
    assert not (Path("checkpoints") / "preempted.ckpt").exists()


def test_a_save_that_sigkill_cuts_off_leaves_the_last_good_checkpoint() -> None:
    process = start("killed")
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, stderr
    assert torch.load(Path("checkpoints") / "last.ckpt", weights_only=True)["global_step"] == 5
    if (preempted := Path("checkpoints") / "preempted.ckpt").exists():  # whole, or not at all
        torch.load(preempted, weights_only=True)


def test_slurms_announcement_of_the_end_saves_and_ends_all_with_143() -> None:
    port, more = find_free_port(), {"PYTHONFAULTHANDLER": "1", "PATH": install_scontrol(Path("bin").absolute())}
    ranks = [start("announce", **task(rank, 2, port=port), **more) for rank in (0, 1)]
    ends = [communicate(process) for process in ranks]
    assert [process.returncode for process in ranks] == [143, 143], ends
    assert Path("bin/asked").read_text() == "requeue 4711\n"
    saved = torch.load("hpc_ckpt_1.ckpt", weights_only=True)
    assert said() == [f"exception {rank} {saved['global_step']} SIGTERMException" for rank in (0, 1)]
    assert not any("Traceback" in stderr for _, stderr in ends)
