"""Checkpoint folders at URLs: each save below a name of its own, and a manifest that names it, written last.

Tests of ``treadle_fabric.checkpoint.folder.remote``, ``treadle_fabric.checkpoint.folder.destination``.
"""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import torch.distributed.checkpoint
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from tests.fabric.checkpoint.fetched import load
from tests.processes import run_in_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from treadle_fabric import (
    AsyncCheckpointIO,
    CheckpointError,
    DistributedCheckpointIO,
    Fabric,
    MisconfigurationException,
    TorchCheckpointIO,
)
from treadle_fabric.checkpoint import PerRank, lies_at, remote_checkpoints_in, written_at
from treadle_fabric.checkpoint.folder import remote

IO = DistributedCheckpointIO()


class Shelf(DirFileSystem):
    """A store that several processes reach: a local folder, which is no local file system to the code under test."""

    protocol = "shelf"
    cachable = False  # the folder may be another one for each test

    def __init__(self, root: str = "", **kwargs: Any) -> None:
        super().__init__(path=root or os.environ["SHELF"], fs=fsspec.filesystem("file"), **kwargs)


fsspec.register_implementation("shelf", Shelf)


@pytest.fixture(autouse=True)
def empty_memory() -> Iterator[None]:
    remote._tidied.clear()
    yield
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def state(step: int) -> dict[str, Any]:
    return {"step": step, "w": torch.full((20_000,), float(step)), "b": torch.ones(3)}


def files(url: str) -> list[str]:
    fs, where = fsspec.url_to_fs(url)
    return sorted(path.removeprefix(where).lstrip("/") for path in fs.find(where))


def step_at(url: str) -> int:
    """Which of the states lies at a URL, every byte of which is read."""
    found = load(url)
    assert found["w"].eq(found["step"]).all() and found["w"].shape == (20_000,)
    return int(found["step"])


@pytest.mark.parametrize("scheme", ["memory", "shelf"])
def test_a_checkpoint_at_a_url_is_replaced_and_removed(
    scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHELF", str(tmp_path / "shelf"))
    url = f"{scheme}://runs/a.ckpt"
    for step, io in enumerate((IO, AsyncCheckpointIO(IO), IO)):
        io.save_checkpoint(state(step), url)
        io.wait()
        assert step_at(url) == step and lies_at(url)
        names = [name.rpartition("/")[2] for name in files(url)]
        assert sorted(names) == [".metadata", "__0_0.distcp", "manifest.json", "meta.pt"], files(url)
    assert abs(written_at(url) / 1e9 - datetime.now().timestamp()) < 60
    for remover in (TorchCheckpointIO(), IO):
        remover.remove_checkpoint(url)
        assert files(f"{scheme}://runs") == [] and not lies_at(url)
    IO.save_checkpoint(state(7), f"file://{tmp_path}/local.ckpt")
    assert IO.load_checkpoint(tmp_path / "local.ckpt")["step"] == 7
    with pytest.raises(MisconfigurationException, match="storage_options"):
        IO.save_checkpoint(state(7), f"file://{tmp_path}/local.ckpt", storage_options={"a": 1})


def test_storage_options_are_passed(tmp_path: Path) -> None:
    IO.save_checkpoint(state(1), "shelf://a.ckpt", storage_options={"root": str(tmp_path)})
    background = AsyncCheckpointIO(IO)
    background.save_checkpoint(state(1), "shelf://b.ckpt", storage_options={"root": str(tmp_path)})
    background.teardown()
    assert (tmp_path / "a.ckpt" / "manifest.json").is_file() and (tmp_path / "b.ckpt" / "manifest.json").is_file()


class Lost(Exception):
    """What a store raises."""


@pytest.mark.parametrize("fails", ["open", "write", "close", "pipe_file", "answer lost", "rm"])
def test_a_save_that_fails_leaves_the_old_one_whole(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = "memory://runs/a.ckpt"
    IO.save_checkpoint(state(1), url)
    before = files(url)

    def lost(*args: Any, **kwargs: Any) -> Any:
        raise Lost("the connection")

    def answer_lost(fs: Any, path: str, content: bytes, **kwargs: Any) -> Any:
        put(fs, path, content, **kwargs)
        raise Lost("the connection")

    put = MemoryFileSystem.pipe_file
    memory_file = "fsspec.implementations.memory.MemoryFile"
    with pytest.MonkeyPatch.context() as patch:
        if fails in ("write", "close"):
            patch.setattr(f"{memory_file}.{fails}", lost)
        elif fails == "answer lost":
            patch.setattr(MemoryFileSystem, "pipe_file", answer_lost)
        else:
            patch.setattr(MemoryFileSystem, fails, lost)
        if fails in ("answer lost", "rm"):  # it is done
            IO.save_checkpoint(state(2), url)
        else:
            with pytest.raises(CheckpointError, match=r"a\.ckpt' was not written: Lost: the connection"):
                IO.save_checkpoint(state(2), url)
            assert files(url) == before
    assert step_at(url) == (2 if fails in ("answer lost", "rm") else 1)


def test_what_dead_saves_left_is_removed_and_what_is_being_written_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs = fsspec.filesystem("memory")

    def leave(url: str, hours: float) -> str:
        """What a process leaves that is killed while it writes."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(remote.RemoteFolder, "publish", lambda *args: os._exit)
            patch.setattr(remote.RemoteFolder, "end", lambda *args: None)
            known = set(files(url)) if fs.exists(url) else set()
            IO.save_checkpoint(state(0), url)
        (own,) = {name.partition("/")[0] for name in set(files(url)) - known}
        for path in fs.find(f"{url}/{own}"):
            fs.store[path].modified = datetime.now(tz=UTC) - timedelta(hours=hours)
        return own

    url, beside = "memory://runs/a.ckpt", "memory://runs/b.ckpt"
    dead, fresh = leave(url, 7), leave(url, 1)
    leave(beside, 7)
    leave("memory://runs/c.ckpt", 1)
    assert not lies_at(url)  # the name is free
    assert remote_checkpoints_in("memory://runs") == []
    fs.pipe_file("memory://runs/d.ckpt/notes.txt", b"")
    IO.save_checkpoint(state(1), url)
    tops = {name.partition("/")[0] for name in files(url)}
    assert dead not in tops and fresh in tops and len(tops) == 3
    assert sorted(map(os.path.basename, fs.ls("runs", detail=False))) == ["a.ckpt", "c.ckpt", "d.ckpt"]
    IO.save_checkpoint(state(2), url)
    assert {name.partition("/")[0] for name in files(url)} & tops == {fresh, "manifest.json"}
    assert step_at(url) == 2
    IO.remove_checkpoint(url)
    assert not fs.exists(url)


def test_folders_of_others_are_not_touched() -> None:
    fs = fsspec.filesystem("memory")
    for name, content in (("notes.txt", b""), ("data/x", b""), ("meta.pt", b""), ("manifest.json", b"{}")):
        fs.pipe_file(f"/runs/{name.replace('.', '-')}/{name}", content)
        url = f"memory://runs/{name.replace('.', '-')}"
        for touch in (
            lambda: IO.save_checkpoint(state(1), url),  # noqa: B023
            lambda: TorchCheckpointIO().save_checkpoint(state(1), url),  # noqa: B023
            lambda: IO.remove_checkpoint(url),  # noqa: B023
        ):
            with pytest.raises(CheckpointError, match="nothing in it was"):
                touch()
        assert files(url) == [name] and lies_at(url)
    TorchCheckpointIO().save_checkpoint(state(1), "memory://runs/file.ckpt")
    with pytest.raises(CheckpointError, match="a file lies at"):
        IO.save_checkpoint(state(1), "memory://runs/file.ckpt")
    assert TorchCheckpointIO().load_checkpoint("memory://runs/file.ckpt")["step"] == 1


def test_the_checkpoints_at_a_url_are_listed() -> None:
    for name in ("a.ckpt", "last.ckpt", "deep/b.ckpt"):
        IO.save_checkpoint(state(1), f"memory://runs/{name}")
        TorchCheckpointIO().save_checkpoint(state(1), f"memory://runs/file-{name.replace('/', '-')}")
    TorchCheckpointIO().save_checkpoint(state(1), "memory://runs/deep/c.ckpt")

    def listed(**kwargs: Any) -> list[str]:
        found = remote_checkpoints_in("memory://runs", **kwargs)
        assert found == sorted(found, key=lambda entry: -entry[1]) and all(time for _, time in found)
        return sorted(url.removeprefix("memory://runs/") for url, _ in found)

    top = ["a.ckpt", "file-a.ckpt", "file-deep-b.ckpt", "file-last.ckpt", "last.ckpt"]
    assert listed(recursive=False) == top
    assert listed() == sorted([*top, "deep/b.ckpt", "deep/c.ckpt"])
    assert listed(names=("*last*.ckpt",)) == ["file-last.ckpt", "last.ckpt"]
    assert remote_checkpoints_in("memory://runs/a.ckpt")[0][0] == "memory://runs/a.ckpt"
    assert remote_checkpoints_in("memory://nowhere") == []


def test_no_part_is_in_memory_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHELF", str(tmp_path))
    tensors = {f"w{i}": torch.ones(1_000_000) for i in range(8)}  # 32 MB
    IO.save_checkpoint({"n": 1}, "shelf://warm.ckpt")
    tracemalloc.start()
    IO.save_checkpoint(tensors, "shelf://a.ckpt")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6_000_000, peak


def save_with_two(url: str) -> None:
    io = AsyncCheckpointIO(IO)
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp", plugins=io)
    fabric.launch()
    rows = distribute_tensor(torch.arange(40_000.0).view(200, 200), init_device_mesh("cpu", (2,)), [Shard(0)])
    for step in (1, 2):
        fabric.save(url, {**state(step), "rows": rows, "own": PerRank(fabric.global_rank)})
    io.wait()
    names = [name.rpartition("/")[2] for name in files(url)]
    assert sorted(names) == [
        ".metadata", "__0_0.distcp", "__1_0.distcp", "manifest.json", "meta.pt", "rank_0.pt", "rank_1.pt",
    ]  # fmt: skip
    with pytest.raises(CheckpointError, match="rank 0: another rank wrote .*not to be seen"):
        IO.save_checkpoint({"rows": rows}, "memory://a.ckpt")  # each has a memory of its own
    fabric.strategy.teardown()


def test_two_ranks_upload_each_its_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHELF", str(tmp_path / "shelf"))
    run_in_ranks(save_with_two, "shelf://runs/a.ckpt")
    found = load("shelf://runs/a.ckpt")
    assert found["step"] == 2 and found["own"] == [0, 1]
    assert torch.equal(found["rows"], torch.arange(40_000.0).view(200, 200))
