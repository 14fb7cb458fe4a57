"""Fabric and the Trainer in workers that Ray Train starts, and starts again: `make test-ray`."""

from __future__ import annotations

import json
import os
import re
import runpy
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.processes import ROOT
from tests.trainer.models import Net, loader, trainer
from torch import Tensor

import treadle_fabric
from treadle import Callback
from treadle.callbacks import ModelCheckpoint, RayTrainReportCallback
from treadle_fabric import Fabric, MisconfigurationException, RayEnvironment

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300), pytest.mark.filterwarnings("default")]

EPOCHS, BATCHES = 3, 4  # on each of two ranks


class Noisy(Net):
    """Its losses tell the samples, their order, and the random state of each rank."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss = self.loss(batch + torch.rand_like(batch))
        self.log("train_loss", loss, sync_dist=True)
        return loss


class Losses(Callback):
    """Writes the loss of each step, exactly, and how often training began."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._write(trainer, {"began_at": trainer.global_step})

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        loss = trainer.callback_metrics["train_loss"]
        self._write(trainer, {"step": trainer.global_step, "loss": float(loss).hex()})

    def _write(self, trainer: Any, line: dict[str, Any]) -> None:
        with (self.folder / f"rank{trainer.global_rank}.jsonl").open("a") as file:
            print(json.dumps(line), file=file)


def written(folder: Path, rank: int = 0) -> tuple[dict[int, str], list[int]]:
    """The loss of each step, where it was made last, and the steps at which training began."""
    lines = [json.loads(line) for line in (folder / f"rank{rank}.jsonl").read_text().splitlines()]
    return (
        {line["step"]: line["loss"] for line in lines if "step" in line},
        [line["began_at"] for line in lines if "began_at" in line],
    )


class Killed(Callback):
    """Kills rank 1 in the middle of an epoch, once."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 7 and not self.flag.exists():
            import ray.train

            self.flag.touch()
            ray.train.get_all_reported_checkpoints()  # waits until Ray has taken them
            os.kill(os.getpid(), signal.SIGKILL)


def fit(folder: Path, *, kill: bool, strategy: str = "auto", resume: str = "report") -> None:
    """Train as the function of a worker does; on two ranks an epoch has four steps."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(7)
    report = RayTrainReportCallback({"loss": "val_loss"}, save_checkpoints=resume == "report")
    callbacks: list[Callback] = [Losses(folder), report]
    callbacks += [Killed(folder / "killed")] if kill else []
    if resume == "last":
        callbacks.append(ModelCheckpoint(folder / "checkpoints", every_n_train_steps=3, save_last=True))
    run = trainer(
        folder,
        accelerator="auto",
        devices="auto",
        strategy=strategy,
        max_epochs=EPOCHS,
        callbacks=callbacks,
        enable_checkpointing=resume == "last",
    )
    loaders = loader(4 * BATCHES, shuffle=True), loader()
    run.fit(Noisy(), *loaders, ckpt_path=report.ckpt_path if resume == "report" else "last")
    assert (run.world_size, run.num_nodes, run.strategy.num_processes) == (2, 1, 2)


def in_workers(function: Callable[[], None], folder: Path, kind: Any = None, failures: int = 0) -> Any:
    """Run a function in two workers of Ray Train."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    config = RunConfig(
        name="run", storage_path=str(folder / "ray"), failure_config=FailureConfig(max_failures=failures)
    )
    kind = TorchTrainer if kind is None else kind
    return kind(function, scaling_config=ScalingConfig(num_workers=2), run_config=config).fit()


def train_with_fabric(folder: Path) -> list[str]:
    """A loop without an argument for Fabric; returns the losses."""
    torch.manual_seed(7)
    fabric = Fabric(accelerator="auto")
    fabric.launch()
    net: Any = Net()
    net, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.01))
    losses = []
    for batch in fabric.setup_dataloaders(loader(16, batch_size=4 // fabric.world_size)):
        loss = net(batch / 10).square().mean()
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(f"{float(fabric.all_reduce(loss).detach()):.6f}")
    if fabric.is_global_zero:
        (folder / f"fabric{fabric.world_size}.json").write_text(json.dumps(losses))
    return losses


def everything_unbroken(folder: Path) -> None:
    environment: Any = Fabric().strategy.cluster_environment
    assert type(environment) is RayEnvironment
    assert torch.distributed.is_initialized(), "Ray's TorchTrainer made the group"
    train_with_fabric(folder)
    fit(folder / "ddp", kill=False)
    fit(folder / "fsdp", kill=False, strategy="fsdp")
    assert torch.distributed.is_initialized(), "what Ray made, Ray ends"


@pytest.fixture(scope="module")
def unbroken(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fabric's loop and runs of the Trainer in one group of workers, all after one another."""
    folder = tmp_path_factory.mktemp("unbroken")
    in_workers(partial(everything_unbroken, folder), folder)
    return folder


def test_workers_train_as_one_process_does(unbroken: Path, tmp_path: Path) -> None:
    expected = train_with_fabric(tmp_path)
    assert json.loads((unbroken / "fabric2.json").read_text()) == expected
    (ddp, _), (fsdp, _) = written(unbroken / "ddp"), written(unbroken / "fsdp")
    assert list(ddp) == list(range(1, EPOCHS * BATCHES + 1))
    assert [float.fromhex(x) for x in fsdp.values()] == pytest.approx([float.fromhex(x) for x in ddp.values()])


@pytest.mark.parametrize(("strategy", "resume", "begins"), [("ddp", "last", 6), ("fsdp", "report", 4)])
def test_a_killed_worker(unbroken: Path, tmp_path: Path, strategy: str, resume: str, begins: int) -> None:
    """Ray starts both workers again, and the losses are those of the run in which nobody died."""
    function = partial(fit, tmp_path / "run", kill=True, strategy=strategy, resume=resume)
    result = in_workers(function, tmp_path, failures=1)
    assert (tmp_path / "run" / "killed").exists()
    for rank in (0, 1):
        losses, began = written(tmp_path / "run", rank)
        assert losses == written(unbroken / strategy, rank)[0]
        assert began == [0, begins]
    if resume == "report":
        assert result.metrics["loss"] > 0 and Path(result.checkpoint.path, "checkpoint.ckpt").is_dir()


def test_the_example(cluster: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["ray_train.py"])
    runpy.run_path(str(ROOT / "examples/clusters/ray_train.py"), run_name="__main__")
    found = re.search(r"epoch 4, step 80: val_loss ([\d.]+)", capsys.readouterr().out)
    assert found is not None and float(found[1]) < 0.5  # from 0.69


class Wrong(Callback):
    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 2:
            raise ValueError("a wrong label in the batch")


def fit_wrong(folder: Path) -> None:
    assert not torch.distributed.is_initialized()
    run = trainer(folder, accelerator="auto", devices="auto", callbacks=Wrong())
    run.fit(Net(), loader())


def test_an_exception_in_one_worker(cluster: None, tmp_path: Path) -> None:
    """Without a group of Ray's: Treadle makes it. Ray and its user see what was raised, and nothing that followed."""
    from ray.train import WorkerGroupError
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    with pytest.raises(WorkerGroupError, match="ValueError: a wrong label in the batch") as caught:
        in_workers(partial(fit_wrong, tmp_path), tmp_path, kind=DataParallelTrainer)
    failures = caught.value.worker_failures
    assert "a wrong label in the batch" in str(failures[1])
    assert all("rank 1 failed first" in str(error) for rank, error in failures.items() if rank != 1)


def train_as_actor(rank: int, address: str, port: int, folder: Path) -> list[str]:
    environment = RayEnvironment(world_size=2, global_rank=rank, main_address=address, main_port=port)
    fabric = Fabric(accelerator="cpu", plugins=environment)
    fabric.launch()
    return [
        f"{fabric.global_rank} of {fabric.world_size}, {int(fabric.all_reduce(torch.tensor(rank), reduce_op='sum'))}"
    ]


def test_actors_of_ones_own(cluster: None, tmp_path: Path) -> None:
    import ray

    port = treadle_fabric.find_free_port()
    remote = ray.remote(max_calls=1)(train_as_actor)
    results = ray.get([remote.remote(rank, "127.0.0.1", port, tmp_path) for rank in (0, 1)])
    assert results == [["0 of 2, 1"], ["1 of 2, 1"]]


def test_outside_of_workers(cluster: None, tmp_path: Path) -> None:
    import ray.train  # noqa: F401  # as in the program that starts the workers

    assert not RayEnvironment.detect()
    assert RayTrainReportCallback().ckpt_path is None
    with pytest.raises(MisconfigurationException, match="no worker of Ray Train"):
        trainer(tmp_path, callbacks=RayTrainReportCallback()).fit(Net(), loader())
    with pytest.raises(MisconfigurationException, match="no worker of Ray Train"):
        Fabric(accelerator="cpu", devices=2, plugins=RayEnvironment())
    for wrong, said in (
        ({"world_size": 2, "global_rank": 0}, "needs main_address, main_port"),
        ({"main_port": 1}, "needs world_size, global_rank, main_address"),
        ({"world_size": 1, "global_rank": 1}, "numbered from 0"),
        ({"world_size": 0, "global_rank": 0}, "world_size"),
    ):
        with pytest.raises(MisconfigurationException, match=said):
            RayEnvironment(**wrong)
