"""Ranks that wait while one works: in prepare_data, in a save, in rank_zero_first, in on_rank_zero.

The timeout of collectives ends none of them; where every rank waits, or the one that works fails, all end.

Tests of ``treadle_fabric.coordination.hosts``, ``treadle_fabric.coordination.on_rank_zero``,
``treadle.trainer.session``.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.processes import run_in_ranks, thread_runs, wait_until

import treadle as L
from treadle_fabric import DDPStrategy, Fabric, TorchCheckpointIO, on_rank_zero
from treadle_fabric.coordination import patient_barrier, waits_in_vain
from treadle_fabric.failures.places import lost_peer

LIMIT = 2.0  # the timeout, in seconds
WORK = 2.5  # what a rank works, which is what is tested


class Slow(TorchCheckpointIO):
    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        time.sleep(WORK)
        super().save_checkpoint(*args, **kwargs)


def fabric_of_two(timeout: float = LIMIT, **kwargs: Any) -> Fabric:
    strategy = DDPStrategy(timeout=timedelta(seconds=timeout), **kwargs)
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
    fabric.launch()
    return fabric


def works(path: str) -> None:
    fabric = fabric_of_two(checkpoint_io=Slow())
    rank = fabric.global_rank
    for worker in (0, 1):
        with fabric.rank_zero_first():
            if rank == worker:
                time.sleep(WORK)
    assert on_rank_zero(fabric, lambda: (time.sleep(WORK), rank)[1], "could not sleep") == 0
    fabric.save(path, {"a": torch.ones(1)})
    assert fabric.load(path)["a"].item() == 1
    assert not waits_in_vain()


@pytest.mark.alone
def test_fabrics_ranks_wait_for_longer_than_the_timeout(tmp_path: Path) -> None:
    run_in_ranks(works, str(tmp_path / "a.ckpt"))


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def prepare_data(self) -> None:
        time.sleep(WORK)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.layer(batch).sum()

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.ones(8, 1))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trains(folder: str) -> None:
    strategy = DDPStrategy(timeout=timedelta(seconds=LIMIT), checkpoint_io=Slow())
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy=strategy, max_steps=2, logger=False,
                        default_root_dir=folder, enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(Module())
    assert trainer.global_step == 2 and list(Path(folder).rglob("*.ckpt"))


@pytest.mark.alone
def test_the_trainers_ranks_wait_for_longer_than_the_timeout(tmp_path: Path) -> None:
    run_in_ranks(trains, str(tmp_path))


def comes_late(method: str) -> None:
    fabric = fabric_of_two(timeout=0.5)
    if fabric.global_rank == 0:
        wait_until(Path("timed out").exists)
        return
    with pytest.raises(RuntimeError, match="Timed out waiting 500ms") as info:
        fabric.barrier() if method == "barrier" else fabric.broadcast(None)
    assert lost_peer(info.value)
    Path("timed out").touch()


@pytest.mark.parametrize("method", ["barrier", "broadcast"])
def test_other_waits_end_with_the_timeout(method: str) -> None:
    run_in_ranks(comes_late, method)


def waits_elsewhere() -> None:
    fabric = fabric_of_two(timeout=0.5)
    with pytest.raises(RuntimeError, match=r"timeout in (here|a wait for rank 0), after 500ms") as info:
        if fabric.global_rank == 0:
            patient_barrier("here")
        else:
            on_rank_zero(fabric, int, "did nothing")
    assert lost_peer(info.value)
    Path(f"told {fabric.global_rank}").touch()
    wait_until(Path(f"told {1 - fabric.global_rank}").exists)  # rank 0 holds the store


def test_ranks_that_all_wait_at_different_places_are_told() -> None:
    run_in_ranks(waits_elsewhere)


def is_interrupted(signum: int) -> None:
    fabric = fabric_of_two()
    if fabric.global_rank == 0:
        wait_until(Path("interrupted").exists)  # the other rank need not wait for this one
        return

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    def interrupt() -> None:
        wait_until(lambda: thread_runs("_is_done"))
        os.kill(os.getpid(), signum)

    signal.signal(signum, stop)
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        fabric.barrier()
    thread.join()
    assert waits_in_vain()
    Path("interrupted").touch()
    wait_until(lambda: not waits_in_vain())  # once the other rank is gone


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_rank_that_waits_runs_its_signal_handlers(signum: int) -> None:
    run_in_ranks(is_interrupted, signum)


def ends_early(how: str) -> None:
    fabric = fabric_of_two(timeout=60)
    if fabric.global_rank == 0:
        if how == "ends":
            return
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(RuntimeError, match="Connection|closed") as info:
        fabric.barrier()
    assert lost_peer(info.value)
    Path("learned").touch()


@pytest.mark.parametrize("how", ["ends", pytest.param("is killed", marks=pytest.mark.faults)])  # takes long
def test_a_rank_that_waits_learns_that_another_one_has_gone(how: str) -> None:
    with pytest.MonkeyPatch.context() if how == "ends" else pytest.raises(AssertionError, match="-9"):
        run_in_ranks(ends_early, how)
    assert Path("learned").exists()
