"""Tensors of a folder that are read when they are used, whole or the part that a rank holds.

Tests of ``treadle_fabric.checkpoint.stored.folder``, ``treadle_fabric.checkpoint.stored.tensor``,
``treadle_fabric.checkpoint.stored.regions``, ``treadle_fabric.checkpoint.stored.chunks``,
``treadle_fabric.checkpoint.folder.source``.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import pickle
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import pytest
import torch
import torch.distributed as dist
from tests.processes import run_in_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from treadle_fabric import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    DistributedCheckpointIO,
    Fabric,
    TorchCheckpointIO,
)
from treadle_fabric.checkpoint import (
    PerRank,
    StoredTensor,
    fill,
    in_memory,
    parts_on_demand,
    placed_like,
    read_outline,
    read_quickly,
    region,
    remote_checkpoints_in,
    tensors_on_demand,
)
from treadle_fabric.checkpoint.folder.source import LocalSource
from treadle_fabric.checkpoint.stored import chunks
from treadle_fabric.checkpoint.stored.regions import _cut

IO = DistributedCheckpointIO()


Reads = list[tuple[str, int]]


def opened(path: Any) -> dict[str, Any]:
    with tensors_on_demand():
        return IO.load_checkpoint(path)


def stored(tensor: Tensor, path: Path) -> StoredTensor:
    IO.save_checkpoint({"w": tensor}, path)
    found = opened(path)["w"]
    assert isinstance(found, StoredTensor)
    return found


def is_kept(tensor: Tensor) -> bool:
    assert isinstance(tensor, StoredTensor)
    return tensor._content.kept is not None


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """File and bytes of each read of a local file, since the list was cleared."""
    counts: Reads = []
    reading = LocalSource.reading

    @contextlib.contextmanager
    def counting(self: LocalSource, file: str) -> Iterator[Any]:
        with reading(self, file) as read:

            def count(start: int, into: memoryview) -> None:
                counts.append((file, len(into)))
                read(start, into)

            yield count

    monkeypatch.setattr(LocalSource, "reading", counting)
    return counts


# --- what a user does with a tensor ---


def test_a_stored_tensor_is_what_was_saved_whatever_is_done_with_it(tmp_path: Path) -> None:
    w = torch.randn(100, 200)
    state = {"w": w, "tied": w, "p": nn.Parameter(w + 1), "frozen": nn.Parameter(w.clone(), requires_grad=False)}
    IO.save_checkpoint(state, tmp_path / "a.ckpt")
    found = opened(tmp_path / "a.ckpt")
    s = found["w"]
    assert isinstance(s, StoredTensor) and (s.shape, s.dtype, s.device) == (w.shape, w.dtype, w.device)
    assert found["tied"] is s and isinstance(found["p"], nn.Parameter)
    assert [found[name].requires_grad for name in state] == [False, False, True, False]
    # an operation that reads keeps nothing
    for use in (lambda t: t + 1, lambda t: t.to(torch.bfloat16), lambda t: torch.cat([t, t]), lambda t: t.clone()):
        assert torch.equal(use(s), use(w)) and type(use(s)) is Tensor
    assert not is_kept(s) and not is_kept(s.detach())
    (found["p"] * 3).sum().backward()
    assert found["p"].grad.eq(3).all()
    # copies are plain
    into = io.BytesIO()
    torch.save(found, into)
    into.seek(0)
    for copied in (copy.deepcopy(found), pickle.loads(pickle.dumps(found)), torch.load(into, weights_only=True)):
        assert {name: type(each) for name, each in copied.items()} == {n: type(each) for n, each in state.items()}
        assert all(torch.equal(copied[name], state[name]) for name in state)
    IO.save_checkpoint(found, tmp_path / "b.ckpt")
    assert torch.equal(IO.load_checkpoint(tmp_path / "b.ckpt")["frozen"], w)
    assert not is_kept(s) and not is_kept(found["frozen"])
    assert (
        repr(s) == repr(w) and s.tolist() == w.tolist() and (s.numpy() == w.numpy()).all() and s[3, 4].item() == w[3, 4]
    )
    model = nn.Linear(200, 100, bias=False)
    renamed = {"weight": found.pop("frozen")}
    model.load_state_dict(renamed)
    assert torch.equal(model.weight, w) and not is_kept(renamed["weight"])


def test_what_is_written_to_a_stored_tensor_or_to_a_view_of_it_stays(tmp_path: Path) -> None:
    w = torch.randn(100, 200)
    a, b, c = (stored(w, tmp_path / f"{name}.ckpt") for name in "abc")
    a.zero_().add_(1)
    assert a.eq(1).all() and region(a, [1, 1], [2, 2]).eq(1).all()
    row, alias = b[3], b.detach()
    row.fill_(5)
    assert b[3].eq(5).all() and alias[3].eq(5).all() and torch.equal(b[4], w[4])
    torch._foreach_copy_([torch.empty(100, 200), d := torch.empty(100, 200)], [c, c])
    assert not is_kept(c) and torch.equal(d, w) and c.to("meta").is_meta
    c[0, 0] = 7
    target = torch.zeros(100, 200)
    fill(target, c)
    assert target[0, 0] == 7 and torch.equal(target[1:], w[1:])


def test_a_stored_tensor_tells_where_its_folder_is_not_there_any_more(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    for change in (lambda: IO.save_checkpoint({"w": torch.zeros(100, 200)}, path), lambda: IO.remove_checkpoint(path)):
        w = stored(torch.ones(100, 200), path)
        kept = w.clone()
        change()
        for use in (torch.abs, lambda w: region(w, [0, 0], [1, 1]), lambda w: fill(torch.empty(100, 200), w)):
            with pytest.raises(CheckpointError, match=r"a\.ckpt' was removed or replaced after it was loaded"):
                use(w)
        assert "removed or replaced" in repr(w) and kept.eq(1).all()


# --- parts ---


def layouts() -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(40, 30, 44, generator=generator)
    yield "in order", w
    yield "transposed", w.permute(2, 0, 1)
    yield "half", w.to(torch.bfloat16)
    yield "float8", w.to(torch.float8_e4m3fn)
    yield "bool", w > 0
    yield "complex", torch.complex(w, w)


@pytest.mark.parametrize(("at_once", "skipped"), [(8 * 2**20, 64 * 1024), (4096, 100)])
@pytest.mark.parametrize(("name", "tensor"), list(layouts()), ids=lambda value: value if isinstance(value, str) else "")
def test_every_part_of_every_layout(
    name: str, tensor: Tensor, skipped: int, at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "_AT_ONCE", at_once)
    monkeypatch.setattr(LocalSource, "skipped", skipped)
    monkeypatch.setattr(chunks, "_load_whole", None)
    w = stored(tensor, tmp_path / "a.ckpt")
    as_bytes = tensor.contiguous().view(torch.uint8)
    size = list(tensor.shape)
    width = tensor.element_size()
    for offsets, sizes in (
        ([0, 0, 0], size),
        ([3, 0, 0], [5, *size[1:]]),
        ([0, 7, 0], [size[0], 9, size[2]]),
        ([0, 0, 11], [*size[:2], 2]),
        ([4, 5, 6], [20, 21, 23]),
        ([1, 1, 1], [1, 1, 1]),
        ([5, 5, 5], [0, 3, 3]),
    ):
        last = slice(offsets[2] * width, (offsets[2] + sizes[2]) * width)
        expected = as_bytes[offsets[0] : offsets[0] + sizes[0], offsets[1] : offsets[1] + sizes[1], last]
        assert torch.equal(region(w, offsets, sizes).view(torch.uint8), expected)
        scattered = torch.zeros(*sizes[:2], 2 * sizes[2], dtype=tensor.dtype)[..., ::2]
        w._content.fill(scattered, offsets)
        assert torch.equal(scattered.clone(memory_format=torch.contiguous_format).view(torch.uint8), expected)
    if name in ("in order", "half"):
        wide = torch.zeros(tensor.shape, dtype=torch.float64)
        fill(wide, w)
        assert torch.equal(wide, tensor.double())


def test_only_what_is_asked_for_is_read(tmp_path: Path, counted: Reads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "_AT_ONCE", 2**18)
    w = stored(torch.randn(1000, 1000), tmp_path / "a.ckpt")
    assert sum(n for _, n in counted) < 4.2e6  # verified, and not read a second time
    few = 40_000  # what describes the archive
    for offsets, sizes, needed in (
        ([100, 0], [100, 1000], 400_000),
        ([0, 0], [1000, 1000], 4_000_000),
        ([7, 7], [1, 1], 4),
        ([0, 500], [10, 20], 40_000),
    ):
        counted.clear()
        region(w, offsets, sizes)
        assert needed <= sum(n for _, n in counted) < needed + few
    counted.clear()
    region(w, [0, 0], [1000, 500])  # half of each row: the other half is rather read along than asked for row by row
    assert max(n for _, n in counted) <= 2**18 and len(counted) < 30


# --- what a rank holds ---


def check_placements(path: str) -> None:
    rank = dist.get_rank()
    full = torch.arange(37.0 * 41).view(37, 41)
    cube = torch.arange(24.0 * 16 * 3).view(24, 16, 3)
    found = opened(path)
    flat, grid = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    for mesh, placements in (
        (flat, [Shard(0)]),
        (flat, [Shard(1)]),
        (flat, [Replicate()]),
        (grid, [Shard(0), Shard(1)]),
        (grid, [Shard(1), Shard(1)]),
        (grid, [Replicate(), Shard(0)]),
        (grid, [Shard(0), Replicate()]),
        (grid, [Shard(0), Shard(0)]),
    ):
        for source in (found["full"], full):
            target = distribute_tensor(torch.zeros(37, 41), mesh, placements)
            fill(target, source)
            expected = distribute_tensor(full, mesh, placements)
            assert torch.equal(target.to_local(), expected.to_local()), (placements, rank)
            again: Any = placed_like(source, target)
            assert torch.equal(again.to_local(), expected.to_local()) and again.placements == target.placements
    one_row = distribute_tensor(torch.zeros(1, 2000), flat, [Shard(0)])  # three ranks have none of it
    fill(one_row, found["row"])
    assert one_row.to_local().numel() == (2000 if rank == 0 else 0) and one_row.full_tensor().eq(3).all()
    assert not any(is_kept(each) for each in found.values())
    # FSDP over tensor parallelism cuts what tensor parallelism has cut
    model = nn.Sequential(nn.Linear(16, 24, bias=False), nn.Linear(24, 16, bias=False))
    parallelize_module(model, grid["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    for layer in model:
        fully_shard(layer, mesh=grid["dp"])
    for layer, source in zip(model, (cube[..., 0], cube[..., 1].t()), strict=True):
        weight: Any = layer.weight
        fill(weight, source)
        assert isinstance(weight, DTensor) and torch.equal(weight.full_tensor(), source), weight.placements
        copied: Any = placed_like(source, weight)
        assert torch.equal(copied.full_tensor(), source)
        fill(weight, copied)
    with pytest.raises(CheckpointMismatchError, match="without communication"):
        fill(model[0].weight, distribute_tensor(torch.zeros(24, 16), flat, [Shard(0)]))
    with pytest.raises(CheckpointMismatchError, match=r"\[24, 16\] does not fit one of the shape \[16, 24\]"):
        fill(model[1].weight, cube[..., 0])
    with pytest.raises(CheckpointMismatchError, match="summands"):
        fill(DTensor.from_local(torch.zeros(37, 41), flat, [Partial()]), full)
    plain = torch.zeros(37, 41, dtype=torch.float64)
    fill(nn.Parameter(plain), found["full"])
    assert torch.equal(plain, full.double())


@pytest.mark.parametrize("cuts", [(3, 2), (2, 4, 3), (5, 7)])
def test_ranges_are_cut_as_a_tensor_of_them_is(cuts: tuple[int, ...]) -> None:
    """Each second range of several, cut once more: as ``torch.chunk`` cuts their indices, with nothing for the last."""
    ranges = [(7 * i + 2, 7 * i + 2 + i % 4 + 1) for i in range(5)]
    for parts in cuts:
        indices = torch.cat([torch.arange(begin, end) for begin, end in ranges])
        chunks = [each.tolist() for each in indices.chunk(parts)]
        found = _cut(ranges, parts)
        assert [[i for run in part for i in range(*run)] for part in found] == chunks + [[]] * (parts - len(chunks))
        assert all(begin < end for part in found for begin, end in part)
        ranges = found[0] + found[-2]


def in_group(path: str) -> None:
    Fabric(accelerator="cpu", devices=4, strategy="ddp").launch(lambda fabric: check_placements(path))


def test_each_rank_fills_what_it_holds(tmp_path: Path) -> None:
    full = torch.arange(37.0 * 41).view(37, 41)
    many = {"full": full.repeat(1, 9)[:, :41].contiguous(), "row": torch.full((1, 2000), 3.0)}
    from treadle_fabric.checkpoint.distributed import split

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(split, "_LARGE", 1024)
        IO.save_checkpoint(many, tmp_path / "a.ckpt")
    run_in_ranks(in_group, os.fspath(tmp_path / "a.ckpt"), devices=4)
    assert torch.equal(in_memory(opened(tmp_path / "a.ckpt")["full"]), full)


# --- behind a URL ---


def test_a_remote_folder_is_read_as_a_local_one(tmp_path: Path, memory: Any) -> None:
    w, state = torch.randn(100, 200), {"own": PerRank({"n": 1}), "step": 3}
    IO.save_checkpoint({"w": w, **state}, tmp_path / "a.ckpt")
    at = "memory://runs/a.ckpt"
    for prefix in ("", f"{'3f' * 16}/"):
        copied_to(memory, tmp_path / "a.ckpt", "/runs/a.ckpt", prefix)
        for io_ in (IO, TorchCheckpointIO()):
            found = io_.load_checkpoint(at)
            assert torch.equal(found["w"], w) and found["own"] == [{"n": 1}] and found["step"] == 3
        outline = read_outline(at)
        assert outline["w"].is_meta and outline["step"] == 3 == read_quickly(at)["step"]
        assert [url for url, _ in remote_checkpoints_in("memory://runs")] == [at]
        with parts_on_demand():
            later = opened(at)
        assert torch.equal(region(later["w"], [3, 4], [20, 30]), w[3:23, 4:34]) and later["own"][0] == {"n": 1}
        copied_to(memory, tmp_path / "a.ckpt", "/runs/a.ckpt", f"{'ab' * 16}/")
        for use in (lambda found: found["w"] + 1, lambda found: found["own"][0]):
            with pytest.raises(CheckpointError, match="memory://runs/a.ckpt' was removed or replaced"):
                use(later)
        name = next(name for name in memory.find("/runs/a.ckpt") if name.endswith(".distcp"))
        content = bytearray(memory.cat_file(name))
        content[len(content) // 2] ^= 1
        memory.pipe_file(name, bytes(content))
        with pytest.raises(CheckpointCorruptError, match=r"memory://runs/a.ckpt' is damaged.*__0_0"):
            IO.load_checkpoint(at)
        memory.rm_file(name)
        with pytest.raises(CheckpointCorruptError, match=r"memory://runs/a.ckpt' is not whole.*__0_0"):
            IO.load_checkpoint(at)
        memory.rm("/runs", recursive=True)
    with pytest.raises(CheckpointNotFoundError):
        IO.load_checkpoint(at)


@pytest.fixture
def memory() -> Iterator[Any]:
    fs = fsspec.filesystem("memory")
    yield fs
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


def copied_to(fs: Any, folder: Path, at: str, prefix: str) -> None:
    """Copy a local folder to a remote place, with a prefix as a save to that place gives its files."""
    if fs.exists(at):
        fs.rm(at, recursive=True)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    del manifest["crc32"]
    body = json.dumps({**manifest, **({"version": 3, "prefix": prefix} if prefix else {})})[1:].encode()
    for name in manifest["files"]:
        fs.pipe_file(f"{at}/{prefix}{name}", (folder / name).read_bytes())
    fs.pipe_file(f"{at}/manifest.json", b'{"crc32": "%08x",\n' % zlib.crc32(body) + body)


# --- all of a state ---


class Keeps(nn.Module):
    """Keeps what it is given, as metrics do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(100, 100)
        self.total = torch.zeros(100, 100)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x)
        return found

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}total"] = self.total

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self.total = state_dict.pop(f"{prefix}total")
        super()._load_from_state_dict(state_dict, prefix, *args)


class Store:
    """Keeps its state dict."""

    def __init__(self) -> None:
        self.kept: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        return self.kept

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.kept = state


class Pair(NamedTuple):
    a: Tensor
    b: Tensor


def test_what_fabric_loads_is_in_memory_and_read_once_into_its_place(tmp_path: Path, counted: Reads) -> None:
    torch.manual_seed(0)
    fabric = Fabric(accelerator="cpu", devices=1, plugins=IO)
    path, w = tmp_path / "a.ckpt", torch.randn(100, 100)

    def make() -> dict[str, Any]:
        model = nn.Sequential(nn.Linear(100, 100), Keeps())
        optimizer = torch.optim.Adam(model.parameters())
        model(torch.randn(2, 100)).sum().backward()
        optimizer.step()
        return {"model": model, "optimizer": optimizer, "store": Store(), "pair": Pair(w, w), "tied": None}

    saved, loaded = make(), make()
    saved["model"][1].total, saved["tied"] = w + 1, [w, w.detach()]
    saved["store"].kept = {"w": w + 2}
    with pytest.warns(UserWarning, match="named tuple"):
        fabric.save(path, {**saved, "rest": {"tied": [w, w]}})
    counted.clear()
    rest = fabric.load(path, loaded)
    whole = sum(each.stat().st_size for each in path.iterdir())
    assert sum(n for _, n in counted) < 2.5 * whole  # checked, and read
    IO.remove_checkpoint(path)  # nothing is read any more
    for a, b in zip(saved["model"].state_dict().items(), loaded["model"].state_dict().items(), strict=True):
        assert a[0] == b[0] and type(b[1]) is Tensor and torch.equal(a[1], b[1])
    assert type(loaded["model"][1].total) is Tensor and type(loaded["store"].kept["w"]) is Tensor
    states = zip(saved["optimizer"].state.values(), loaded["optimizer"].state.values(), strict=True)
    assert all(torch.equal(a[n], b[n]) and type(b[n]) is Tensor for a, b in states for n in a)
    tied = rest["rest"]["tied"]
    assert tied[0] is tied[1] and type(tied[0]) is Tensor and type(loaded["pair"].a) is Tensor
    assert torch.equal(loaded["tied"][0], w) and loaded["tied"][0] is loaded["tied"][1]


# --- the check is shared out ---


def check_together(path: str, missing: str, counts: Reads) -> None:
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")

    def run(fabric: Fabric) -> None:
        assert torch.equal(fabric.load(path)["a"], torch.full((50_000,), 1.0))
        box: list[Any] = [None, None]
        dist.all_gather_object(box, [name for name, length in counts if length > 100_000])
        # both read both tensors, and each has checked one of the two files
        assert sorted(box[0] + box[1]) == ["__0_0.distcp"] * 3 + ["__1_0.distcp"] * 3, box
        if fabric.global_rank == 0:
            os.rename(missing, f"{missing}.away")
        fabric.barrier()
        with pytest.raises(CheckpointCorruptError, match="is not whole: its file '__1_0.distcp' is missing"):
            fabric.load(path)
        fabric.barrier()
        if fabric.global_rank == 0:
            os.rename(f"{missing}.away", missing)

    fabric.launch(run)


def save_with_two(path: str) -> None:
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp", plugins=DistributedCheckpointIO())
    state = {name: torch.full((50_000,), float(place)) for place, name in enumerate("zab")}
    fabric.launch(lambda fabric: fabric.save(path, {"a": state["a"], "b": state["b"]}))


def test_the_ranks_of_a_node_share_out_the_check_and_fail_together(tmp_path: Path, counted: Reads) -> None:
    path = tmp_path / "a.ckpt"
    run_in_ranks(save_with_two, os.fspath(path))
    counted.clear()
    run_in_ranks(check_together, os.fspath(path), os.fspath(path / "__1_0.distcp"), counted)
