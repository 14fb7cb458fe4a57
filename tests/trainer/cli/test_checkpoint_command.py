"""The command `treadle checkpoint`.

Tests of ``treadle.cli.checkpoint``, ``treadle.cli.main``.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.trainer.models import Net, loader

from treadle import Trainer
from treadle.callbacks import ModelCheckpoint
from treadle.cli.main import main
from treadle_fabric import TorchCheckpointIO

START = time.time() - 1000


def save(name: str, step: int, **more: Any) -> Path:
    path = Path(name)
    TorchCheckpointIO().save_checkpoint({"w": torch.full((50,), float(step)), "global_step": step, **more}, path)
    os.utime(path, (START + step, START + step))
    return path


def spoil(path: Path) -> None:
    content, status = bytearray(path.read_bytes()), path.stat()
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def checkpoint(*arguments: str) -> int:
    return main(["checkpoint", *arguments])


def test_the_command_is_there() -> None:
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    save("a.ckpt", 1)
    result = subprocess.run(
        [sys.executable, "-m", "treadle.cli", "checkpoint", "verify", "a.ckpt"],
        env=environ, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert result.returncode == 0 and "a.ckpt: good" in result.stdout, result.stderr


def test_verify_says_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    save("a/good.ckpt", 1)
    assert checkpoint("verify", "a", "a/good.ckpt") == 0
    spoil(save("a/flipped.ckpt", 2))
    Path("a/deep").mkdir()
    Path("a/deep/foreign.ckpt").write_text("weights")
    assert checkpoint("verify", "a") == 1
    printed = capsys.readouterr().out
    assert "a/good.ckpt: good" in printed
    assert "flipped.ckpt: BAD" in printed and "checksum" in printed
    assert "foreign.ckpt: BAD" in printed and "no checkpoint" in printed
    assert checkpoint("verify", "never.ckpt") == 1
    Path("empty").mkdir()
    assert checkpoint("verify", "empty") == 1


def test_inspect_shows_what_a_run_saved(capsys: pytest.CaptureFixture[str]) -> None:
    saver = ModelCheckpoint("c", save_last=True)
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, max_epochs=2, callbacks=saver,
                      enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    model = Net()
    trainer.fit(model, loader())
    assert checkpoint("inspect", saver.last_model_path) == 0
    printed = capsys.readouterr().out
    rows = {line.partition("  ")[0]: line.partition("  ")[2].strip() for line in printed.splitlines()}
    assert rows["epoch"] == "1" and rows["global step"] == str(trainer.global_step)
    assert rows["written by"] == "Treadle" and rows["format"].startswith("Lightning 2.")
    assert rows["weights"].endswith("float32") and "ModelCheckpoint" in rows["callbacks"]
    assert "optimizer_states" in printed
    for name, value in model.state_dict().items():
        assert name in printed and str(list(value.shape)) in printed


def test_diff_names_what_differs_and_by_how_much(capsys: pytest.CaptureFixture[str]) -> None:
    a = {
        "w": torch.zeros(4),
        "deep": {"step": [1, 2]},
        "nan": torch.tensor([torch.nan]),
        "old": 1,
        "shape": torch.ones(2),
    }
    b = {**a, "w": torch.tensor([0, 0, 0.5, -1.5]), "deep": {"step": [1, 3]}, "shape": torch.ones(3), "new": 2}
    del b["old"]
    for name, state in (("a", a), ("b", b)):
        TorchCheckpointIO().save_checkpoint(state, name)
    assert checkpoint("diff", "a", "a") == 0
    assert capsys.readouterr().out == "No difference.\n"
    assert checkpoint("diff", "a", "b") == 1
    assert capsys.readouterr().out.splitlines() == [
        "w: 2 of 4 values differ, by 1.5 at most, 1 on average",
        "deep.step.1: 2 -> 3",
        "old: only in a",
        "shape: float32 [2] -> float32 [3]",
        "new: only in b",
        "5 of 7 entries differ.",
    ]
    assert checkpoint("diff", "a", "c") == 2
    assert "no checkpoint at 'c'" in capsys.readouterr().err


def test_prune_keeps_the_newest_good_ones(capsys: pytest.CaptureFixture[str]) -> None:
    for step in range(1, 6):
        save(f"d/{step}.ckpt", step)
    spoil(Path("d/5.ckpt"))
    os.link("d/4.ckpt", "d/last.ckpt")
    os.link("d/2.ckpt", "d/best.ckpt")
    Path("d/notes.txt").touch()
    everything = sorted(os.listdir("d"))
    assert checkpoint("prune", "d", "--keep", "2", "--dry-run") == 0
    assert sorted(os.listdir("d")) == everything
    assert capsys.readouterr().out.count("would remove") == 4
    assert checkpoint("prune", "d", "--keep", "2") == 0
    assert sorted(os.listdir("d")) == ["3.ckpt", "4.ckpt", "last.ckpt", "notes.txt"]


def test_prune_never_takes_the_last_good_one(capsys: pytest.CaptureFixture[str]) -> None:
    for keep in ("0", "x"):
        with pytest.raises(SystemExit):
            checkpoint("prune", ".", "--keep", keep)
        assert f"--keep: '{keep}' must be an integer of at least 1" in capsys.readouterr().err
    spoil(save("d/bad.ckpt", 1))
    assert checkpoint("prune", "d", "--keep", "1") == 1
    assert os.listdir("d") == ["bad.ckpt"]
    assert checkpoint("prune", "never", "--keep", "1") == 2


def test_prune_leaves_what_it_cannot_judge() -> None:
    save("d/1.ckpt", 1)
    save("d/2.ckpt", 2)
    torch.save({"own": argparse.Namespace()}, "d/3.ckpt")  # loads with weights_only=False alone
    assert checkpoint("prune", "d", "--keep", "1") == 0
    assert sorted(os.listdir("d")) == ["2.ckpt", "3.ckpt"]


def test_prune_counts_only_what_training_can_go_on_from() -> None:
    for step in (1, 2, 3):
        save(f"d/{step}.ckpt", step, state_dict={}, optimizer_states=[])
    save("d/4.ckpt", 4, state_dict={})  # weights only
    Path("d/5.ckpt").write_text("hello")  # somebody else's
    Path("d/6.ckpt").write_bytes(Path("d/1.ckpt").read_bytes()[:100])  # cut off
    assert checkpoint("prune", "d", "--keep", "2") == 0
    assert sorted(os.listdir("d")) == ["2.ckpt", "3.ckpt", "4.ckpt", "5.ckpt"]


def test_diff_says_first_what_matters(capsys: pytest.CaptureFixture[str]) -> None:
    save("a.ckpt", 1, loops={"n": 1}, treadle={"ranks": [1, 2]})
    save("b.ckpt", 2, loops={"n": 2}, treadle={"ranks": [1, 3]})
    assert checkpoint("diff", "a.ckpt", "b.ckpt") == 1
    short = capsys.readouterr().out
    assert "w: 50 of 50 values differ" in short and "2 more in treadle., loops." in short and "ranks.1" not in short
    assert checkpoint("diff", "--all", "a.ckpt", "b.ckpt") == 1
    assert "treadle.ranks.1: 2 -> 3" in capsys.readouterr().out
