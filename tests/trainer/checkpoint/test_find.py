"""Which checkpoint a run that is started again goes on from by itself.

Tests of ``treadle.checkpoint.find``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from tests.trainer.models import Net, loader

from treadle import Trainer
from treadle.callbacks import ModelCheckpoint
from treadle.checkpoint.find import find_newest
from treadle_fabric.loggers import CSVLogger


def run(ckpt_path: Any = None, **kwargs: Any) -> Trainer:
    arguments: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "max_epochs": 1, "logger": False, "default_root_dir": "root",
        "enable_progress_bar": False, "enable_model_summary": False,
    }  # fmt: skip
    trainer = Trainer(**arguments | kwargs)
    trainer.fit(Net(), loader(), ckpt_path=ckpt_path)
    return trainer


def find(trainer: Trainer) -> str | None:
    found = find_newest(trainer.callbacks, trainer.loggers, trainer.default_root_dir)
    return None if found is None else os.path.realpath(found)


def age_all_checkpoints() -> None:
    """Make all checkpoints so far a second older than one that is written from now on: file clocks tick slowly."""
    for path in Path().rglob("*.ckpt"):
        status = path.stat()
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns - 10**9))


def newest(trainer: Trainer) -> str:
    age_all_checkpoints()
    return str(trainer.checkpoint_callback.best_model_path)


def test_it_is_found_where_the_callback_and_the_loggers_put_it() -> None:
    trainer = run()
    assert find(trainer) == newest(trainer)
    first, second = (run(logger=CSVLogger("logs", name="mine")) for _ in range(2))
    assert newest(first) != newest(second)
    again = Trainer(
        accelerator="cpu", max_epochs=1, logger=CSVLogger("logs", name="mine"), default_root_dir="elsewhere"
    )
    assert find(again) == newest(second)
    other = run(callbacks=ModelCheckpoint("own"))
    assert find(other) == newest(other)
    assert find(Trainer(accelerator="cpu", max_epochs=1, logger=False, default_root_dir="elsewhere")) is None


def test_a_damaged_one_and_one_without_optimizers_are_passed_over() -> None:
    trainer = run(callbacks=ModelCheckpoint("c", save_top_k=-1, filename="{step}"), max_epochs=3)
    age_all_checkpoints()
    trainer.save_checkpoint("c/weights.ckpt", weights_only=True)
    content = bytearray(Path("c/step=12.ckpt").read_bytes())
    content[1000] ^= 1
    Path("c/step=12.ckpt").write_bytes(content)
    with pytest.warns(UserWarning, match="step=12.ckpt"):
        assert find(trainer) == os.path.abspath("c/step=8.ckpt")


def test_what_a_requeued_job_left_counts_too() -> None:
    trainer = run()
    age_all_checkpoints()
    trainer.save_checkpoint("root/hpc_ckpt_1.ckpt")
    assert find(trainer) == os.path.abspath("root/hpc_ckpt_1.ckpt")


def test_a_trainer_goes_on_by_itself_from_the_newest_checkpoint_that_is_whole(tmp_path: Path) -> None:
    def fit(epochs: int) -> Trainer:
        run = Trainer(
            accelerator="cpu", devices=1, max_epochs=epochs, default_root_dir=tmp_path, logger=CSVLogger(tmp_path),
            enable_progress_bar=False, enable_model_summary=False, auto_resume=True,
            callbacks=ModelCheckpoint(save_top_k=-1),
        )  # fmt: skip
        run.fit(Net(), loader(4))
        return run

    assert fit(2).ckpt_path is None
    saved = sorted(tmp_path.rglob("*.ckpt"))
    data = saved[1].read_bytes()
    assert str(fit(3).ckpt_path) == str(saved[1])
    assert os.listdir(tmp_path / "lightning_logs") == ["version_0"]
    for newest in set(tmp_path.rglob("*.ckpt")) - {saved[0]}:
        newest.write_bytes(data[: len(data) // 2])
    with pytest.warns(UserWarning):
        run = fit(3)
    assert str(run.ckpt_path) == str(saved[0])
    assert run.current_epoch == 3


def test_names_and_endings_of_ones_own_are_found_again() -> None:
    class Own(ModelCheckpoint):
        CHECKPOINT_NAME_LAST = "newest-{epoch}"
        FILE_EXTENSION = ".pth"

    run(callbacks=Own("c", save_last=True))
    assert sorted(os.listdir("c")) == ["epoch=0-step=4.pth", "newest-epoch=0.pth"]
    last = run(callbacks=Own("c", save_last=True), max_epochs=2, ckpt_path="last")
    assert os.path.basename(str(last.ckpt_path)) == "newest-epoch=0.pth"
    again = run(callbacks=Own("c", save_last=True), max_epochs=3, auto_resume=True)
    assert os.path.basename(str(again.ckpt_path)) in ("epoch=1-step=8.pth", "newest-epoch=1.pth")
    assert (last.global_step, again.global_step) == (8, 12)
