"""Checkpoints that are folders: written by any number of processes, read by any other, whole or refused.

Tests of ``treadle_fabric.checkpoint.distributed.saving``, ``treadle_fabric.checkpoint.distributed.split``,
``treadle_fabric.checkpoint.distributed.ranks``, ``treadle_fabric.checkpoint.distributed.pieces``,
``treadle_fabric.checkpoint.distributed_io``.
"""

from __future__ import annotations

import functools
import json
import os
import pickle
import resource
import shutil
import signal
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from treadle_fabric import (
    AsyncCheckpointIO,
    CheckpointCorruptError,
    CheckpointError,
    CheckpointNotFoundError,
    CheckpointUnsafeError,
    DistributedCheckpointIO,
    Fabric,
    MisconfigurationException,
    ProcessFailedError,
    TorchCheckpointIO,
    newest_good,
)
from treadle_fabric.checkpoint import fill, in_memory, tensors_on_demand
from treadle_fabric.checkpoint.distributed import saving, split
from treadle_fabric.checkpoint.distributed.saving import save_sharded
from treadle_fabric.checkpoint.folder import placing as folders
from treadle_fabric.checkpoint.newest import checkpoints_in, read_outline

IO = DistributedCheckpointIO()


@pytest.fixture(autouse=True)
def small_tensors_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the tests need not write much."""
    monkeypatch.setattr(split, "_LARGE", 4096)


def launch(processes: int, function: Callable[..., Any], *args: Any, start: str = "ddp_fork") -> Any:
    """Run in processes with a gloo group; rank 0's result."""
    return Fabric(accelerator="cpu", devices=processes, strategy=start).launch(function, *args)


def gather(value: Any) -> list[Any]:
    box: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(box, value)
    return box


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return type(a) is type(b) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return type(a) is type(b) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def read_later(path: Path) -> Any:
    """Open a folder, and then read its tensors."""
    with tensors_on_demand():
        state = IO.load_checkpoint(path)
    return {key: in_memory(value) for key, value in state.items()}


def every_kind() -> dict[str, Any]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64))
    weights = torch.randn(64, 64)
    return {
        "state_dict": model.state_dict(),
        "tied": [weights, weights.detach()],
        "transposed": (1, weights[:32].t()),
        "parameter": nn.Parameter(torch.randn(2000), requires_grad=False),
        "a.b": weights + 1,
        "a": {"b": weights + 2},
        "dtypes": [torch.randn(5000).to(d) for d in (torch.bfloat16, torch.complex64, torch.float8_e4m3fn, torch.int8)],
        "bool": torch.rand(9000) > 0.5,
        "expanded": torch.ones(1).expand(5000),
        "sparse": torch.eye(100).to_sparse(),
        "meta": torch.empty(5000, device="meta").shape,
        "small": [torch.tensor(3.0), torch.zeros(0), torch.zeros(0, 5)],
        "plain": {"step": 3, 7: None, "s": {1, 2}, "o": OrderedDict(x=(1.5, "y", b"z"))},
    }


def forge(folder: Path, name: str, content: bytes) -> None:
    """Put another content into a file of a checkpoint, and a manifest that vouches for it."""
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest["files"][name] = {"size": len(content), "crc32": f"{zlib.crc32(content):08x}"}
    seal(folder, manifest)


def seal(folder: Path, manifest: dict[str, Any]) -> None:
    body = json.dumps({k: v for k, v in manifest.items() if k != "crc32"})[1:].encode()
    (folder / "manifest.json").write_bytes(b'{"crc32": "%08x",\n' % zlib.crc32(body) + body)


# --- one process ---


def test_everything_comes_back_as_it_was(tmp_path: Path) -> None:
    path, state = tmp_path / "deep" / "a.ckpt", every_kind()
    IO.save_checkpoint(state, path)
    assert os.listdir(path.parent) == ["a.ckpt"]
    for io in (IO, TorchCheckpointIO(), AsyncCheckpointIO()):
        found = io.load_checkpoint(path)
        found["sparse"], sparse = found["sparse"].to_dense(), state["sparse"].to_dense()
        assert same({**state, "sparse": sparse}, found)
    assert found["state_dict"]._metadata == state["state_dict"]._metadata  # of which version each module is
    assert found["tied"][0].data_ptr() == found["tied"][1].data_ptr()
    assert found["parameter"].requires_grad is False
    with pytest.raises(CheckpointNotFoundError, match=r"a\.ckpt"):
        IO.load_checkpoint(tmp_path / "deep" / "b.ckpt")
    IO.save_checkpoint({"n": 1}, tmp_path / "plain.ckpt")
    assert IO.load_checkpoint(tmp_path / "plain.ckpt") == {"n": 1}


def test_the_outline_reads_no_tensor_and_torch_can_read_the_folder(tmp_path: Path) -> None:
    IO.save_checkpoint({"w": torch.ones(5000), "n": 1}, tmp_path / "a.ckpt")
    outline = read_outline(tmp_path / "a.ckpt")
    assert outline["n"] == 1 and outline["w"].is_meta and outline["w"].shape == (5000,)
    dcp_to_torch_save(tmp_path / "a.ckpt", tmp_path / "flat.pt")
    assert torch.load(tmp_path / "flat.pt")["w"].sum() == 5000


def test_a_checkpoint_is_replaced_and_another_folder_is_not(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    TorchCheckpointIO().save_checkpoint({"step": 0}, path)
    for step in (1, 2):
        IO.save_checkpoint({"w": torch.full((5000,), float(step))}, path)
        assert IO.load_checkpoint(path)["w"][0] == step and os.listdir(tmp_path) == ["a.ckpt"]
    TorchCheckpointIO().save_checkpoint({"step": 3}, path)
    assert path.is_file() and os.listdir(tmp_path) == ["a.ckpt"]
    IO.save_checkpoint({"step": 4}, path)
    IO.remove_checkpoint(path)
    IO.remove_checkpoint(path)
    assert os.listdir(tmp_path) == []
    path.mkdir()
    IO.save_checkpoint({"step": 3}, path)
    shutil.rmtree(path)
    path.mkdir()
    (path / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        IO.save_checkpoint({"step": 4}, path)
    assert os.listdir(tmp_path) == ["a.ckpt"] and os.listdir(path) == ["manifest.json"]


def test_what_is_refused() -> None:
    class Own(DistributedCheckpointIO):
        def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            super().save_checkpoint(*args, **kwargs)

    with pytest.raises(MisconfigurationException, match="Own.*all ranks"):
        AsyncCheckpointIO(Own())  # what it does in its save_checkpoint would be left out
    with pytest.raises(MisconfigurationException, match="storage_options"):
        IO.save_checkpoint({}, "a.ckpt", storage_options={"a": 1})
    with pytest.raises(CheckpointError, match=r"state\['f'\].*cannot be pickled"):
        IO.save_checkpoint({"f": lambda: 0}, "a.ckpt")
    assert os.listdir() == []


# --- several processes ---


def write_with_two(fabric: Fabric, path: str) -> Any:
    mesh = init_device_mesh("cpu", (2,))
    full = torch.arange(30_000.0).view(100, 300)
    same_everywhere = {f"w{i}": torch.full((10_000,), float(i)) for i in range(10)}
    state = {
        **same_everywhere,
        "rows": distribute_tensor(full, mesh, [Shard(0)]),
        "columns": distribute_tensor(full, mesh, [Shard(1)]),
        "copies": distribute_tensor(full, mesh, [Replicate()]),
        "one row": distribute_tensor(full.view(1, -1), mesh, [Shard(0)]),  # of which rank 1 has none
        "own": torch.full((10_000,), float(dist.get_rank())),  # as the buffers of a module may differ
        "shuffled": torch.randperm(10_000, generator=torch.Generator().manual_seed(dist.get_rank())),
        "rank": dist.get_rank(),
    }
    IO.save_checkpoint(state, path)
    return None


def read_with_three(fabric: Fabric, path: str) -> Any:
    mesh = init_device_mesh("cpu", (3,))
    full = torch.arange(30_000.0).view(100, 300)
    whole = IO.load_checkpoint(path)
    assert torch.equal(whole["rows"], full) and whole["rank"] == 0
    state = {n: distribute_tensor(torch.zeros(100, 300), mesh, [Shard(d)]) for d, n in enumerate(("rows", "columns"))}
    with tensors_on_demand():
        stored = IO.load_checkpoint(path)
    for name, target in state.items():
        fill(target, stored[name])
        assert torch.equal(target.full_tensor(), full)
    group = dist.new_group([1, 2])
    if dist.get_rank() > 0:
        mine = {"w": torch.full((10_000,), 7.0), "v": torch.ones(10_000)}
        save_sharded(mine, f"{path}.group", group)
        assert same(IO.load_checkpoint(f"{path}.group"), mine)
        manifest = json.loads(Path(f"{path}.group", "manifest.json").read_bytes())
        assert manifest["world_size"] == 2 and "__1_0.distcp" in manifest["files"]
    return gather(True)


def test_two_write_and_one_and_three_read(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    launch(2, write_with_two, str(path), start="ddp_spawn")  # processes that have nothing in common
    full = torch.arange(30_000.0).view(100, 300)
    found = IO.load_checkpoint(path)
    assert all(torch.equal(found[name], full) for name in ("rows", "columns", "copies")) and found["rank"] == 0
    assert torch.equal(found["one row"], full.view(1, -1))
    assert all(found[f"w{i}"].eq(i).all() for i in range(10))
    assert found["own"].eq(0).all()  # rank 0's counts
    assert torch.equal(found["shuffled"], torch.randperm(10_000, generator=torch.Generator().manual_seed(0)))
    sizes = [(path / f"__{rank}_0.distcp").stat().st_size for rank in range(2)]
    assert sum(sizes) < 1.2 * sum(t.nbytes for t in found.values() if isinstance(t, Tensor)), "written twice"
    assert min(sizes) > 0.3 * sum(sizes), "not shared out"
    assert json.loads((path / "manifest.json").read_bytes())["world_size"] == 2
    assert launch(3, read_with_three, str(path)) == [True] * 3


def fail_on_one(fabric: Fabric, path: str, failing: int) -> Any:
    def tries(state: dict[str, Any]) -> str:
        try:
            IO.save_checkpoint(state, path)
        except CheckpointError as e:
            return str(e)
        return ""

    state = {f"w{i}": torch.full((50_000,), 1.0) for i in range(4)}
    said = tries(state)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == failing:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    later = tries({name: tensor + 1 for name, tensor in state.items()})
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    return gather((said, later))


@pytest.mark.parametrize("failing", [0, 1])
def test_where_one_rank_cannot_write_all_raise_and_the_old_one_stands(failing: int, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    for said, later in launch(2, fail_on_one, str(path), failing):
        assert not said
        assert f"rank {failing}: File too large [EFBIG]" in later and "ulimit" in later and "untouched" in later
        assert f"rank {1 - failing}" not in later
    assert os.listdir(tmp_path) == ["a.ckpt"]
    assert all(t.eq(1).all() for t in IO.load_checkpoint(path).values())


def die_on_one(fabric: Fabric, path: str, dying: int) -> None:
    IO.save_checkpoint({f"w{i}": torch.full((50_000,), 1.0) for i in range(4)}, path)
    if dist.get_rank() == dying:
        write = saving.ShardedSave._write_files

        def dies(*args: Any) -> Any:
            write(*args)
            os.kill(os.getpid(), signal.SIGKILL)

        saving.ShardedSave._write_files = dies  # type: ignore[method-assign]
    IO.save_checkpoint({f"w{i}": torch.full((50_000,), 2.0) for i in range(4)}, path)


@pytest.mark.parametrize("dying", [0, 1])
def test_where_one_rank_is_killed_the_old_one_stands(dying: int, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    with pytest.raises(ProcessFailedError):
        launch(2, die_on_one, str(path), dying)
    assert [found for found, _ in checkpoints_in(tmp_path)] == [path]
    assert all(t.eq(1).all() for t in IO.load_checkpoint(path).values())


def train_with_fabric(path: str) -> Any:
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp_fork", plugins=DistributedCheckpointIO())

    def run(fabric: Fabric) -> Any:
        torch.manual_seed(3)
        model, optimizer = fabric.setup(module := nn.Linear(100, 100), torch.optim.Adam(module.parameters()))
        fabric.backward(model(torch.randn(4, 100)).sum())
        optimizer.step()
        fabric.save(path, {"model": model, "optimizer": optimizer, "step": 1})
        torch.nn.init.zeros_(module.weight)
        assert fabric.load(path, {"model": model, "optimizer": optimizer}) == {"step": 1}
        return module.weight.detach().clone()

    return fabric.launch(run)


def test_fabric_saves_with_two_and_loads_with_one(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    weight = train_with_fabric(str(path))
    assert sorted(p.name for p in path.glob("*.distcp")) == ["__0_0.distcp", "__1_0.distcp"]
    fabric = Fabric(accelerator="cpu", devices=1)  # no plug-in is needed to read
    model, optimizer = fabric.setup(module := nn.Linear(100, 100), torch.optim.Adam(module.parameters()))
    state = {"model": model, "optimizer": optimizer, "step": 0}
    fabric.load(path, state)
    assert torch.equal(module.weight, weight) and state["step"] == 1 and optimizer.state_dict()["state"][0]["step"] == 1


# --- damage ---


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "a.ckpt"
    IO.save_checkpoint({"w": torch.arange(3000.0), "step": 5, "small": torch.ones(3)}, path)
    return path


def test_no_byte_can_be_changed_or_cut_off_and_no_file_be_missing(saved: Path) -> None:
    names = sorted(os.listdir(saved))
    assert names == [".metadata", "__0_0.distcp", "manifest.json", "meta.pt"]
    for name in names:
        file = saved / name
        whole = file.read_bytes()
        step = 1 if name == "manifest.json" else 97
        for position in {*range(0, len(whole), step), *range(min(64, len(whole))), len(whole) - 1}:
            file.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
            with pytest.raises(CheckpointCorruptError, match=f"{name}"):
                IO.load_checkpoint(saved)
        for cut in (0, 1, len(whole) // 2, len(whole) - 1):
            file.write_bytes(whole[:cut])
            with pytest.raises(CheckpointCorruptError, match=f"{name}"):
                IO.load_checkpoint(saved)
        file.unlink()
        for read in (IO.load_checkpoint, read_outline, read_later):
            with pytest.raises(CheckpointCorruptError, match=f"{name}.*missing"):
                read(saved)
        file.write_bytes(whole)
    assert IO.load_checkpoint(saved)["step"] == 5


def test_foreign_and_contradictory_folders(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointCorruptError, match=r"empty.*manifest\.json"):
        IO.load_checkpoint(tmp_path / "empty")
    manifest = json.loads((saved / "manifest.json").read_bytes())
    for change, says in (
        ({"version": 4}, "version 4"),
        ({"version": 3, "prefix": "../"}, "no manifest"),
        ({"format": "other"}, "other"),
        ({"files": []}, "no manifest"),
        ({"tensors": {}}, "contradicts"),
        ({"tensors": {"w": {**manifest["tensors"]["w"], "dtype": "int32"}}}, "contradicts"),
        ({"files": {**manifest["files"], "../b": {}}}, "no manifest"),
    ):
        seal(saved, {**manifest, **change})
        with pytest.raises(CheckpointCorruptError, match=says):
            IO.load_checkpoint(saved)
    chunk = {**manifest["tensors"]["w"]["chunks"][0], "start": 100}
    seal(saved, {**manifest, "tensors": {"w": {**manifest["tensors"]["w"], "chunks": [chunk]}}})
    with pytest.raises(CheckpointError, match=r"a\.ckpt"):
        IO.load_checkpoint(saved)


# --- hostile pickles ---


class Hostile:
    def __reduce__(self) -> Any:
        return (os.mkdir, ("ran",))


def readers(path: Path) -> Iterator[Callable[[], Any]]:
    yield lambda: IO.load_checkpoint(path)
    yield lambda: TorchCheckpointIO().load_checkpoint(path)
    yield lambda: IO.load_checkpoint(path, map_location=lambda storage, location: storage)
    yield lambda: read_outline(path)
    yield lambda: read_later(path)
    yield lambda: Fabric(accelerator="cpu", devices=1, plugins=DistributedCheckpointIO()).load(path)


def test_a_hostile_index_is_never_opened(saved: Path) -> None:
    forge(saved, ".metadata", pickle.dumps(Hostile()))
    for read in readers(saved):
        read()
    assert newest_good(saved.parent) == saved
    assert not os.path.exists("ran")


@pytest.mark.parametrize("kind", ["archive", "inside", "pickle"])
def test_hostile_plain_values_are_refused(kind: str, saved: Path) -> None:
    if kind == "pickle":
        Path("h").write_bytes(pickle.dumps(Hostile()))
    else:
        stand_in = torch.zeros(()).expand(3000)
        content = {"state": {"w": stand_in, "step": Hostile()}, "tensors": {"w": stand_in}}
        torch.save(Hostile() if kind == "archive" else content, "h")
    forge(saved, "meta.pt", Path("h").read_bytes())
    for read in readers(saved):
        with pytest.raises(CheckpointUnsafeError, match="meta.pt.*not loaded"):
            read()
    with pytest.warns(UserWarning, match="not loaded"):
        assert newest_good(saved.parent) is None
    assert not os.path.exists("ran")


@pytest.mark.parametrize("content", ["archive", "pickle"])
def test_hostile_tensors_and_byte_entries_are_refused(content: str, saved: Path) -> None:
    torch.save({"w": Hostile()}, "h") if content == "archive" else Path("h").write_bytes(pickle.dumps(Hostile()))
    hostile = Path("h").read_bytes()
    forge(saved, "__0_0.distcp", hostile)
    manifest = json.loads((saved / "manifest.json").read_bytes())
    place = {**manifest["tensors"]["w"]["chunks"][0], "start": 0, "length": len(hostile)}
    for entry in (
        {**manifest["tensors"]["w"], "chunks": [place]},
        {"dtype": "float32", "shape": [3000], "chunks": []},  # nothing there at all
        {"dtype": "load", "shape": [3000], "chunks": [place]},  # a name of torch that is no dtype
    ):
        seal(saved, {**manifest, "tensors": {"w": entry}})
        for number, read in enumerate(readers(saved)):
            if number != 3:  # an outline reads no tensor
                with pytest.raises(CheckpointError, match=r"a\.ckpt"):
                    read()
    assert not os.path.exists("ran")


def test_only_who_asks_for_it_gets_other_objects(saved: Path) -> None:
    IO.save_checkpoint({"w": torch.ones(3000), "path": Path("x")}, saved)
    with pytest.raises(CheckpointUnsafeError, match="weights_only=False"):
        IO.load_checkpoint(saved)
    assert IO.load_checkpoint(saved, weights_only=False)["path"] == Path("x")


# --- names ---


def in_a_child(action: Callable[[], Any]) -> int:
    """Run in a process of its own; its exit status."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("atomic", [True, False])
@pytest.mark.parametrize("call", range(5))
def test_ended_at_any_rename_the_old_or_the_new_one_loads(
    call: int, atomic: bool, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on systems that cannot swap two names: there the old one is moved aside for a moment."""
    if not atomic:
        monkeypatch.setattr(folders, "_exchange", lambda a, b: False)

    def save() -> None:
        count = iter(range(call))

        def ending(real: Any, *args: Any, **kwargs: Any) -> Any:
            if next(count, None) is None:
                os._exit(9)
            return real(*args, **kwargs)

        for module, name in ((os, "rename"), (folders, "_exchange"), (shutil, "rmtree"), (os, "replace")):
            monkeypatch.setattr(module, name, functools.partial(ending, getattr(module, name)))
        IO.save_checkpoint({"step": 6}, saved)
        os._exit(0)

    status = in_a_child(save)
    assert status == (9 if call < (2 if atomic else 4) else 0)  # so many steps there are
    assert checkpoints_in(saved.parent)[0][0] == saved
    assert IO.load_checkpoint(saved)["step"] in ((5, 6) if status == 9 else (6,))
    IO.save_checkpoint({"step": 7}, saved)
    assert IO.load_checkpoint(saved)["step"] == 7
    IO.remove_checkpoint(saved)
    assert checkpoints_in(saved.parent) == []  # and nothing that was moved aside comes back


def test_what_killed_processes_left_is_removed_once_nobody_writes_it(tmp_path: Path) -> None:
    left, busy, slow, fresh = (folders.make_temporary(str(tmp_path / "a.ckpt")) for _ in range(4))
    Path(slow, "meta.pt").touch()  # written to just now, by a machine whose lock is not seen here
    lock = folders.lock_temporary(busy)
    assert lock is not None
    elsewhere = os.path.join(tmp_path, f".a.ckpt.{'0123456789abcdef' * 2}.tmp")  # by a machine with another kernel
    os.mkdir(elsewhere)
    for path, age in ((left, 100), (elsewhere, 100), (busy, 100_000), (slow, 100_000)):
        os.utime(path, (time.time() - age,) * 2)
    IO.save_checkpoint({}, tmp_path / "b.ckpt")
    os.close(lock)
    stay = ["b.ckpt", *map(os.path.basename, (busy, slow, fresh, elsewhere))]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(stay)
    os.utime(elsewhere, (time.time() - 100_000,) * 2)
    IO.save_checkpoint({}, tmp_path / "b.ckpt")
    stay = ["b.ckpt", *map(os.path.basename, (slow, fresh))]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(stay)


def test_the_newest_good_one_is_found_among_files_and_folders(saved: Path, tmp_path: Path) -> None:
    io = TorchCheckpointIO()
    io.save_checkpoint({"step": 1}, tmp_path / "file.ckpt")
    os.utime(tmp_path / "file.ckpt", (1, 1))
    torch.save({}, saved / "inner.ckpt")  # not descended into
    (tmp_path / "manifest.json").write_text("{}")  # of another program
    folders.link_folder(str(saved), str(tmp_path / "last.ckpt"))
    (tmp_path / "linked.ckpt").symlink_to(saved)
    assert [path.name for path, _ in checkpoints_in(tmp_path)] == ["last.ckpt", "file.ckpt"]  # each once
    assert newest_good(tmp_path) == tmp_path / "last.ckpt" and newest_good(saved) == saved
    (saved / "__0_0.distcp").write_bytes(b"")  # of all three names
    with pytest.warns(UserWarning, match="__0_0.distcp"):
        assert newest_good(tmp_path) == tmp_path / "file.ckpt"
