"""Folders that all ranks write in the background: what is in them, what is waited for, and where errors go.

Tests of ``treadle_fabric.checkpoint.distributed.saving``, ``treadle_fabric.checkpoint.distributed.pieces``,
``treadle_fabric.checkpoint.distributed.ranks``, ``treadle_fabric.checkpoint.asynchronous``.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint
from tests.processes import importing_tests, run_in_ranks
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from treadle_fabric import AsyncCheckpointIO, CheckpointError, DistributedCheckpointIO, Fabric, ProcessFailedError
from treadle_fabric.checkpoint import PerRank
from treadle_fabric.checkpoint.distributed import saving, split
from treadle_fabric.coordination import HostGroup

FULL = torch.arange(40_000.0).view(200, 200)


@pytest.fixture(autouse=True)
def small_tensors_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split, "_LARGE", 4096)


class Gate:
    """Holds the thread that writes until it is let."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.writes = saving.ShardedSave._write_files
        patch.setattr(saving.ShardedSave, "_write_files", lambda save, ranks: self._late(save, ranks))

    def _late(self, save: Any, ranks: Any) -> Any:
        assert self.open.wait(60)
        return self.writes(save, ranks)


def ranks_of(**kwargs: Any) -> Fabric:
    fabric = Fabric(accelerator="cpu", strategy="ddp", **kwargs)
    fabric.launch()
    return fabric


def on_mesh(fabric: Fabric) -> dict[str, Any]:
    """Of every kind of tensor one, whose copies on several ranks one rank is to write."""
    mesh = init_device_mesh("cpu", (fabric.world_size,))
    grid = init_device_mesh("cpu", (2, fabric.world_size // 2), mesh_dim_names=("replicate", "shard"))
    shared = torch.zeros(3, 5000)
    return {
        "rows": distribute_tensor(FULL.clone(), mesh, [Shard(0)]),
        "copies": distribute_tensor(FULL.clone(), mesh, [Replicate()]),
        **{f"hybrid{i}": distribute_tensor(FULL + i, grid, [Replicate(), Shard(0)]) for i in range(4)},
        "one row": distribute_tensor(FULL.view(1, -1).clone(), mesh, [Shard(0)]),
        **{f"w{i}": torch.full((10_000,), float(i)) for i in range(6)},
        "view": shared[1],  # of a storage of which the rest is not saved
        "tied": (tied := torch.ones(5000)),
        "too": tied,
        "own": PerRank({"rank": fabric.global_rank, "big": torch.full((3000,), float(fabric.global_rank))}),
        "unlike": torch.full((2000,), float(fabric.global_rank)),
        "small": torch.ones(3),
        "step": 1,
    }


def later(state: dict[str, Any]) -> None:
    """What training does to the state after the save."""
    for value in state.values():
        tensor = value.to_local() if isinstance(value, DTensor) else value
        if isinstance(tensor, Tensor):
            tensor.add_(100)
    state["own"].value["rank"] = -1


def check(found: dict[str, Any], ranks: int) -> None:
    names = ["rows", "copies", *(f"hybrid{i}" for i in range(4))]
    expected = dict(zip(names, [FULL, FULL, *(FULL + i for i in range(4))], strict=True))
    assert all(torch.equal(found[name], expected[name]) for name in names)
    assert torch.equal(found["one row"], FULL.view(1, -1)) and found["step"] == 1
    assert all(found[f"w{i}"].eq(i).all() for i in range(6)) and found["view"].eq(0).all()
    assert found["tied"].data_ptr() == found["too"].data_ptr() and found["tied"].eq(1).all()
    assert [each["rank"] for each in found["own"]] == list(range(ranks)) and found["unlike"].eq(0).all()
    assert found["small"].eq(1).all()


def save_in_background(folder: str) -> None:
    io = AsyncCheckpointIO(DistributedCheckpointIO())
    fabric = ranks_of(devices=2, plugins=io)
    assert io.sharded
    state = on_mesh(fabric)
    with pytest.MonkeyPatch.context() as patch:
        gate = Gate(patch)
        received: Counter[str] = Counter()
        count(received, patch)
        fabric.strategy.save_checkpoint(f"{folder}/a.ckpt", state)
        assert received["largest"] == 3, received  # "unlike" takes two more than one
        later(state)
        fabric.barrier()
        assert not os.path.exists(f"{folder}/a.ckpt")
        gate.open.set()
        io.wait()
    assert dist.get_world_size() == 2 and os.listdir(folder) == ["a.ckpt"]
    check(io.load_checkpoint(f"{folder}/a.ckpt"), 2)
    part = sum(
        p.stat().st_size for p in Path(folder, "a.ckpt").glob(f"*_{'0.distcp'}") if p.name[2:3] == str(dist.get_rank())
    )
    assert io._arena.nbytes < 1.1 * part + 50_000, (io._arena.nbytes, part)
    # alike everywhere: one message, and no other before the call returns
    alike = {name: value for name, value in state.items() if name != "unlike"}
    with pytest.MonkeyPatch.context() as patch:
        received.clear()
        count(received, patch, main_thread=True)
        io.save_checkpoint(alike, f"{folder}/b.ckpt")
        assert received == {"largest": 1}
    io.remove_checkpoint(f"{folder}/a.ckpt") if fabric.is_global_zero else None
    fabric.strategy.teardown()
    assert not dist.is_initialized()
    if fabric.is_global_zero:  # whose thread removes when all ranks have written
        assert os.listdir(folder) == ["b.ckpt"]


def count(received: Counter[str], patch: pytest.MonkeyPatch, main_thread: bool = False) -> None:
    """Count the calls of each kind by which ranks talk."""

    def counting(name: str) -> Any:
        real = getattr(HostGroup, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if not main_thread or threading.current_thread() is threading.main_thread():
                received[name] += 1
            return real(*args, **kwargs)

        return call

    for name in ("largest", "bytes_of", "gather_bytes"):
        patch.setattr(HostGroup, name, counting(name))


def test_two_ranks_write_while_they_train(tmp_path: Path) -> None:
    run_in_ranks(save_in_background, str(tmp_path))
    manifest = json.loads((tmp_path / "b.ckpt" / "manifest.json").read_bytes())
    writers = {name: {c["file"] for c in manifest["tensors"][name]["chunks"]} for name in manifest["tensors"]}
    assert len(writers["rows"]) == 2 and len(writers["copies"]) == 1
    assert {file for i in range(4) for file in writers[f"hybrid{i}"]} == {"__0_0.distcp", "__1_0.distcp"}


def fail_in_background(folder: str, failing: int) -> None:
    io = AsyncCheckpointIO(DistributedCheckpointIO())
    fabric = ranks_of(devices=2, plugins=io)
    state = {f"w{i}": torch.full((50_000,), 1.0) for i in range(4)}
    io.save_checkpoint(state, f"{folder}/old.ckpt")
    io.wait()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    ends = {
        "save": lambda: io.save_checkpoint({"n": 3}, f"{folder}/newer.ckpt"),
        "wait": io.wait,
        "wait for saves": fabric.strategy.wait_for_saves,
        "load": lambda: fabric.strategy.load_checkpoint(f"{folder}/old.ckpt"),
    }
    for end, call in ends.items():
        fabric.barrier()
        if fabric.global_rank == failing:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
        io.save_checkpoint(state, f"{folder}/new.ckpt")
        if fabric.is_global_zero:
            io.remove_checkpoint(f"{folder}/old.ckpt")
        with pytest.raises(CheckpointError) as error:
            call()
        assert str(error.value).count(f"rank {failing}: File too large [EFBIG]") == 1, (end, str(error.value))
        assert f"rank {1 - failing}" not in str(error.value)
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert os.listdir(folder) == ["old.ckpt"], end
    # an error of one rank alone, beside a write: that of rank 0, which gives names
    if fabric.is_global_zero:
        io.after_saves(lambda: open("/nowhere/at/all"))  # type: ignore[arg-type, return-value]
    with pytest.raises(CheckpointError, match="rank 0: No such file"):
        io.save_checkpoint(state, f"{folder}/new.ckpt")
    # what one rank cannot pickle is said at once, by all
    own = PerRank((lambda: 0) if fabric.global_rank == failing else 1)
    with pytest.raises(CheckpointError, match=f"rank {failing}: .*pickled"):
        io.save_checkpoint({"f": own}, f"{folder}/new.ckpt")
    with pytest.MonkeyPatch.context() as patch:  # and what one rank has no memory for, when all write
        if fabric.global_rank == failing:
            patch.setattr(saving.ShardedSave, "_copy", lambda *args: 1 / 0)
        io.save_checkpoint(state, f"{folder}/new.ckpt")
    with pytest.raises(CheckpointError, match=f"rank {failing}: ZeroDivisionError"):
        io.wait()
    assert os.listdir(folder) == ["old.ckpt"]
    io.save_checkpoint(state, f"{folder}/new.ckpt")  # it goes on
    fabric.barrier()
    fabric.strategy.leave_environment()  # waits for what all ranks write
    assert sorted(os.listdir(folder)) == ["new.ckpt", "old.ckpt"]


@pytest.mark.parametrize("failing", [0, 1])
def test_where_one_rank_fails_all_raise_and_nothing_is_removed(failing: int, tmp_path: Path) -> None:
    run_in_ranks(fail_in_background, str(tmp_path), failing)


def die_in_background(fabric: Fabric, folder: str, dying: int) -> None:
    io = AsyncCheckpointIO(DistributedCheckpointIO())
    state = {f"w{i}": torch.full((50_000,), 1.0) for i in range(4)}
    io.save_checkpoint(state, f"{folder}/a.ckpt")
    io.wait()
    if fabric.global_rank == dying:
        saving.ShardedSave._write_files = lambda *a: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore
    io.save_checkpoint({name: w + 1 for name, w in state.items()}, f"{folder}/a.ckpt")
    io.wait()


def test_where_a_rank_dies_the_others_do_not_wait_for_it(tmp_path: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp_fork")
    with pytest.raises(ProcessFailedError):
        fabric.launch(die_in_background, str(tmp_path), 1)
    assert DistributedCheckpointIO().load_checkpoint(tmp_path / "a.ckpt")["w0"].eq(1).all()


def test_the_end_of_a_program_waits_for_all_ranks(tmp_path: Path) -> None:
    code = """
    import os, torch
    import torch.distributed.checkpoint
    from tests.processes import thread_runs, wait_until
    from treadle_fabric import find_free_port
    from treadle_fabric import AsyncCheckpointIO, DistributedCheckpointIO, Fabric
    from treadle_fabric.checkpoint.distributed import saving
    write = saving.ShardedSave._write_files
    def late(*args):
        wait_until(lambda: not thread_runs("<module>"))  # the program has come to its end
        return write(*args)
    saving.ShardedSave._write_files = late
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_free_port()), "WORLD_SIZE": "2"}
    os.environ |= {"NODE_RANK": "0", "LOCAL_RANK": "0" if os.fork() else "1"}
    fabric = Fabric(accelerator="cpu", devices=2, plugins=AsyncCheckpointIO(DistributedCheckpointIO()), strategy="ddp")
    fabric.launch()
    fabric.save("a.ckpt", {"w": torch.ones(50_000), "n": 5})
    """
    (tmp_path / "program.py").write_text(textwrap.dedent(code))
    done = subprocess.run(
        [sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True, timeout=90, env=importing_tests()
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert DistributedCheckpointIO().load_checkpoint(tmp_path / "a.ckpt")["n"] == 5


# --- what grows with the ranks ---


def receive(folder: str) -> None:
    fabric = ranks_of(devices=int(os.environ["WORLD_SIZE"]))
    state: dict[str, Any] = {f"w{i}": torch.full((2000,), float(i)) for i in range(64)}
    mesh = init_device_mesh("cpu", (fabric.world_size,))
    state |= {f"rows{i}": distribute_tensor(FULL.clone(), mesh, [Shard(0)]) for i in range(64)}
    state["own"] = PerRank(torch.zeros(3000))
    received = 0
    with pytest.MonkeyPatch.context() as patch:

        def counted(name: str, size: Any) -> None:
            real = getattr(HostGroup, name)

            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal received
                found = real(*args, **kwargs)
                received += size(found)
                return found

            patch.setattr(HostGroup, name, call)

        counted("largest", lambda found: 8 * len(found))
        counted("bytes_of", len)
        counted("_receive", len)
        for name in ("all_gather", "all_gather_object", "gather_object", "scatter_object_list"):
            patch.setattr(dist, name, None)  # nothing goes through these
        DistributedCheckpointIO().save_checkpoint(state, f"{folder}/a.ckpt")
    Path(folder, f"received{fabric.global_rank}").write_text(str(received))


def test_no_rank_but_the_first_receives_more_where_there_are_more_ranks(tmp_path: Path) -> None:
    found = {}
    for devices in (2, 4):
        folder = tmp_path / str(devices)
        folder.mkdir()
        run_in_ranks(receive, str(folder), devices=devices)
        found[devices] = [int((folder / f"received{rank}").read_text()) for rank in range(devices)]
    assert max(found[2][1:] + found[4][1:]) - min(found[2][1:] + found[4][1:]) < 64, found
    assert max(found[4][1:]) < 2000, found
