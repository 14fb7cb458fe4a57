"""Two ranks, and one of them is asked to stop: both stop after the same batch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.processes import session, wait_until
from tests.trainer.models import Net, loader, trainer
from torch import Tensor

import treadle as L
from treadle_fabric import find_free_port

SCRIPT = r"""
import os, signal, sys, threading, time
from pathlib import Path
import torch
import treadle as L
from torch.utils.data import DataLoader, TensorDataset

mode, ckpt_path = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None

class Model(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 2)
        if mode == "stuck":
            self.layer.bias.register_hook(lambda grad: Path("waiting").touch() if self.global_step == 5 else None)

    def training_step(self, batch, batch_idx):
        if self.global_rank == 1 and self.global_step == 5 and mode == "stop":
            self.trainer.should_stop = True
        if self.global_rank == 1 and self.global_step == 5 and mode in ("term", "term of a fork"):
            os.kill(os.getpid(), signal.SIGTERM)
        if self.global_rank == 1 and self.global_step == 5 and mode == "term of the parent of forks":
            os.kill(os.getppid(), signal.SIGTERM)
        if self.global_rank == 1 and self.global_step == 5 and mode == "announce":
            os.kill(os.getpid(), signal.SIGUSR1)
        if self.global_rank == 1 and self.global_step == 5 and mode == "stuck":
            Path("stuck").touch()
            threading.Event().wait(60)  # the other waits for the gradients
        if self.global_step == 5 and mode == "killed":
            os.kill(os.getpid(), signal.SIGTERM)
        if mode == "everybody" and self.global_step == 5:
            self.trainer.should_stop = True
        return self.layer(batch[0]).square().mean()

    def validation_step(self, batch, batch_idx):
        if mode == "validation":
            if self.global_rank == 1 and batch_idx == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.02)  # 300 of them are long beside the 0.2 s after which the other rank hears of it
        self.log("val", self.layer(batch[0]).square().mean())
        if batch_idx % 10 == 0:
            os.write(1, f"validated {self.global_rank} {batch_idx}\n".encode())

    def on_save_checkpoint(self, checkpoint):
        if mode == "killed" and self.global_step == 6:
            checkpoint["large"] = torch.zeros(50_000_000)
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGKILL)).start()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

class Ending(L.Callback):
    def on_train_end(self, trainer, pl_module):
        os.write(1, f"ended {trainer.global_rank} {trainer.global_step}\n".encode())  # whole, whoever else writes

    def on_exception(self, trainer, pl_module, exception):
        if mode in ("term", "announce") and trainer.global_rank == 1:
            time.sleep(3)  # longer than the 2 s that a rank that is stuck would be left to live
        os.write(1, f"exception {trainer.global_rank} {trainer.global_step} {type(exception).__name__}\n".encode())

torch.manual_seed(0)
trainer = L.Trainer(
    strategy="ddp_fork" if "fork" in mode else "auto",
    accelerator="cpu", devices=1 if mode == "killed" else 2, max_epochs=3, logger=False, enable_progress_bar=False,
    enable_model_summary=False, num_sanity_val_steps=0,
    callbacks=[Ending(), L.callbacks.ModelCheckpoint(every_n_train_steps=5, save_last=True)],
)
data = TensorDataset(torch.randn(80, 4))
val = DataLoader(TensorDataset(torch.randn(1200, 4)), 2) if mode.startswith("validation") else None
trainer.fit(Model(), DataLoader(data, 4), val, ckpt_path=ckpt_path)
"""


def launch(*arguments: str) -> tuple[int, list[str], str, list[str]]:
    """Exit status, how each rank ended, what was said, and which batches were validated."""
    path = Path("victim.py")
    path.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(path), *arguments],
        capture_output=True,
        text=True,
        timeout=90,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    lines = sorted(line for line in done.stdout.splitlines() if line.split()[0] in ("ended", "exception"))
    validated = [line for line in done.stdout.splitlines() if line.startswith("validated")]
    return done.returncode, lines, done.stderr, validated


@pytest.mark.parametrize("mode", ["stop", "everybody"])
def test_a_stop_on_one_rank_stops_all_after_the_same_batch(mode: str) -> None:
    status, lines, _, _ = launch(mode)
    assert status == 0
    steps = {line.split()[2] for line in lines}
    assert [line.split()[:2] for line in lines] == [["ended", "0"], ["ended", "1"]]
    assert len(steps) == 1
    assert steps == {"6"} if mode == "everybody" else int(steps.pop()) in (6, 7)


def test_sigterm_to_one_rank_saves_and_ends_all_with_143_and_the_run_goes_on_from_there() -> None:
    status, lines, stderr, _ = launch("term")
    assert status == 143, stderr
    assert {line.split()[3] for line in lines} == {"SIGTERMException"}
    steps = {int(line.split()[2]) for line in lines}
    assert len(lines) == 2
    assert len(steps) == 1
    assert "Traceback" not in stderr
    saved = torch.load(Path("checkpoints") / "preempted.ckpt", weights_only=True)
    assert saved["global_step"] == steps.pop()
    status, lines, stderr, _ = launch("none", "last")
    assert status == 0, stderr
    assert "preempted.ckpt" in stderr
    assert lines == ["ended 0 30", "ended 1 30"]


@pytest.mark.parametrize("mode", ["term of a fork", "term of the parent of forks"])
def test_sigterm_to_forked_processes_or_to_the_one_that_waits_for_them(mode: str) -> None:
    status, lines, stderr, _ = launch(mode)
    assert status == 143, stderr
    assert len({line.split()[2] for line in lines}) == 1 and len(lines) == 2
    assert "Traceback" not in stderr
    saved = torch.load(Path("checkpoints") / "preempted.ckpt", weights_only=True)
    assert saved["global_step"] == int(lines[0].split()[2])


def test_sigterm_in_a_long_validation_ends_it_on_all_ranks_and_it_begins_anew() -> None:
    status, lines, stderr, validated = launch("validation")
    assert status == 143, stderr
    assert [line.split()[:3] for line in lines] == [["exception", "0", "10"], ["exception", "1", "10"]]
    batches = [int(line.split()[2]) for line in validated]  # of the 300 that each rank has
    assert max(batches) < 100
    status, lines, stderr, validated = launch("validation goes on", "last")
    assert status == 0, stderr
    assert lines == ["ended 0 30", "ended 1 30"]
    assert len(validated) == 2 * 3 * 30  # the interrupted one, and those of the two other epochs


def test_sigterm_in_validation_in_one_process(tmp_path: Path) -> None:
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
    run, model = fit(False, "killed", "last")
    assert model.validated == 2 + 3 * 20
    assert run.callback_metrics == whole.callback_metrics
    assert torch.equal(model.layer.weight, expected.layer.weight)


def start(mode: str, **environ: str) -> subprocess.Popen[str]:
    path = Path("victim.py")
    path.write_text(SCRIPT)
    return subprocess.Popen(
        [sys.executable, str(path), mode],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environ},
        start_new_session=True,
    )


def communicate(process: subprocess.Popen[str]) -> tuple[str, str]:
    """What it says to its end; one that hangs is ended, and says where, if faulthandler is on."""
    try:
        return process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)
        return process.communicate()


@pytest.mark.parametrize("to", ["waiting", "all"])
def test_sigterm_ends_a_run_that_is_stuck_and_says_where_each_rank_was(to: str) -> None:
    process = start("stuck", TREADLE_SIGTERM_GRACE="2")
    wait_until(lambda: Path("stuck").exists() and Path("waiting").exists())
    if to == "all":
        os.killpg(process.pid, signal.SIGTERM)
    else:
        process.terminate()
    stdout, stderr = process.communicate(timeout=2 + 10)
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
    job = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_NNODES": "1"}
    job |= {"SLURM_NODEID": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_free_port())}
    job |= {"PYTHONFAULTHANDLER": "1"}
    ranks = [start("announce", **job, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank)) for rank in (0, 1)]
    ends = [communicate(process) for process in ranks]
    assert [process.returncode for process in ranks] == [143, 143], ends
    saved = torch.load(Path("checkpoints") / "preempted.ckpt", weights_only=True)
    for stdout, stderr in ends:
        assert f" {saved['global_step']} SIGTERMException" in stdout
        assert "Traceback" not in stderr
