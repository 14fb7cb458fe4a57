"""A file name is limited by bytes: 80 letters of Chinese, Japanese or Korean take 240 of the 255 that a name may have.

Reported of checkpoints: such a name cannot be saved, because hidden names beside it are made by adding to it.

Tests of ``treadle_fabric.checkpoint.folder.names``, ``treadle.callbacks.checkpoints.names``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.trainer.models import Net, loader, trainer

from treadle.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from treadle_fabric import (
    AsyncCheckpointIO,
    CheckpointError,
    DistributedCheckpointIO,
    MisconfigurationException,
    TorchCheckpointIO,
    newest_good,
)
from treadle_fabric.checkpoint import link_folder
from treadle_fabric.checkpoint.folder import placing

LONGEST = {
    "Chinese": "模" * 83 + "a",
    "letters of four bytes": "🧵" * 62 + "ab",
    "ASCII": "a" * 250,
}
WAYS = {"file": TorchCheckpointIO, "background": AsyncCheckpointIO, "folder": DistributedCheckpointIO}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", LONGEST.values(), ids=LONGEST)
def test_every_name_that_the_file_system_takes_can_be_saved_to(name: str, way: str) -> None:
    name += ".ckpt"
    assert len(os.fsencode(name)) == 255
    io = WAYS[way]()
    for step in range(2):  # the second save replaces the first
        io.save_checkpoint({"step": step}, name)
    assert io.load_checkpoint(name)["step"] == 1
    io.teardown()
    assert os.listdir() == [name]
    assert newest_good(".") == Path(name).absolute()
    io.remove_checkpoint(name)
    io.teardown()
    assert os.listdir() == []


@pytest.mark.parametrize("name", LONGEST.values(), ids=LONGEST)
def test_a_folder_is_replaced_where_names_cannot_be_exchanged(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placing, "_exchange", lambda a, b: False)  # as on NFS
    io = DistributedCheckpointIO()
    for step in range(2):
        io.save_checkpoint({"step": step}, name)
    assert os.listdir() == [name]
    with monkeypatch.context() as patch:  # the process is killed when the old one is moved aside
        patch.setattr(os, "rename", killed_after_one(os.rename))
        with pytest.raises(SystemExit):
            io.save_checkpoint({"step": 2}, name)
    assert name not in os.listdir()
    assert io.load_checkpoint(name)["step"] == 1
    io.save_checkpoint({"step": 3}, name)
    assert io.load_checkpoint(name)["step"] == 3
    link_folder(name, name[:-1] + "b")
    assert io.load_checkpoint(name[:-1] + "b")["step"] == 3


def killed_after_one(rename: Callable[..., None]) -> Callable[..., None]:
    done: list[str] = []

    def once(*arguments: Any) -> None:
        if done:
            raise SystemExit
        rename(*arguments)
        done.append("")

    return once


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("save_last", [True, "link"])
@pytest.mark.parametrize("way", WAYS)
def test_a_run_saves_links_and_counts_versions(way: str, save_last: Any) -> None:
    name = LONGEST["Chinese"]
    for _ in range(2):
        saver = ModelCheckpoint("runs", name, save_last=save_last, save_top_k=-1, every_n_train_steps=1)
        saver.CHECKPOINT_NAME_LAST = "末" * 83
        run = trainer(
            Path(), callbacks=saver, enable_checkpointing=True, max_steps=2, plugins=WAYS[way](),
        )  # fmt: skip
        run.fit(Net(), loader(8))
        assert Path(saver.best_model_path).exists()
        assert Path(saver.last_model_path).exists()
    names = [n for n in os.listdir("runs") if not n.startswith(".")]
    assert len(names) == len(os.listdir("runs"))
    assert sum("-v" in each for each in names) >= 3
    assert all(len(os.fsencode(each)) <= 255 for each in names)


def test_what_the_values_make_too_long_is_cut() -> None:
    saver = ModelCheckpoint(filename="{" + "m" * 245 + ":.4f}")
    path = saver.format_checkpoint_name({"m" * 245: 1.5}, ver=3)
    assert path.endswith("-v3.ckpt")
    assert len(path) == 255


@pytest.mark.parametrize("make", [lambda n: ModelCheckpoint(filename=n), lambda n: OnExceptionCheckpoint(".", n)])
@pytest.mark.parametrize("name", ["模" * 84, "a/" + "模" * 100, "模" * 90 + "{epoch}"])
def test_a_name_that_is_too_long_is_refused_before_the_run(make: Callable[[str], Any], name: str) -> None:
    with pytest.raises(MisconfigurationException, match="bytes.*255.*shorten the name"):
        make(name)


@pytest.mark.parametrize("way", WAYS)
def test_a_path_that_is_too_long_is_refused_before_anything_is_written(way: str) -> None:
    class Heavy:
        def __reduce__(self) -> Any:
            raise AssertionError("it was pickled")

    io = WAYS[way]()
    state = {"a": 1} if way == "background" else {"a": Heavy()}
    with pytest.raises(CheckpointError, match=r"ENAMETOOLONG.*Shorten the name.*255 bytes"):
        io.save_checkpoint(state, "模" * 86)
        io.wait()
    assert os.listdir() == []
