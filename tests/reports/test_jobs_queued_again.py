"""A SLURM job ended, and somebody had to queue it again; or it began anew, or went on from another job's checkpoint.

Tests of ``treadle_fabric.environments.slurm_job``, ``treadle.checkpoint.find``, ``treadle.trainer.runner``.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.processes import importing_tests, run_in_ranks, wait_until
from tests.slurm import install_scontrol, task
from tests.trainer.models import loader
from torch import Tensor

import treadle as L
from treadle.callbacks import ModelCheckpoint
from treadle.checkpoint.find import claim_requeue_path, release_requeue_path
from treadle.loggers import CSVLogger
from treadle.trainer import runner
from treadle_fabric import RequeueError, find_free_port
from treadle_fabric.environments import SLURMEnvironment, detect_environment, requeue
from treadle_fabric.environments import slurm_job as job_module

pytestmark = pytest.mark.timeout(90)


class Net(L.LightningModule):
    """Its rank ``rank`` sends itself ``number`` in the step after ``at``."""

    def __init__(self, at: int | None = None, number: int = signal.SIGUSR1, rank: int = 0) -> None:
        super().__init__()
        self.at, self.number, self.rank = at, number, rank
        self.layer = torch.nn.Linear(4, 2)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self.at == self.global_step and self.global_rank == self.rank:
            os.kill(os.getpid(), self.number)
        loss = self.layer(batch / 20).square().mean() + torch.rand(())
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)


class Watch(L.Callback):
    """Writes a line for each fit: where it began and ended, and from which checkpoint."""

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.began = trainer.global_step

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        if trainer.global_rank == 1:  # slower than rank 0, which must not ask SLURM meanwhile
            wait_until(Path("closing 0").exists)
            with suppress(TimeoutError):
                wait_until(Path("bin/asked").exists, timeout=0.5)
        Path(f"closing {trainer.global_rank}").touch()

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            weights = [float(w) for p in pl_module.parameters() for w in p.detach().flatten()]
            start = Path(trainer.ckpt_path).name if trainer.ckpt_path is not None else None
            with Path("fits").open("a") as file:
                file.write(f"{start} {self.began} {trainer.global_step} {weights}\n")


def train(net: Net, devices: int = 1, **arguments: Any) -> int:
    """Train three epochs of six steps; the exit status of a program that does so."""
    arguments = dict(arguments)
    ckpt_path, root = arguments.pop("ckpt_path", None), arguments.pop("root", ".")
    torch.manual_seed(3)
    net.layer.reset_parameters()
    saver = ModelCheckpoint(every_n_train_steps=6, save_last=True)
    trainer = L.Trainer(
        accelerator="cpu", devices=devices, default_root_dir=root, enable_progress_bar=False,
        enable_model_summary=False, log_every_n_steps=1, callbacks=[Watch(), saver],
        **{"logger": False, "max_epochs": 3, **arguments},
    )  # fmt: skip
    try:
        trainer.fit(net, loader(12 * devices), ckpt_path=ckpt_path)
    except SystemExit as end:
        return int(str(end.code))
    return 0


def fits() -> list[list[str]]:
    """What ``Watch`` wrote since it was asked last: checkpoint, first and last step, weights."""
    lines = Path("fits").read_text().splitlines()
    Path("fits").unlink()
    return [line.split(" ", 3) for line in lines]


def asked() -> list[str]:
    """What ``scontrol`` was asked."""
    file = Path("bin", "asked")
    return file.read_text().splitlines() if file.exists() else []


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """This process is the only task of job 4711."""
    for name, value in task().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", install_scontrol(Path("bin").absolute()))
    return monkeypatch


def train_as_task(port: int, at: int | None, expected: int) -> None:
    rank = int(os.environ["LOCAL_RANK"])
    os.environ.update(task(rank, 2, port=port, SLURM_ARRAY_JOB_ID="88", SLURM_ARRAY_TASK_ID="3"))
    assert train(Net(at, rank=1), devices=2, logger=CSVLogger(".")) == expected


def test_two_tasks_of_an_array_save_together_then_rank_0_asks_once_and_both_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The signal comes to rank 1 only. When SLURM is asked, all is written and closed, for SLURM kills from then on."""
    here = Path("bin").absolute()
    monkeypatch.setenv(
        "PATH", install_scontrol(here, 'ls -A "$here/.." > "$here/there"; cat "$here"/../*/*/metrics.csv')
    )
    run_in_ranks(train_as_task, find_free_port(), None, 0)
    (whole,) = fits()
    shutil.rmtree("lightning_logs")
    run_in_ranks(train_as_task, find_free_port(), 7, 143)
    assert asked() == ["requeue 88_3"]
    there = (here / "there").read_text().split("\n")
    assert {"closing 0", "closing 1", "hpc_ckpt_1.ckpt"} <= set(there)
    assert not [name for name in there if "claim" in name]
    run_in_ranks(train_as_task, find_free_port(), None, 0)
    ((start, began, last, weights),) = fits()
    assert (start, last) == ("hpc_ckpt_1.ckpt", "18")
    assert int(began) in (8, 9)  # the rank that had no signal may be a step ahead
    assert weights == whole[3]
    assert asked() == ["requeue 88_3"]
    assert os.listdir("lightning_logs") == ["version_0"]  # the log goes on


@pytest.mark.faults
def test_a_real_job_is_killed_by_slurm_started_again_and_goes_on() -> None:
    """SLURM kills the task while ``scontrol`` runs, and starts the script again with the job's number."""
    path = install_scontrol(Path("bin").absolute(), "kill -9 $PPID")
    program = "from tests.reports.test_jobs_queued_again import Net, train; import sys; sys.exit(train(Net({})))"
    environ = importing_tests() | task() | {"PATH": path}
    first = subprocess.run([sys.executable, "-c", program.format(4)], env=environ, timeout=60)
    assert first.returncode == -signal.SIGKILL
    again = subprocess.run([sys.executable, "-c", program.format(None)], env=environ | {"SLURM_RESTART_COUNT": "1"})
    assert again.returncode == 0
    assert [fit[:3] for fit in fits()] == [["hpc_ckpt_1.ckpt", "5", "18"]]


@pytest.mark.parametrize(
    ("then", "says"),
    [
        ("echo 'slurm_requeue error: Requested operation is presently disabled' >&2; exit 1", "presently disabled"),
        ("exit 3", "exit status 3, 'no message'"),
        (None, "scontrol is not on the PATH"),
    ],
)
def test_where_scontrol_fails_the_checkpoint_stays_and_the_message_says_what_to_do(
    job: pytest.MonkeyPatch, then: str | None, says: str
) -> None:
    job.setattr(job_module, "_PAUSE_S", 0.0)
    if then is None:
        job.setenv("PATH", "/nowhere")
    else:
        install_scontrol(Path("bin"), then)
    with pytest.warns(
        UserWarning, match=f"SLURM job 4711 was not queued again.*{says}.*By hand: `scontrol requeue 4711`"
    ):
        assert train(Net(2)) == 143
    assert len(asked()) == (0 if then is None else 3)
    assert torch.load("hpc_ckpt_1.ckpt", weights_only=True)["global_step"] == 3
    assert train(Net()) == 0
    assert fits()[0][:3] == ["hpc_ckpt_1.ckpt", "3", "18"]


def test_a_busy_controller_is_asked_again(job: pytest.MonkeyPatch) -> None:
    job.setattr(job_module, "_PAUSE_S", 0.0)
    install_scontrol(Path("bin"), 'test $(wc -l < "$here/asked") -ge 2')
    requeue("4711")
    assert asked() == ["requeue 4711"] * 2
    install_scontrol(Path("bin"), "exit 1")
    with pytest.raises(RequeueError, match="failed 3 times"):
        requeue("4711")


def test_scancel_and_a_program_without_requeue_do_not_ask(job: pytest.MonkeyPatch) -> None:
    assert train(Net(2, signal.SIGTERM)) == 143
    assert (Path("checkpoints") / "preempted.ckpt").exists()
    assert detect_environment().job_to_requeue() == "4711"
    other = SLURMEnvironment(auto_requeue=False)
    assert (other.job_to_requeue(), other.announcing_signal()) == ("", 0)
    job.setenv("SLURM_JOB_NAME", "interactive")
    assert detect_environment().job_to_requeue() == ""
    assert asked() == []
    assert not list(Path().glob("hpc_ckpt*"))


def test_slurm_s_own_requeue_after_sigterm_goes_on_too(job: pytest.MonkeyPatch) -> None:
    """``PreemptMode=REQUEUE`` sends SIGTERM, and queues the job again itself."""
    assert train(Net(4, signal.SIGTERM), ckpt_path=None) == 143
    assert train(Net()) == 0
    assert fits()[0][:3] == ["preempted.ckpt", "5", "18"]


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGUSR2, {}), (signal.SIGTERM, {})], ids=["USR2", "TERM"])
def test_another_signal(job: pytest.MonkeyPatch, number: signal.Signals, kind: Any) -> None:
    assert train(Net(2, number), plugins=SLURMEnvironment(requeue_signal=number)) == 143
    assert asked() == ["requeue 4711"]


@pytest.mark.parametrize("started_by", ["the batch script", "torchrun"])
def test_processes_that_srun_did_not_start_are_in_a_job_too(job: pytest.MonkeyPatch, started_by: str) -> None:
    job.delenv("SLURM_STEP_ID")
    if started_by == "torchrun":
        ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        for name, value in {"TORCHELASTIC_RUN_ID": "r", "MASTER_PORT": str(find_free_port()), **ranks}.items():
            job.setenv(name, value)
    assert train(Net(2)) == 143
    assert asked() == ["requeue 4711"]


def test_only_the_same_fit_of_the_same_job_goes_on_by_itself(job: pytest.MonkeyPatch) -> None:
    def run(second: int | None = None, **arguments: Any) -> list[list[str]]:
        run_in_ranks(train_folds, second, arguments, devices=1)
        return [fit[:3] for fit in fits()]

    assert run(2) == [["None", "0", "18"]]
    assert asked() == ["requeue 4711"]
    assert run() == [["None", "0", "18"], ["hpc_ckpt_1.ckpt", "3", "18"]]
    shutil.copy("checkpoints/last.ckpt", "pretrained.ckpt")
    assert run(ckpt_path="pretrained.ckpt")[1] == ["hpc_ckpt_1.ckpt", "3", "18"]  # not from its beginning again
    assert run(ckpt_path="last", max_epochs=4)[1][0].startswith("last")  # which is newer now
    job.setenv("SLURM_JOB_ID", "4712")
    assert run() == [["None", "0", "18"]] * 2
    assert run(ckpt_path="hpc")[0] == ["hpc_ckpt_1.ckpt", "3", "18"]


def test_a_fit_that_ctrl_c_ended_is_over_for_the_job_too(job: pytest.MonkeyPatch) -> None:
    run_in_ranks(train_folds, 2, {}, Interrupted(), devices=1)
    assert asked() == ["requeue 4711"]
    run_in_ranks(train_folds, None, {}, devices=1)
    assert [fit[:3] for fit in fits()] == [["None", "0", "18"], ["hpc_ckpt_1.ckpt", "3", "18"]]


class Interrupted(Net):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        raise KeyboardInterrupt


def train_folds(second: int | None, arguments: dict[str, Any], first: Net | None = None) -> None:
    """A script with two fits."""
    runner._fits_ended.count = 0  # in a new process
    assert train(first or Net(), **arguments) == (0 if first is None else 1)
    assert train(Net(second), **arguments) == (0 if second is None else 143)


def test_a_damaged_one_is_passed_over(job: pytest.MonkeyPatch) -> None:
    assert train(Net(2)) == 143
    assert train(Net(5)) == 143
    assert asked() == ["requeue 4711"] * 2
    content = bytearray(Path("hpc_ckpt_2.ckpt").read_bytes())
    content[len(content) // 2] ^= 255
    Path("hpc_ckpt_2.ckpt").write_bytes(content)
    with pytest.warns(UserWarning, match="hpc_ckpt_2.ckpt"):
        assert train(Net()) == 0
    assert fits()[0][:2] == ["hpc_ckpt_1.ckpt", "3"]


def test_a_checkpoint_that_could_not_be_written_queues_nothing_again(job: pytest.MonkeyPatch) -> None:
    """The job would begin anew, and again, and again."""
    Path("root").write_text("a file where the folder should be")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert train(Net(2), root="root") == 143
    assert "SLURM job 4711 is not queued again" in str(told[-1].message)
    assert asked() == []


def test_two_jobs_that_share_a_folder_save_under_different_names() -> None:
    first, second = claim_requeue_path("runs"), claim_requeue_path("runs")
    assert [Path(path).name for path in (first, second)] == ["hpc_ckpt_1.ckpt", "hpc_ckpt_2.ckpt"]
    Path(first).touch()
    for path in (first, second):
        release_requeue_path(path)
    assert os.listdir("runs") == ["hpc_ckpt_1.ckpt"]
