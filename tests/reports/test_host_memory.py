"""The host's memory does not grow with the number of processes that read a file, nor with the number of saves.

Every rank read the whole file into memory of its own, and checked every byte of it; a save in the background pinned a
block for each tensor; a fingerprint made a Python integer of each sum, and a NumPy array of dates one of each byte; in
a save to a folder every rank got the fingerprints of all ranks.

Tests of ``treadle_fabric.checkpoint.host.mapping``, ``treadle_fabric.checkpoint.host.checked``,
``treadle_fabric.checkpoint.host.arena``, ``treadle_fabric.checkpoint.fingerprint``,
``treadle_fabric.coordination.once_a_node``.
"""

from __future__ import annotations

import gc
import mmap
import os
import shutil
import tracemalloc
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.processes import run_in_ranks
from tests.trainer.models import loader
from torch import Tensor, nn

import treadle as L
from treadle_fabric import (
    AsyncCheckpointIO,
    CheckpointCorruptError,
    CheckpointError,
    DistributedCheckpointIO,
    Fabric,
    TorchCheckpointIO,
    TreadleError,
)
from treadle_fabric.checkpoint import archive, files_mapped, fingerprint, reading
from treadle_fabric.checkpoint.host import arena, mapping
from treadle_fabric.checkpoint.host.arena import Arena
from treadle_fabric.coordination import HostGroup, once_a_node

linux = pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="files are mapped on Linux only")


@pytest.fixture(autouse=True)
def small_files_are_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """As large ones are."""
    monkeypatch.setattr(mapping, "_WORTHWHILE", 0)


def is_mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()


def rewrite(path: Path) -> None:
    """As ``cp`` onto the file does; a process that still has the file mapped is killed where it reads it (SIGBUS)."""
    with path.open("r+b") as file:
        file.truncate(0)


class Keeps:
    """An object of the user's that refers to what it was given, and a part of it."""

    def __init__(self) -> None:
        self.value: Any = torch.zeros(3000)

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert is_mapped(Path("a.ckpt").resolve())
        self.value = state["value"][5:7]


class Net(nn.Module):
    """A module whose buffer becomes what is in the file, of whatever shape."""

    def __init__(self, fill: float) -> None:
        super().__init__()
        self.layer = nn.Linear(50, 50)
        nn.init.constant_(self.layer.weight, fill)
        self.register_buffer("seen", torch.full((20,), fill))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        self.seen = state_dict[f"{prefix}seen"]
        super()._load_from_state_dict(state_dict, prefix, *rest)


def restore_and_rewrite(path: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    model = Net(0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    keeps = Keeps()
    state = {"model": model, "optimizer": optimizer, "keeps": keeps, "plain": None}
    remainder = fabric.load(path, state)
    shared: Any = remainder["whole"], remainder["part"]
    assert not is_mapped(path)
    rewrite(path)
    assert bool((model.layer.weight == 3).all()) and bool((model.seen == 3).all())
    assert all(bool((s["momentum_buffer"] == 2).all()) for s in optimizer.state.values())
    assert keeps.value.tolist() == [4, 4] and bool((state["plain"] == 5).all())
    shared[0][0] = 7.0
    assert shared[1].tolist() == [7, 6]  # a part is still a part
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()


@linux
def test_nothing_that_stays_after_a_restore_is_a_part_of_the_file(tmp_path: Path) -> None:
    model = Net(3.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    for parameter in model.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.full_like(parameter, 2)
    keeps, whole = Keeps(), torch.full((5000,), 6.0)
    keeps.value.fill_(4)
    state = {"model": model, "optimizer": optimizer, "keeps": keeps, "plain": torch.full((9000,), 5.0)}
    path = tmp_path / "a.ckpt"
    Fabric(accelerator="cpu", devices=1).save(path, {**state, "whole": whole, "part": whole[:2]})
    run_in_ranks(restore_and_rewrite, path, devices=1)


@linux
def test_what_is_garbage_in_a_circle_is_let_go_of_as_well(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    TorchCheckpointIO().save_checkpoint({"a": torch.ones(10_000), "b": torch.ones(10_000)}, path)
    kept = []
    gc.disable()
    try:
        for _ in range(3):
            with files_mapped():
                circle: Any = TorchCheckpointIO().load_checkpoint(path)
                circle["circle"] = circle
                kept.append(circle["a"])
                del circle
            gc.collect()  # unmaps what was put in the place of the map
        assert all(bool((each == 1).all()) for each in kept) and not is_mapped(path)
    finally:
        gc.enable()


@linux
@pytest.mark.parametrize("large", [False, True])
def test_a_small_file_is_read(tmp_path: Path, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """To keep account of what is mapped takes longer than to read little."""
    monkeypatch.undo()
    path = tmp_path / "a.ckpt"
    TorchCheckpointIO().save_checkpoint({"w": torch.ones(300_000 if large else 200_000)}, path)
    with files_mapped():
        state = TorchCheckpointIO().load_checkpoint(path)
        assert is_mapped(path) == large
        assert state["w"].sum() == len(state["w"])


def test_a_user_who_reads_a_file_has_it_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    TorchCheckpointIO().save_checkpoint({"w": torch.ones(3)}, path)
    loaded = TorchCheckpointIO().load_checkpoint(path)
    rewrite(path)
    assert loaded["w"].tolist() == [1, 1, 1]


@linux
@pytest.mark.parametrize("location", ["cpu", None, torch.device("cpu"), {"cpu": "meta"}, "meta", lambda s, _: s])
def test_a_mapped_file_is_read_as_any_other(tmp_path: Path, location: Any) -> None:
    path, packed = tmp_path / "a.ckpt", tmp_path / "packed.ckpt"
    state = {"w": torch.arange(300.0), "none": torch.zeros(0), "half": torch.ones(3, dtype=torch.float16)}
    TorchCheckpointIO().save_checkpoint(state, path)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    read = TorchCheckpointIO().load_checkpoint(path, map_location=location)
    before = path.read_bytes()
    for each in (path, packed):
        with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED), files_mapped():
            mapped = TorchCheckpointIO().load_checkpoint(each, map_location=location)
            assert is_mapped(path) == (each == path and not mapped["w"].is_meta)
            for name, tensor in read.items():
                assert tensor.device == mapped[name].device and tensor.dtype == mapped[name].dtype
                assert tensor.is_meta or torch.equal(tensor, mapped[name])
            mapped["w"].mul_(2)
    assert path.read_bytes() == before


# --- the Trainer, and several processes ---


class Model(L.LightningModule):
    def __init__(self, table: Tensor | None = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(2, 2)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layer(torch.ones(1, 2)).sum()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.noted = checkpoint["state_dict"]["layer.weight"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters())


class Looks(L.Callback):
    """Whether the file is mapped, at the hooks of a fit."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seen: list[bool] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seen.append(is_mapped(self.path))

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *rest: Any) -> None:
        self.seen.append(is_mapped(self.path))


def trainer(devices: int = 1, **given: Any) -> L.Trainer:
    return L.Trainer(
        **{"max_steps": 2, "callbacks": [], **given}, accelerator="cpu", devices=devices, logger=False,
        strategy="ddp" if devices > 1 else "auto", enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip


def saved(path: Path, **given: Any) -> Path:
    run = trainer(**given)
    run.fit(Model(torch.ones(1000)), loader(8))
    run.save_checkpoint(path)
    return path


def checks_here() -> list[str]:
    """Every byte of what is named in the list that is returned was read."""
    read: list[str] = []
    check, verify = archive._check_record, reading.verify
    archive._check_record = lambda zip, record, path: read.append(Path(path).name) or check(zip, record, path)

    def noted(source: Any, manifest: Any, names: Any) -> None:
        read.extend(f"{Path(source.path).name}/{name}" for name in names)
        verify(source, manifest, names)

    reading.verify = noted
    return read


def resume(folder: Path, name: str) -> None:
    """Each rank: restores, and is left with nothing of the file; the first rank has checked it for the other."""
    path, read = folder / name, checks_here()
    looks = Looks(path)
    run = trainer(2, max_steps=4, callbacks=[looks])
    model = Model()
    run.fit(model, loader(8), ckpt_path=path)
    assert run.global_step == 4 and looks.seen == [True, False, False]
    assert bool(model.noted.isfinite().all())
    (folder / f"checked by {run.global_rank}").write_text("\n".join(each for each in read if each.startswith(name)))


@linux
@pytest.mark.parametrize("name", ["a.ckpt", "folder.ckpt"])
def test_a_node_checks_each_file_once_and_the_memory_is_that_of_the_file(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path / name, plugins=[DistributedCheckpointIO()] if name.startswith("folder") else [])
    run_in_ranks(resume, tmp_path, name)
    first, second = ({*(tmp_path / f"checked by {rank}").read_text().split()} for rank in range(2))
    if path.is_dir():  # the ranks share it out; what is of one rank is checked by who reads it
        files = {f"{name}/{each}" for each in os.listdir(path) if each != "manifest.json" and "rank" not in each}
        assert first | second == files and not first & second
    else:
        assert first == {name} and not second


def fabric_ranks(folder: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    path, model = folder / "a.ckpt", nn.Linear(2, 2)
    for damaged, kind in (("cut.ckpt", CheckpointCorruptError), ("bad.ckpt", CheckpointCorruptError)):
        with pytest.raises(kind) as raised:
            fabric.load(folder / damaged, {"model": model})
        assert ("Rank 0 could not read" in str(raised.value)) == (fabric.global_rank == 1)
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        fabric.load(folder / "missing.ckpt", {"model": model})
    read = checks_here()
    fabric.load(path, {"model": model})
    assert bool(read) == (fabric.global_rank == 0)
    # after it was checked, another file takes the name: that one is checked where it is read
    loaded = TorchCheckpointIO.load_checkpoint

    def replaced(io: Any, where: Any, *rest: Any, **more: Any) -> Any:
        content = loaded(io, where, *rest, **more) if fabric.global_rank == 0 else None
        if fabric.global_rank == 0:
            shutil.copyfile(folder / "bad.ckpt", folder / "new")
            os.replace(folder / "new", path)
            return content
        return loaded(io, where, *rest, **more)

    TorchCheckpointIO.load_checkpoint = replaced  # type: ignore[method-assign]
    if fabric.global_rank == 0:
        fabric.strategy.load_checkpoint(path, {"model": model})
    else:
        with pytest.raises(CheckpointCorruptError, match="damaged"):
            fabric.strategy.load_checkpoint(path, {"model": model})
    TorchCheckpointIO.load_checkpoint = loaded  # type: ignore[method-assign]
    # one rank alone may use load_raw
    if fabric.global_rank == 1:
        read.clear()
        fabric.load_raw(folder / "raw.ckpt", model)
        assert read and bool((model.weight == 1).all())
    fabric.barrier()
    on_two_nodes(fabric)


def on_two_nodes(fabric: Fabric) -> None:
    """Each of the two ranks is a node; then neither is the first of its node."""
    rank = fabric.global_rank
    nodes = SimpleNamespace(world_size=2, global_rank=rank, local_rank=0, node_rank=rank)
    assert once_a_node(nodes, lambda: f"of {rank}", "failed") == f"of {rank}"

    def fails() -> None:
        if rank == 1:
            raise ZeroDivisionError("mine")

    with pytest.raises(
        ZeroDivisionError if rank == 1 else TreadleError, match="mine" if rank else "Rank 1 failed: mine"
    ):
        once_a_node(nodes, fails, "failed")
    nobody = SimpleNamespace(world_size=2, global_rank=rank, local_rank=1, node_rank=0)
    assert once_a_node(nobody, lambda: 1 / 0, "failed") is None


def test_a_file_that_failed_ends_all_ranks_and_another_file_is_checked(tmp_path: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    path = tmp_path / "a.ckpt"
    fabric.save(path, {"model": nn.Linear(2, 2), "more": torch.ones(1000)})
    good = path.read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(good[:-100])
    place = good.index(torch.ones(1000).numpy().tobytes()) + 2000
    (tmp_path / "bad.ckpt").write_bytes(good[:place] + b"\1" + good[place + 1 :])
    TorchCheckpointIO().save_checkpoint({"weight": torch.ones(2, 2), "bias": torch.ones(2)}, tmp_path / "raw.ckpt")
    run_in_ranks(fabric_ranks, tmp_path)


def load_and_rewrite(path: Path) -> None:
    model = Model.load_from_checkpoint(path)
    assert not is_mapped(path)
    rewrite(path)
    assert bool((model.hparams.table == 1).all()) and torch.equal(model.noted, model.layer.weight)


@linux
def test_a_module_from_a_file_is_no_part_of_the_file(tmp_path: Path) -> None:
    run_in_ranks(load_and_rewrite, saved(tmp_path / "a.ckpt"), devices=1)


# --- saves in the background ---


class Cuda:
    """Stands for ``torch.cuda.cudart()``: what is pinned."""

    def __init__(self, error: int = 0) -> None:
        self.error = error
        self.pinned: dict[int, int] = {}

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        assert flags == 1
        if not self.error:
            self.pinned[address] = size
        return self.error

    def cudaHostUnregister(self, address: int) -> int:
        del self.pinned[address]
        return 0


def test_one_block_is_pinned_to_its_size_and_unpinned_before_it_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cuda)
    memory = Arena()
    first = memory._provide(1_000_000, pinned=True)
    ((address, size),) = cuda.pinned.items()
    assert address == first.data_ptr() and 1_000_000 <= size == memory.nbytes < 1_020_000
    assert memory._provide(1_010_000, pinned=True) is first  # a state that grew by little
    assert memory._provide(10, pinned=False) is first
    del first
    memory._provide(3_000_000, pinned=True)
    assert list(cuda.pinned.values()) == [memory.nbytes] and memory.nbytes >= 3_000_000
    memory.close()
    assert not cuda.pinned and memory.nbytes == 0
    forgotten = Arena()
    forgotten._provide(1000, pinned=False)
    assert not cuda.pinned
    forgotten._provide(1000, pinned=True)
    assert len(cuda.pinned) == 1
    del forgotten
    assert not cuda.pinned


def test_memory_that_cannot_be_pinned_is_used_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Cuda(error=2))
    monkeypatch.setattr(arena, "_forget_error", lambda: None)
    memory = Arena()
    with pytest.warns(UserWarning, match=r"could not be pinned \(CUDA error 2\)"):
        block = memory._provide(1000, pinned=True)
    assert memory._provide(1000, pinned=True) is block  # and does not try again at each save
    memory.close()


class Remembers(TorchCheckpointIO):
    """Has the addresses of what it wrote, and the states themselves if asked to keep them."""

    def __init__(self, keep: bool) -> None:
        super().__init__()
        self.keep = keep
        self.addresses: list[list[int]] = []
        self.states: list[dict[str, Any]] = []

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        self.addresses.append([tensor.data_ptr() for tensor in checkpoint.values()])
        if self.keep:
            self.states.append(checkpoint)
        super().save_checkpoint(checkpoint, path, storage_options)


@pytest.mark.parametrize("keep", [False, True])
def test_saves_in_the_background_use_one_block_again(tmp_path: Path, keep: bool) -> None:
    inner = Remembers(keep)
    io = AsyncCheckpointIO(inner)
    state = {f"w{i}": torch.full((1001,), float(i)) for i in range(5)} | {"none": torch.zeros(0)}
    for number in range(3):
        io.save_checkpoint(state, tmp_path / f"{number}.ckpt")
        io.wait()
        state["w3"] += 10
    size = sum(tensor.nbytes for tensor in state.values())
    assert size <= io._arena.nbytes <= 1.02 * size + 6 * 64
    assert (inner.addresses[0] == inner.addresses[1] == inner.addresses[2]) is not keep
    for number in range(3):
        files = TorchCheckpointIO().load_checkpoint(tmp_path / f"{number}.ckpt")
        for content in (files, inner.states[number]) if keep else (files,):
            assert content["w3"][0] == 3 + 10 * number and content["w4"][1000] == 4
    io.teardown()
    assert io._arena.nbytes == 0


# --- fingerprints ---


def test_a_fingerprint_takes_no_python_object_for_each_sum() -> None:
    tensor = torch.zeros(20_000_000, dtype=torch.uint8)
    plain = fingerprint(tensor)
    tracemalloc.start()
    try:
        assert fingerprint(tensor) == plain
        assert tracemalloc.get_traced_memory()[1] < 200_000
    finally:
        tracemalloc.stop()
    found = {plain}
    for place in (0, 2048 * 3, 2048 * 9000 + 1, 20_000_000 - 1):  # of the last, no whole row is left
        tensor[place] = 1
        found.add(fingerprint(tensor))
        tensor[place] = 0
    assert len(found) == 5 and fingerprint(tensor.view(2, -1)) not in found


# --- more of the kind ---


def test_a_numpy_array_that_torch_does_not_know_takes_no_python_object_for_each_byte(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    dates = numpy.arange(200_000).astype("datetime64[s]")
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.save(tmp_path / "a.ckpt", {"dates": dates})
    fabric.load(tmp_path / "a.ckpt")  # imports what it needs
    tracemalloc.start()
    try:
        loaded = fabric.load(tmp_path / "a.ckpt")["dates"]
        assert tracemalloc.get_traced_memory()[1] < 4 * dates.nbytes
    finally:
        tracemalloc.stop()
    assert (loaded == dates).all() and loaded.dtype == dates.dtype


def save_folder(folder: Path) -> None:
    """The ranks have one tensor alike, and of another each its own; rank 0 writes its own of that."""
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp", plugins=DistributedCheckpointIO())
    fabric.launch()
    received: list[int] = []
    bytes_of, receive = HostGroup.bytes_of, HostGroup._receive

    def noted(real: Any) -> Any:
        def call(*args: Any) -> Any:
            found = real(*args)
            received.append(len(found))
            return found

        return call

    HostGroup.bytes_of, HostGroup._receive = noted(bytes_of), noted(receive)  # type: ignore[method-assign]
    fabric.save(folder / "c", {"same": torch.ones(300_000), "own": torch.full((300_000,), float(fabric.global_rank))})
    assert 2 < len(received) and sum(received) < 2000  # one summary of two tensors, and what came of each step
    loaded = fabric.load(folder / "c")
    assert bool((loaded["own"] == 0).all()) and bool((loaded["same"] == 1).all())


def test_no_rank_gets_the_fingerprints_of_all(tmp_path: Path) -> None:
    run_in_ranks(save_folder, tmp_path)
