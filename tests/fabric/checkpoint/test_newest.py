"""The newest checkpoint that is good, and how a bad one is told from it.

Tests of ``treadle_fabric.checkpoint.newest``, ``treadle_fabric.checkpoint.reading``.
"""

from __future__ import annotations

import os
import pickle
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from treadle_fabric import CheckpointCorruptError, TorchCheckpointIO, newest_good

START = time.time() - 1000


def save(path: Path, step: int, **more: Any) -> Path:
    TorchCheckpointIO().save_checkpoint({"weights": torch.full((100,), float(step)), "global_step": step, **more}, path)
    os.utime(path, (START + step, START + step))
    return path


def flip(path: Path, position: int) -> None:
    content, status = bytearray(path.read_bytes()), path.stat()
    content[position] ^= 0xFF
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_the_newest_by_time_in_all_folders(tmp_path: Path) -> None:
    save(tmp_path / "a" / "z.ckpt", 1)
    newest = save(tmp_path / "b" / "deep" / "er" / "a.ckpt", 5)
    save(tmp_path / "b" / "y.ckpt", 3)
    (tmp_path / "b" / "newer.txt").touch()
    (tmp_path / "b" / ".hidden.ckpt").touch()
    assert newest_good(tmp_path) == newest
    assert newest_good([tmp_path / "a", str(tmp_path / "b")]) == newest
    assert newest_good(tmp_path / "b", recursive=False) == tmp_path / "b" / "y.ckpt"
    assert newest_good([tmp_path / "never"]) is None


def test_of_two_written_at_once_the_later_step(tmp_path: Path) -> None:
    for name, step in (("a", 2), ("b", 10), ("c", 9)):
        path = save(tmp_path / f"{name}.ckpt", step)
        os.utime(path, (START, START))
    assert newest_good(tmp_path) == tmp_path / "b.ckpt"


def test_a_bad_one_is_named_and_the_one_before_it_is_used(tmp_path: Path) -> None:
    good = save(tmp_path / "good.ckpt", 1)
    flip(save(tmp_path / "flipped.ckpt", 2), 700)
    cut = save(tmp_path / "cut.ckpt", 3)
    os.truncate(cut, 500)
    os.utime(cut, (START + 3, START + 3))
    (tmp_path / "foreign.ckpt").write_text("epoch: 3")
    with pytest.warns(UserWarning) as caught:
        assert newest_good(tmp_path) == good
    said = "\n".join(str(w.message) for w in caught)
    assert all(name in said for name in ("flipped.ckpt", "cut.ckpt", "foreign.ckpt")) and "good.ckpt" not in said


def test_a_hostile_one_is_passed_over_and_does_not_run(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    good = save(tmp_path / "good.ckpt", 1)
    torch.save({"state_dict": Hostile()}, tmp_path / "zip.ckpt")
    (tmp_path / "bare.ckpt").write_bytes(pickle.dumps(Hostile()))
    with pytest.warns(UserWarning, match="not loaded"):
        assert newest_good(tmp_path) == good
    assert not (tmp_path / "ran").exists()


def test_links_are_followed_and_dangling_ones_are_nothing(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    outside = save(tmp_path / "elsewhere" / "a.ckpt", 3)
    (tmp_path / "runs" / "last.ckpt").symlink_to(outside)
    (tmp_path / "runs" / "gone.ckpt").symlink_to(tmp_path / "nowhere")
    assert newest_good(tmp_path / "runs") == tmp_path / "runs" / "last.ckpt"
    assert newest_good([tmp_path / "runs", tmp_path / "elsewhere"]) == outside


def test_one_without_the_keys_that_are_needed_is_passed_over_silently(tmp_path: Path) -> None:
    full = save(tmp_path / "full.ckpt", 1, optimizer_states=[])
    save(tmp_path / "weights.ckpt", 2)
    assert newest_good(tmp_path, holds=("weights", "optimizer_states")) == full


def test_no_byte_of_a_file_can_be_changed_or_cut_off_unnoticed(tmp_path: Path) -> None:
    io, path = TorchCheckpointIO(), tmp_path / "a.ckpt"
    io.save_checkpoint({"w": torch.arange(5.0), "empty": torch.zeros(0), "n": 1}, path)
    whole = path.read_bytes()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= (0xFF, 0x01, 0x08)[position % 3]
        for content in (damaged, whole[:position]) if position % 16 == 0 or position > len(whole) - 50 else (damaged,):
            path.write_bytes(content)
            with pytest.raises(CheckpointCorruptError, match=r"a\.ckpt"):
                io.load_checkpoint(path)
    path.write_bytes(whole)
    assert io.load_checkpoint(path)["n"] == 1


def test_what_follows_the_end_is_noticed_and_torch_does_not_mind_the_seal(tmp_path: Path) -> None:
    path = save(tmp_path / "a.ckpt", 1)
    assert torch.load(path, mmap=True)["global_step"] == torch.load(path)["global_step"] == 1
    with path.open("ab") as file:
        file.write(b"\n")
    with pytest.raises(CheckpointCorruptError, match="damaged"):
        TorchCheckpointIO().load_checkpoint(path)
