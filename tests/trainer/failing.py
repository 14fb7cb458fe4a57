"""A run of two ranks in which one fails in a chosen way at a chosen place, and what must come of that."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tests.processes import session

TIMEOUT_S = 3.0  # of the collectives, where one is skipped
ALLOWED_S = 10.0

HOWS = ("raise", "exit", "kill", "skip")
PLACES = ("fit", "validation", "data", "worker", "checkpoint", "setup")

SCRIPT = r"""
import os, signal, sys, time
from datetime import timedelta
from pathlib import Path
import torch
import torch.distributed as dist
import treadle as L
from torch.utils.data import DataLoader, Dataset
from treadle_fabric import DDPStrategy

how, where, failing, start = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]

def fail():
    Path("failed_at.new").write_text(str(time.time()))
    os.rename("failed_at.new", "failed_at")
    if how == "raise":
        raise ValueError("the loom is broken")
    if how == "exit":
        os._exit(3)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "end":
        sys.exit(0)
    while how != "go on":  # the others wait for this rank in a collective
        time.sleep(1)

def here(place, fabric):
    if place != where:
        return
    if fabric.global_rank == failing:
        fail()
    elif how in ("skip", "end", "go on"):
        fabric.barrier()

class Samples(Dataset):
    def __init__(self, place):
        self.place, self.rank = place, None
    def __len__(self):
        return 40
    def __getitem__(self, index):
        rank = int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))
        if self.place == where and index >= 16 and rank == failing:
            fail()
        return torch.ones(4) * index

class Model(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 2)
    def setup(self, stage):
        here("setup", self.trainer.fabric)
    def training_step(self, batch, batch_idx):
        if batch_idx == 3:
            here("fit", self.fabric)
        return self.layer(batch).square().mean()
    def validation_step(self, batch, batch_idx):
        here("validation", self.fabric)
        self.log("val", self.layer(batch).mean(), sync_dist=True)
    def on_save_checkpoint(self, checkpoint):
        here("checkpoint", self.fabric)
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)

class Strategy(DDPStrategy):
    def setup_environment(self):
        super().setup_environment()
        if how in ("skip", "go on", "end"):  # from here on: on a busy machine the processes alone need longer to come
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=TIMEOUT), None)

if __name__ == "__main__":
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy=Strategy(timeout=timedelta(seconds=60), start_method=start),
        logger=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, max_epochs=1,
        val_check_interval=4,
    )
    workers = 2 if where == "worker" else 0
    train = DataLoader(Samples("worker" if workers else "data"), 2, num_workers=workers)
    trainer.fit(Model(), train, DataLoader(Samples("none"), 4, num_workers=1 if where == "validation" else 0))
""".replace("TIMEOUT)", f"{TIMEOUT_S})")


@dataclass
class Result:
    """How a run ended."""

    status: int
    seconds: float
    """From the failure to the end of the last process."""
    out: str
    err: str
    orphans: list[str]
    """Processes that were still there when the time was over."""


def run(how: str, where: str, rank: int, start: str = "popen", *, launcher: tuple[str, ...] = ()) -> Result:
    """Run the script in the working directory; every process that it left behind is killed.

    Args:
        how: one of :data:`HOWS`.
        where: one of :data:`PLACES`.
        rank: the one that fails.
        start: the strategy's start method.
        launcher: arguments for Python in front of the script.
    """
    path = Path("failing.py")
    path.write_text(SCRIPT)
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "TREADLE"))}
    with open("out", "w") as out, open("err", "w") as err:
        process = subprocess.Popen(
            [sys.executable, *launcher, str(path), how, where, str(rank), start],
            env={**environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
    allowed = ALLOWED_S + (TIMEOUT_S if how == "skip" else 0)
    began = time.time()
    while (left := session(process.pid)) and time.time() < began + 90:
        process.poll()  # or it stays a zombie
        failed_at = float(Path("failed_at").read_text()) if Path("failed_at").exists() else None
        if failed_at is not None and time.time() > failed_at + allowed + 5:
            break
        time.sleep(0.02)
    ended = time.time()
    orphans = []
    for one in left:
        orphans.append(f"{one.pid} {' '.join(one.cmdline())}")
        one.send_signal(signal.SIGKILL)
    status = process.wait()
    text = Path("failed_at").read_text() if Path("failed_at").exists() else "nan"
    return Result(status, ended - float(text), Path("out").read_text(), Path("err").read_text(), orphans)


def check(result: Result, how: str, where: str, rank: int) -> None:
    """That all have ended in time, with an error, and that the failing rank is named first and once."""
    told = f"{how} in {where} on rank {rank}: {result}".replace("\\n", "\n")
    assert not result.orphans, told
    assert result.status != 0, told
    assert result.seconds <= ALLOWED_S + (TIMEOUT_S if how == "skip" else 0), told
    # torchrun has to say something of its own
    api = "torch/distributed/elastic/multiprocessing/api"
    err = "".join(line for line in result.err.splitlines(True) if api not in line)
    err = err.partition('Traceback (most recent call last):\n  File "<frozen runpy>"')[0]
    parts = ("Original Traceback", "direct cause of the following", "another exception occurred")
    tracebacks = err.count("Traceback (most recent call last)") - sum(err.count(part) for part in parts)
    other = 1 - rank
    if how == "raise" or (where == "worker" and how != "skip"):
        if how == "raise":
            assert err.count("ValueError: the loom is broken") == 1, told
        else:  # the loader says that the worker has gone, or that the connection to it has
            assert "DataLoader worker" in err or f"{os.sep}dataloader.py" in err, told
        assert "Where each rank was" not in err, told
        assert tracebacks == 1, told
        assert f"rank {rank} failed:" in err, told
        assert err.index(f"rank {rank} failed:") < err.index("Traceback"), told
    elif how in ("exit", "kill"):
        if api in result.err and "killed by signal: Terminated" in err:
            return  # torchrun's own signal reached a loader's worker of the other rank before anything else did
        assert tracebacks == 0, told
        if f"rank {rank} died and left" in err:  # torchrun's
            said = f"rank {rank} died and left no traceback"
        elif rank == 0:
            said = "rank 0, the launching process, died"
        else:
            said = f"rank {rank} " + ("ended with exit status 3" if how == "exit" else "was killed by SIGKILL")
        assert err.count(said) == 1, told
    else:
        assert tracebacks == 1, told
        assert "timeout of 3 s" in err, told
        assert "timedelta(" in err, told
        assert f"Rank {rank} did not take part" in err, told
        places = err[err.index("Where each rank was") :]
        assert f"rank {other}, in a collective:" in places, told
        if where != "worker":  # there it waits for the worker
            assert "in fail" in places[places.index(f"rank {rank}:") :], told
    if how != "skip":
        assert err.index("rank") == min(err.index("rank"), err.index(f"rank {rank}")), told
