"""What each rank has of its own: gathered by one rank, saved in a file or a folder, and read one by one.

Tests of ``treadle_fabric.checkpoint.per_rank``, ``treadle_fabric.checkpoint.fingerprint``,
``treadle_fabric.coordination.objects``, ``treadle_fabric.coordination.on_rank_zero``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from treadle.cli.main import main
from treadle_fabric import (
    CheckpointCorruptError,
    CheckpointError,
    DistributedCheckpointIO,
    Fabric,
    TorchCheckpointIO,
    TreadleError,
    all_gather_objects,
    gather_objects,
    on_rank_zero,
)
from treadle_fabric.checkpoint import PerRank, parts_on_demand, read_outline
from treadle_fabric.checkpoint.distributed.saving import save_sharded

STORES = pytest.mark.parametrize("store", [TorchCheckpointIO, DistributedCheckpointIO])
LARGE = 100_000  # values; such a tensor is sent by itself


def run(function: Any, *arguments: Any, devices: int = 2, store: Any = TorchCheckpointIO) -> None:
    Fabric(accelerator="cpu", devices=devices, strategy="ddp_fork", plugins=store()).launch(function, *arguments)


# --- talking ---


def objects_of(rank: int) -> dict[str, Any]:
    whole = torch.arange(LARGE, dtype=torch.float32) + rank
    kinds = [torch.full((n,), rank, dtype=d) for n in (0, 1, 3) for d in (torch.bfloat16, torch.bool, torch.complex64)]
    # as many objects as there are ranks before it, so that the ranks send different numbers of tensors
    return {"whole": whole, "tail": whole[-3:], "kinds": kinds, "rank": rank, "more": [whole.clone()] * rank}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    tensors = zip([*a["kinds"], *a["more"], a["tail"]], [*b["kinds"], *b["more"], b["tail"]], strict=True)
    return a["rank"] == b["rank"] and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in tensors)


def gathers(fabric: Fabric) -> None:
    rank, mine = fabric.global_rank, objects_of(fabric.global_rank)
    for dst in (0, 2):
        found = gather_objects(fabric, mine, dst)
        assert (found is not None) == (rank == dst)
        for source, theirs in enumerate(found or []):
            assert same(theirs, objects_of(source))
            assert (theirs is mine) == (source == rank)
            theirs["whole"][-1] = -1  # tensors that shared memory still do
            assert theirs["tail"][-1] == -1
        mine = objects_of(rank)
    everywhere = all_gather_objects(fabric, mine)
    assert len(everywhere) == 3 and all(same(theirs, objects_of(source)) for source, theirs in enumerate(everywhere))
    assert all_gather_objects(fabric, "abc"[rank]) == ["a", "b", "c"]


def test_objects_come_to_one_rank_or_to_all() -> None:
    run(gathers, devices=3)


def gathers_beside_a_group_of_devices(fabric: Fabric) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "get_backend_config", lambda group: "cuda:nccl")
        made = []
        patch.setattr(dist, "new_group", lambda new=dist.new_group, **kwargs: made.append(new(**kwargs)) or made[-1])
        for _ in range(2):
            found = gather_objects(fabric, objects_of(fabric.global_rank))
            assert found is None or same(found[1], objects_of(1))
            assert same(all_gather_objects(fabric, objects_of(fabric.global_rank))[1], objects_of(1))
        assert [dist.get_backend(group) for group in made] == ["gloo"]


def test_where_the_group_reaches_devices_only_another_one_is_made_once() -> None:
    run(gathers_beside_a_group_of_devices)


def test_one_process_gets_its_own_object() -> None:
    fabric, mine = Fabric(accelerator="cpu", devices=1), object()
    assert gather_objects(fabric, mine) == all_gather_objects(fabric, mine) == [mine]
    assert on_rank_zero(fabric, lambda: mine, "did nothing") is mine
    with pytest.raises(ZeroDivisionError):
        on_rank_zero(fabric, lambda: 1 / 0, "did nothing")


def acts(fabric: Fabric) -> None:
    assert on_rank_zero(fabric, lambda: {"from": fabric.global_rank}, "could not count") == {"from": 0}
    for error, elsewhere in ((OSError(28, "full"), CheckpointError), (ValueError("odd"), TreadleError),
                             (CheckpointCorruptError("bad"), CheckpointCorruptError)):  # fmt: skip

        def fails(error: Exception = error) -> None:
            assert fabric.global_rank == 0
            raise error

        with pytest.raises(Exception, match=str(error).replace("[", r"\[")) as raised:
            on_rank_zero(fabric, fails, "could not count")
        if fabric.global_rank == 0:
            assert raised.value is error
        else:
            assert type(raised.value) is elsewhere and str(raised.value) == f"Rank 0 could not count: {error}"


def test_rank_zero_acts_and_all_learn() -> None:
    run(acts)


# --- saving ---


def state_of(rank: int) -> dict[str, Any]:
    return {"weights": torch.ones(LARGE), "own": {"ranks": PerRank({"rank": rank, "g": torch.full((LARGE,), rank)})}}


def saves(fabric: Fabric, path: str) -> None:
    fabric.save(path, state_of(fabric.global_rank))


@STORES
def test_the_parts_of_all_ranks_are_saved(store: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    run(saves, str(path), store=store)
    if path.is_dir():
        assert {p.name for p in path.glob("rank_*")} == {"rank_0.pt", "rank_1.pt"}
    for load in (TorchCheckpointIO().load_checkpoint, DistributedCheckpointIO().load_checkpoint):
        ranks = load(path)["own"]["ranks"]
        assert type(ranks) is list and [part["rank"] for part in ranks] == [0, 1]
        assert all(torch.equal(part["g"], torch.full((LARGE,), rank)) for rank, part in enumerate(ranks))
    assert [part["g"].is_meta for part in read_outline(path)["own"]["ranks"]] == [True, True]
    with parts_on_demand():
        ranks = TorchCheckpointIO().load_checkpoint(path)["own"]["ranks"]
    assert len(ranks) == 2 and [part["rank"] for part in ranks] == [0, 1] and ranks[-1]["rank"] == 1


@STORES
def test_one_process_has_a_list_of_one_part(store: Any, tmp_path: Path) -> None:
    Fabric(accelerator="cpu", devices=1, plugins=store()).save(tmp_path / "a.ckpt", state_of(7))
    ranks = store().load_checkpoint(tmp_path / "a.ckpt")["own"]["ranks"]
    assert [part["rank"] for part in ranks] == [7] and ranks[0]["g"].eq(7).all()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run(saves, str(tmp_path / "a.ckpt"), store=DistributedCheckpointIO)
    return tmp_path / "a.ckpt"


def test_parts_on_demand_are_read_and_checked_one_by_one(folder: Path) -> None:
    with parts_on_demand():
        (folder / "rank_0.pt").rename(folder / "elsewhere")
        ranks = TorchCheckpointIO().load_checkpoint(folder)["own"]["ranks"]  # what is not asked for may be missing
        assert ranks[1]["rank"] == 1
        with pytest.raises(CheckpointCorruptError, match=r"rank_0\.pt' is missing"):
            ranks[0]
        (folder / "elsewhere").rename(folder / "rank_0.pt")
        content = bytearray((folder / "rank_0.pt").read_bytes())
        content[len(content) // 2] ^= 1
        (folder / "rank_0.pt").write_bytes(content)
        with pytest.raises(CheckpointCorruptError, match=r"checksum of its file 'rank_0\.pt' is wrong"):
            ranks[0]
    DistributedCheckpointIO().save_checkpoint({"own": {"ranks": PerRank({"rank": 5})}}, folder)
    with pytest.raises(CheckpointError, match="removed or replaced after it was loaded"):
        ranks[1]


@pytest.mark.parametrize("harm", ["flip", "cut", "remove", "swap"])
def test_the_command_line_checks_every_part(harm: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "verify", str(folder)]) == 0
    assert main(["checkpoint", "inspect", str(folder)]) == 0
    part = folder / "rank_1.pt"
    content = part.read_bytes()
    if harm == "remove":
        part.unlink()
    elif harm == "swap":
        part.write_bytes((folder / "rank_0.pt").read_bytes())
    else:
        middle = len(content) // 2
        changed = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        part.write_bytes(changed if harm == "flip" else content[:-1])
    assert main(["checkpoint", "verify", str(folder)]) == 1
    assert "BAD" in (told := capsys.readouterr().out) and "rank_1.pt" in told
    with pytest.raises(CheckpointCorruptError, match=r"rank_1\.pt"):
        TorchCheckpointIO().load_checkpoint(folder)


def test_the_command_line_tells_parts_apart(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = folder.with_name("b.ckpt")
    Fabric(accelerator="cpu", devices=1, plugins=DistributedCheckpointIO()).save(other, state_of(0))
    assert main(["checkpoint", "diff", str(folder), str(other)]) == 1
    assert f"own.ranks.1.rank: only in {folder}" in capsys.readouterr().out


def test_parts_with_anything_else_than_plain_values_are_refused(tmp_path: Path) -> None:
    DistributedCheckpointIO().save_checkpoint({"own": PerRank(Path("x"))}, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=r"PosixPath"):
        TorchCheckpointIO().load_checkpoint(tmp_path / "a.ckpt")
    assert TorchCheckpointIO().load_checkpoint(tmp_path / "a.ckpt", weights_only=False) == {"own": [Path("x")]}
    with pytest.raises(CheckpointError, match=r"state\['own'\].*cannot be pickled"):
        DistributedCheckpointIO().save_checkpoint({"own": PerRank(lambda: 0)}, tmp_path / "b.ckpt")
    assert os.listdir(tmp_path) == ["a.ckpt"]


def has_others(fabric: Fabric, folder: str) -> None:
    path = os.path.join(folder, "a.ckpt")
    own = {"x": PerRank(0), "y": PerRank(1)} if fabric.global_rank == 0 else {"x": PerRank(0)}
    with pytest.raises(CheckpointError, match=r"written: rank 1: has \['x'\] per rank, and rank 0 has \['x', 'y'\]"):
        save_sharded(own, path)


def test_ranks_that_mark_different_values_are_told(tmp_path: Path) -> None:
    run(has_others, str(tmp_path))
    assert os.listdir(tmp_path) == []


# --- memory ---


def grown_by(action: Any) -> int:
    """Bytes by which the memory of this process was greater than before while it acted."""
    Path("/proc/self/clear_refs").write_text("5")  # what it was at most is what it is now

    def memory(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))

    before = memory("VmRSS")
    action()
    return memory("VmHWM") - before


def saves_much(fabric: Fabric, path: str) -> None:
    small, large = PerRank([torch.ones(2 * LARGE)]), PerRank([torch.ones(2_500_000) for _ in range(4)])  # 40 MB
    fabric.save(path, {"own": small})  # imports what there is to import
    grown = grown_by(lambda: fabric.save(path, {"own": large}))
    expected = 40e6 * (fabric.world_size - 1) if fabric.global_rank == 0 and os.path.isfile(path) else 0
    assert grown < expected + 10e6, f"rank {fabric.global_rank} grew by {grown / 1e6:.0f} MB"

    def load() -> None:
        with parts_on_demand():
            assert fabric.load(path)["own"][fabric.global_rank][0].eq(1).all()

    if os.path.isdir(path):
        grown = grown_by(load)
        assert grown < 60e6, f"rank {fabric.global_rank} grew by {grown / 1e6:.0f} MB"  # 40 MB that it has now


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="only Linux tells the most memory since a moment"
)
@STORES
def test_no_rank_but_the_one_that_writes_holds_the_part_of_another(store: Any, tmp_path: Path) -> None:
    run(saves_much, str(tmp_path / "a.ckpt"), devices=3, store=store)
