"""What is replaced, removed and read where a checkpoint is a folder, and where a folder is none."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from treadle_fabric import (
    CheckpointError,
    CheckpointIO,
    CheckpointNotFoundError,
    DistributedCheckpointIO,
    TorchCheckpointIO,
    newest_good,
)
from treadle_fabric.checkpoint import folder as folders
from treadle_fabric.checkpoint.newest import checkpoints_in

SHARDED, FILE = DistributedCheckpointIO(), TorchCheckpointIO()
BOTH = pytest.mark.parametrize("io", [SHARDED, FILE])


def tree(path: Path) -> list[str]:
    return sorted(str(p.relative_to(path)) for p in path.rglob("*"))


# --- what is not ours stays ---


@BOTH
@pytest.mark.parametrize("ours", ["meta.pt", ".metadata", "whole"])
@pytest.mark.parametrize("theirs", ["notes.txt", "thesis/chapter.txt", "__0_0.distcp/chapter.txt"])
def test_a_folder_with_other_things_is_neither_replaced_nor_removed(
    theirs: str, ours: str, io: CheckpointIO, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    if ours == "whole":
        SHARDED.save_checkpoint({"step": 1}, data)
    else:
        data.mkdir()
        (data / ours).write_bytes(b"x")
    (data / theirs).parent.mkdir(exist_ok=True)
    (data / theirs).write_text("x")
    SHARDED.save_checkpoint({"step": 1}, tmp_path / "a.ckpt")
    before = tree(tmp_path)
    for touch in (
        lambda: io.save_checkpoint({"step": 2}, data),
        lambda: io.remove_checkpoint(data),
        lambda: folders.link_folder(str(tmp_path / "a.ckpt"), str(data)),
    ):
        with pytest.raises(CheckpointError, match=r"choose another name"):
            touch()
        assert tree(tmp_path) == before


@BOTH
def test_only_folders_that_are_checkpoints_are_removed(io: CheckpointIO, tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    (project / "manifest.json").write_text("{}")  # of another program
    with pytest.raises(CheckpointError, match="no checkpoint"):
        io.remove_checkpoint(project)
    (project / "x.py").touch()
    with pytest.raises(CheckpointError, match=r"'x\.py'"):
        io.remove_checkpoint(project)
    assert tree(project) == ["manifest.json", "x.py"]


def test_what_was_put_into_a_checkpoint_is_not_linked_along(tmp_path: Path) -> None:
    SHARDED.save_checkpoint({"step": 1}, tmp_path / "a.ckpt")
    (tmp_path / "a.ckpt" / "notes.txt").touch()
    for _ in range(2):  # the link can be replaced by the next one
        folders.link_folder(str(tmp_path / "a.ckpt"), str(tmp_path / "last.ckpt"))
    assert SHARDED.load_checkpoint(tmp_path / "last.ckpt") == {"step": 1}


def test_a_file_called_meta_beside_checkpoints_hides_none(tmp_path: Path) -> None:
    FILE.save_checkpoint({"step": 1}, tmp_path / "run" / "last.ckpt")
    for given in (tmp_path, tmp_path / "run"):
        torch.save({}, tmp_path / "run" / "meta.pt")
        assert newest_good(given) == tmp_path / "run" / "last.ckpt"


# --- taking a name ---


@pytest.mark.parametrize("after", [SHARDED, FILE])
@pytest.mark.parametrize("before", [SHARDED, FILE])
def test_what_was_moved_aside_for_a_checkpoint_that_came_does_not_come_back(
    before: CheckpointIO, after: CheckpointIO, tmp_path: Path
) -> None:
    path, aside = tmp_path / "a.ckpt", tmp_path / f".a.ckpt.{'0' * 32}.old"
    for remove in (False, True):  # killed between the two renames, and then saved to, or removed
        before.save_checkpoint({"step": 1}, path)
        path.rename(aside)
        if not remove:
            after.save_checkpoint({"step": 2}, path)
            assert not aside.exists()
        after.remove_checkpoint(path)
        assert checkpoints_in(tmp_path) == [] and os.listdir(tmp_path) == []
        with pytest.raises(CheckpointNotFoundError):
            after.load_checkpoint(path)


@BOTH
def test_a_reader_that_brings_the_old_one_back_in_between_is_no_error(
    io: CheckpointIO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for old in (SHARDED, FILE):
        shutil.rmtree(tmp_path)
        old.save_checkpoint({"step": 1}, tmp_path / "a.ckpt")
        if old is io is FILE:
            continue  # one rename does it
        rename, count = os.rename, iter(range(1))

        def renames(
            a: Any, b: Any, rename: Any = rename, count: Any = count, parent: str = os.fspath(tmp_path)
        ) -> None:
            rename(a, b)
            if next(count, None) is not None:
                folders.bring_back(parent)

        with monkeypatch.context() as patch:
            patch.setattr(folders, "_exchange", lambda a, b: False)
            patch.setattr(os, "rename", renames)
            io.save_checkpoint({"step": 2}, tmp_path / "a.ckpt")
        assert io.load_checkpoint(tmp_path / "a.ckpt") == {"step": 2} and os.listdir(tmp_path) == ["a.ckpt"]


def test_a_folder_that_another_process_removes_as_stale_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    SHARDED.save_checkpoint({"step": 1}, tmp_path / "a.ckpt")
    unlink, count = os.unlink, iter(range(1))

    def unlinks(*args: Any, **kwargs: Any) -> None:
        unlink(*args, **kwargs)
        if next(count, None) is not None:
            unlink(*args, **kwargs)  # as if the other one had been faster

    monkeypatch.setattr(os, "unlink", unlinks)
    SHARDED.remove_checkpoint(tmp_path / "a.ckpt")
    assert os.listdir(tmp_path) == []
