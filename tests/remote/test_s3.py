"""Checkpoints on an S3 server that is reached by HTTP: files and folders, of one process and of two."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint
from tests.fabric.checkpoint.fetched import load
from tests.processes import run_in_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import treadle as L
from treadle.callbacks import ModelCheckpoint
from treadle.checkpoint.find import find_checkpoint
from treadle_fabric import (
    AsyncCheckpointIO,
    CheckpointError,
    CheckpointIO,
    DistributedCheckpointIO,
    Fabric,
    ProcessFailedError,
    TorchCheckpointIO,
)
from treadle_fabric.checkpoint import PerRank, lies_at, remote_checkpoints_in
from treadle_fabric.checkpoint.distributed import saving

pytestmark = pytest.mark.remote
SERVER = """
import logging, sys
from moto.server import ThreadedMotoServer
logging.getLogger("werkzeug").setLevel(logging.ERROR)
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""
BIG = 3_000_000  # values, 12 MB: an upload in several parts


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        port = _port(process)
        yield f"http://127.0.0.1:{port}"
        process.stdin.close()


def _port(process: Any) -> int:
    while not (line := process.stdout.readline().strip()).isdigit():
        assert process.poll() is None, line
    return int(line)


@pytest.fixture(autouse=True)
def bucket(server: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    name = f"bucket{abs(hash(request.node.name))}"
    s3().mkdir(name)
    return f"s3://{name}"


def s3() -> Any:
    import s3fs

    return s3fs.S3FileSystem(skip_instance_cache=True)


def keys(url: str) -> list[str]:
    where = url.removeprefix("s3://")
    return sorted(path.removeprefix(where).lstrip("/") for path in s3().find(where))


def state(fabric: Fabric, step: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (fabric.world_size,))
    return {
        "step": step,
        "rows": distribute_tensor(torch.full((1000, BIG // 1000), float(step)), mesh, [Shard(0)]),
        "w": torch.full((100_000,), float(step)),
        "own": PerRank(fabric.global_rank),
    }


def save_with_two(url: str, in_background: bool) -> None:
    io: CheckpointIO = AsyncCheckpointIO(DistributedCheckpointIO()) if in_background else DistributedCheckpointIO()
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp", plugins=io)
    fabric.launch()
    for step in (1, 2, 3):
        fabric.save(f"{url}/last.ckpt", state(fabric, step))
        fabric.save(f"{url}/step={step}.ckpt", {"step": step})
    assert fabric.load(f"{url}/last.ckpt")["step"] == 3
    io.remove_checkpoint(f"{url}/step=1.ckpt") if fabric.is_global_zero else None
    fabric.strategy.teardown()


@pytest.mark.parametrize("in_background", [False, True], ids=["at once", "in the background"])
def test_two_ranks_save_a_folder(in_background: bool, bucket: str, tmp_path: Path) -> None:
    run_in_ranks(save_with_two, bucket, in_background)
    found = load(f"{bucket}/last.ckpt")
    assert found["step"] == 3 and found["rows"].eq(3).all() and found["rows"].shape == (1000, BIG // 1000)
    assert found["own"] == [0, 1]
    names = [name.rpartition("/")[2] for name in keys(f"{bucket}/last.ckpt")]
    assert sorted(names) == [  # nothing is left of those before
        ".metadata", "__0_0.distcp", "__1_0.distcp", "manifest.json", "meta.pt", "rank_0.pt", "rank_1.pt",
    ]  # fmt: skip
    listed = [url.removeprefix(f"{bucket}/") for url, _ in remote_checkpoints_in(bucket)]
    assert sorted(listed) == ["last.ckpt", "step=2.ckpt", "step=3.ckpt"]


def save_files_with_two(url: str, in_background: bool) -> None:
    io: CheckpointIO = AsyncCheckpointIO() if in_background else TorchCheckpointIO()
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp", plugins=io)
    fabric.launch()
    for step in (1, 2):
        fabric.save(f"{url}/a.ckpt", {"step": step, "w": torch.full((100_000,), float(step))})
    found = fabric.load(f"{url}/a.ckpt")
    assert found["step"] == 2 and found["w"].eq(2).all()
    fabric.strategy.teardown()


@pytest.mark.parametrize("in_background", [False, True], ids=["at once", "in the background"])
def test_two_ranks_save_a_file_and_resume(in_background: bool, bucket: str) -> None:
    run_in_ranks(save_files_with_two, bucket, in_background)
    assert keys(bucket) == ["a.ckpt"]


def die(fabric: Fabric, url: str, dying: int) -> None:
    DistributedCheckpointIO().save_checkpoint(state(fabric, 1), url)
    io = AsyncCheckpointIO(DistributedCheckpointIO())
    if fabric.global_rank == dying:
        on_host, seen = saving.on_host, iter(range(1))

        def dies(values: Tensor) -> Tensor:
            if next(seen, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return on_host(values)

        saving.on_host = dies
    later = {**state(fabric, 2), "more": state(fabric, 2)["rows"]}
    io.save_checkpoint(later, url)
    io.wait()


@pytest.mark.parametrize("dying", [0, 1])
def test_a_rank_is_killed_while_it_uploads(dying: int, bucket: str, tmp_path: Path) -> None:
    url = f"{bucket}/a.ckpt"
    with pytest.raises(ProcessFailedError):
        Fabric(accelerator="cpu", devices=2, strategy="ddp_fork").launch(die, url, dying)
    assert load(url)["rows"].eq(1).all()
    run_in_ranks(save_with_two, bucket, False)
    assert load(f"{bucket}/last.ckpt")["step"] == 3


def test_a_file_and_a_folder_replace_one_another(bucket: str, tmp_path: Path) -> None:
    url = f"{bucket}/a.ckpt"
    TorchCheckpointIO().save_checkpoint({"step": 1}, url)
    DistributedCheckpointIO().save_checkpoint({"step": 2}, url)
    assert load(url)["step"] == 2 and "" not in keys(url)
    TorchCheckpointIO().save_checkpoint({"step": 3}, url)
    assert TorchCheckpointIO().load_checkpoint(url)["step"] == 3 and keys(bucket) == ["a.ckpt"]
    DistributedCheckpointIO().remove_checkpoint(url)
    assert keys(bucket) == [] and not lies_at(url)
    s3().pipe_file(f"{url}/notes.txt", b"")
    with pytest.raises(CheckpointError, match=r"notes\.txt.*nothing in it was"):
        DistributedCheckpointIO().save_checkpoint({"step": 2}, url)


class Model(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(100_000))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.log("loss", -float(self.global_step))
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def train(url: str, in_background: bool) -> None:
    io: CheckpointIO = AsyncCheckpointIO(DistributedCheckpointIO()) if in_background else DistributedCheckpointIO()
    saver = ModelCheckpoint(url, "{step}", "loss", save_top_k=2, save_last=True, every_n_train_steps=1)
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_steps=6, logger=False, callbacks=saver, plugins=io,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Model(), torch.utils.data.DataLoader(torch.zeros(100, 1)))
    assert find_checkpoint("last", [saver], [], url, fitting=True) == f"{url}/last.ckpt"
    saver = ModelCheckpoint(url, "{step}", "loss", save_top_k=2, save_last=True, every_n_train_steps=1)
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_steps=7, logger=False, callbacks=saver,
        enable_progress_bar=False, enable_model_summary=False, plugins=DistributedCheckpointIO(),
    )  # fmt: skip
    model = Model()
    trainer.fit(model, torch.utils.data.DataLoader(torch.zeros(100, 1)), ckpt_path="last")
    assert trainer.global_step == 7 and bool(model.weight.eq(-7).all())


@pytest.mark.parametrize("in_background", [False, True], ids=["at once", "in the background"])
def test_the_best_and_the_last_are_kept(in_background: bool, bucket: str, tmp_path: Path) -> None:
    run_in_ranks(train, bucket, in_background)
    listed = [url.removeprefix(f"{bucket}/") for url, _ in remote_checkpoints_in(bucket)]
    assert sorted(listed) == ["last.ckpt", "step=6.ckpt", "step=7.ckpt"]
    found = load(f"{bucket}/last.ckpt")
    assert found["global_step"] == 7 and found["state_dict"]["weight"].eq(-7).all()
