"""Runs whose checkpoints are folders: kept, removed, linked, found again, resumed and looked at like files.

Tests of ``treadle_fabric.checkpoint.distributed_io``, ``treadle.cli.checkpoint``.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.trainer.models import loader, trainer
from torch import Tensor, nn

import treadle as L
from treadle.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from treadle.cli.main import main
from treadle_fabric import CheckpointCorruptError, DistributedCheckpointIO

pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty"),
]


class Wide(L.LightningModule):
    """Tensors large enough to be written one by one, and buffers that differ from rank to rank."""

    def __init__(self, width: int = 300) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layers = nn.Sequential(nn.Linear(4, width), nn.Dropout(0.1), nn.Linear(width, 40))
        self.register_buffer("seen", torch.zeros(10_000))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.seen += batch.sum() / 1000
        loss: Tensor = self.layers(batch / 10).square().mean()
        self.log("score", -float(self.global_step))
        return loss

    validation_step = test_step = training_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def fit(tmp_path: Path, saver: ModelCheckpoint | None = None, ckpt_path: Any = None, **kwargs: Any) -> L.Trainer:
    L.seed_everything(3)
    callbacks = [saver or ModelCheckpoint("c", "{step}", every_n_train_steps=1, save_top_k=-1), *kwargs.pop("more", [])]
    kwargs = {"plugins": DistributedCheckpointIO(), "max_epochs": 3, **kwargs}
    runs = trainer(tmp_path, enable_checkpointing=True, callbacks=callbacks, **kwargs)
    runs.fit(Wide(), loader(), ckpt_path=ckpt_path)  # 4 steps an epoch
    return runs


def names(folder: str = "c") -> list[str]:
    return sorted(p.name for p in Path(folder).iterdir())


@pytest.mark.parametrize("save_last", [True, "link"])
def test_the_best_and_the_last_are_kept_and_the_others_removed(save_last: Any, tmp_path: Path) -> None:
    saver = ModelCheckpoint("c", "{step}", "score", save_top_k=2, save_last=save_last)
    fit(tmp_path, saver)
    assert names() == ["last.ckpt", "step=12.ckpt", "step=8.ckpt"]
    assert all((Path("c") / name / "manifest.json").is_file() for name in names())
    assert Path("c/last.ckpt").is_symlink() == (save_last == "link")
    assert Path("c/last.ckpt/__0_0.distcp").samefile("c/step=12.ckpt/__0_0.distcp")
    assert Wide.load_from_checkpoint(saver.best_model_path).hparams["width"] == 300


def test_a_resumed_run_goes_on_to_the_last_bit(tmp_path: Path) -> None:
    full = fit(tmp_path, ModelCheckpoint("full", "{step}", every_n_train_steps=1, save_top_k=-1))
    for kind, plugins in (("folder", DistributedCheckpointIO()), ("file", None)):  # both read a folder
        saver = ModelCheckpoint(kind, "{step}", save_last=True, every_n_train_steps=1)
        resumed = fit(tmp_path, saver, "full/step=6.ckpt", plugins=plugins)
        for name, value in full.lightning_module.state_dict().items():
            assert torch.equal(value, resumed.lightning_module.state_dict()[name]), name
        assert os.path.isdir(saver.last_model_path) == (kind == "folder")
    results = full.test(Wide(), loader(), ckpt_path="best", verbose=False)
    assert results == full.test(Wide(), loader(), ckpt_path=Path("full/step=12.ckpt"), verbose=False)


def test_last_and_auto_resume_find_the_newest(tmp_path: Path) -> None:
    fit(tmp_path, ModelCheckpoint("c", "{step}", save_last=True, every_n_train_steps=1), max_epochs=1)
    saver = ModelCheckpoint("c", "{step}", save_last=True, every_n_train_steps=1)
    again = fit(tmp_path, saver, "last", max_epochs=2)
    assert again.ckpt_path == str(Path("c/last.ckpt").resolve()) and again.global_step == 8
    assert names() == ["last.ckpt", "step=8.ckpt"]
    shutil.rmtree("c")
    fit(tmp_path, max_epochs=2)
    (Path("c") / "step=8.ckpt" / "meta.pt").unlink()
    with pytest.warns(UserWarning, match=r"step=8\.ckpt.*missing"):
        found = fit(tmp_path, max_epochs=2, auto_resume=True)
    assert str(found.ckpt_path).endswith("step=7.ckpt")


def test_a_damaged_one_is_refused(tmp_path: Path) -> None:
    fit(tmp_path, max_epochs=1)
    file = Path("c/step=4.ckpt/__0_0.distcp")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    for load in (lambda: fit(tmp_path, ckpt_path="c/step=4.ckpt"), lambda: Wide.load_from_checkpoint("c/step=4.ckpt")):
        with pytest.raises(CheckpointCorruptError, match="__0_0.distcp"):
            load()


def test_one_of_an_exception_is_removed_by_a_run_that_ends_well(tmp_path: Path) -> None:
    class Raises(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fit(tmp_path, more=[OnExceptionCheckpoint("e"), Raises()])
    assert names("e") == ["on_exception.ckpt"] and os.path.isdir("e/on_exception.ckpt")
    fit(tmp_path, more=[OnExceptionCheckpoint("e")], max_epochs=1)
    assert names("e") == []


@pytest.mark.timeout(110)
def test_two_processes_save_and_one_goes_on(tmp_path: Path) -> None:
    L.seed_everything(3)
    two = trainer(
        tmp_path, devices=2, strategy="ddp_fork", enable_checkpointing=True, plugins=DistributedCheckpointIO(),
        callbacks=ModelCheckpoint("c", "{step}", "score", save_last=True, every_n_train_steps=1), max_epochs=2,
    )  # fmt: skip
    two.fit(Wide(), loader(16))
    assert names() == ["last.ckpt", "step=8.ckpt"]
    files = {p.name for p in Path("c/last.ckpt").iterdir()}
    parts = {"rank_0.pt", "rank_1.pt"}
    assert files == {".metadata", "__0_0.distcp", "__1_0.distcp", "manifest.json", "meta.pt"} | parts
    assert Path("c/last.ckpt/__1_0.distcp").stat().st_size > 1000
    saver = ModelCheckpoint("d", "{step}", "score", every_n_train_steps=1)
    with pytest.warns(UserWarning, match="The dirpath has changed from"):
        one = fit(tmp_path, saver, "c/last.ckpt")
    assert one.global_step == 12 and one.current_epoch == 3


class ReadsItsOwn(L.Callback):
    """Notes which ranks' parts this process opens while fit starts."""

    def __init__(self) -> None:
        self.opened: set[str] = set()
        sys.addaudithook(lambda event, args: self.note(args[0]) if event == "open" else None)

    def note(self, path: Any) -> None:
        if isinstance(path, str) and (name := os.path.basename(path)).startswith("rank_"):
            self.opened.add(name)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.opened.clear()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self.opened == {f"rank_{trainer.global_rank}.pt"}, self.opened


@pytest.mark.timeout(110)
def test_two_processes_go_on_in_mid_accumulation_each_from_its_own_part(tmp_path: Path) -> None:
    def fit_two(ckpt_path: str | None, *callbacks: L.Callback, **kwargs: Any) -> Any:
        L.seed_everything(3)
        two = trainer(tmp_path, devices=2, strategy="ddp_fork", plugins=DistributedCheckpointIO(), max_epochs=1,
                      accumulate_grad_batches=2, callbacks=[*callbacks], **kwargs)  # fmt: skip
        two.fit(Wide(), loader(16), ckpt_path=ckpt_path)
        return two.lightning_module.state_dict()

    class Saves(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 2:
                trainer.save_checkpoint("a.ckpt")

    whole = fit_two(None, Saves())
    ranks = DistributedCheckpointIO().load_checkpoint("a.ckpt")["treadle"]["ranks"]
    gradients = [part["gradients"]["layers.0.weight"] for part in ranks]
    assert len(gradients) == 2 and not torch.equal(*gradients)
    assert "buffers" in ranks[1] and "seen" in ranks[1]["buffers"]
    resumed = fit_two("a.ckpt", ReadsItsOwn())
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, ModelCheckpoint("c", "{step}", every_n_train_steps=1, save_top_k=-1, save_last=True), max_epochs=1)
    assert main(["checkpoint", "verify", "c"]) == 0
    assert main(["checkpoint", "verify", "c/step=4.ckpt"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 5 and all("good, " in line and "kB" in line for line in printed)
    assert main(["checkpoint", "inspect", "c/last.ckpt"]) == 0
    printed = capsys.readouterr().out
    assert "folder" in printed and "float32 [300, 4], 4.8 kB" in printed and "global step        4" in printed
    assert main(["checkpoint", "diff", "c/last.ckpt", "c/step=4.ckpt"]) == 0
    assert main(["checkpoint", "diff", "c/step=3.ckpt", "c/step=4.ckpt"]) == 1
    assert "state_dict.layers.0.weight: 1,200 of 1,200 values differ" in capsys.readouterr().out
    (Path("c") / "step=3.ckpt" / "manifest.json").unlink()
    assert main(["checkpoint", "verify", "c"]) == 1
    assert "step=3.ckpt: BAD" in capsys.readouterr().out
    assert main(["checkpoint", "prune", "c", "--keep", "1"]) == 0
    assert names() == ["last.ckpt", "step=4.ckpt"]
    assert main(["checkpoint", "verify", "c"]) == 0
