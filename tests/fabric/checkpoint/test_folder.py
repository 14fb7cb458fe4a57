"""What is replaced, removed and read where a checkpoint is a folder, and where a folder is none.

Tests of ``treadle_fabric.checkpoint.folder.layout``, ``treadle_fabric.checkpoint.folder.manifest``,
``treadle_fabric.checkpoint.folder.placing``.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from treadle_fabric import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointIO,
    CheckpointNotFoundError,
    DistributedCheckpointIO,
    TorchCheckpointIO,
    newest_good,
)
from treadle_fabric.checkpoint import checkpoints_in, fill, fingerprint, link_folder, read_outline, tensors_on_demand
from treadle_fabric.checkpoint.folder import manifest
from treadle_fabric.checkpoint.folder import placing as folders
from treadle_fabric.checkpoint.stored import folder as loading

SHARDED, FILE = DistributedCheckpointIO(), TorchCheckpointIO()
BOTH = pytest.mark.parametrize("io", [SHARDED, FILE])


def tree(path: Path) -> list[str]:
    return sorted(str(p.relative_to(path)) for p in path.rglob("*"))


# --- what is not ours stays ---


@BOTH
@pytest.mark.parametrize("ours", ["meta.pt", ".metadata", "whole"])
@pytest.mark.parametrize(
    "theirs", ["notes.txt", "thesis/chapter.txt", "__0_0.distcp/chapter.txt", "checkpoint/rank_states.pt/chapter.txt"]
)
def test_a_folder_with_other_things_is_neither_replaced_nor_removed(
    theirs: str, ours: str, io: CheckpointIO, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    if ours == "whole":
        SHARDED.save_checkpoint({"step": 1}, data)
    else:
        data.mkdir()
        (data / ours).write_bytes(b"x")
    (data / theirs).parent.mkdir(parents=True, exist_ok=True)
    (data / theirs).write_text("x")
    SHARDED.save_checkpoint({"step": 1}, tmp_path / "a.ckpt")
    before = tree(tmp_path)
    for touch in (
        lambda: io.save_checkpoint({"step": 2}, data),
        lambda: io.remove_checkpoint(data),
        lambda: link_folder(str(tmp_path / "a.ckpt"), str(data)),
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
        link_folder(str(tmp_path / "a.ckpt"), str(tmp_path / "last.ckpt"))
    assert SHARDED.load_checkpoint(tmp_path / "last.ckpt") == {"step": 1}


def test_a_file_called_meta_beside_checkpoints_hides_none(tmp_path: Path) -> None:
    FILE.save_checkpoint({"step": 1}, tmp_path / "run" / "last.ckpt")
    for given in (tmp_path, tmp_path / "run"):
        torch.save({}, tmp_path / "run" / "meta.pt")
        assert newest_good(given) == tmp_path / "run" / "last.ckpt"


# --- taking a name ---


@pytest.mark.parametrize("kind", [SHARDED, FILE])
def test_what_was_moved_aside_for_one_that_never_came_is_loaded(kind: CheckpointIO, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    kind.save_checkpoint({"step": 1}, path)
    path.rename(tmp_path / f".a.ckpt.{'0' * 32}.old")  # killed between the two renames
    assert kind.load_checkpoint(path)["step"] == 1


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


# --- reading while another one takes the name ---


def state_of(step: int) -> dict[str, Any]:
    return {"step": step, "w": torch.full((20_000,), float(step))}


def read_whole(path: Path) -> dict[str, Any]:
    return SHARDED.load_checkpoint(path)


def read_in_place(path: Path) -> dict[str, Any]:
    with tensors_on_demand():
        found = SHARDED.load_checkpoint(path)
    state = {**state_of(0), "step": found["step"]}
    fill(state["w"], found["w"])
    return state


def saving_before(module: Any, name: str, save: Callable[[], Any], times: int = 1) -> Callable[..., Any]:
    """The function ``name``, but before its first calls a checkpoint is saved."""
    real, count = getattr(module, name), iter(range(times))

    def late(*args: Any, **kwargs: Any) -> Any:
        if next(count, None) is not None:
            save()
        return real(*args, **kwargs)

    return late


@pytest.mark.parametrize("stage", ["verify", "_load_plain", "_tensor"])
@pytest.mark.parametrize("read", [read_whole, read_in_place])
def test_what_is_read_is_one_checkpoint_whoever_saves_meanwhile(
    read: Callable[[Path], dict[str, Any]], stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.ckpt"
    SHARDED.save_checkpoint(state_of(1), path)
    late = saving_before(loading, stage, lambda: SHARDED.save_checkpoint(state_of(2), path))
    monkeypatch.setattr(loading, stage, late)
    found = read(path)
    assert found["step"] == 2 and found["w"].eq(2).all()


def test_a_file_that_takes_the_place_of_a_folder_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.ckpt"
    SHARDED.save_checkpoint(state_of(1), path)
    late = saving_before(loading, "_tensor", lambda: FILE.save_checkpoint(state_of(2), path))
    monkeypatch.setattr(loading, "_tensor", late)
    assert SHARDED.load_checkpoint(path)["w"].eq(2).all()


def test_who_saves_faster_than_one_can_read_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.ckpt"
    SHARDED.save_checkpoint(state_of(1), path)
    late = saving_before(loading, "_tensor", lambda: SHARDED.save_checkpoint(state_of(2), path), times=100)
    monkeypatch.setattr(loading, "_tensor", late)
    with pytest.raises(CheckpointError, match=r"last\.ckpt.*took its place 5 times"):
        SHARDED.load_checkpoint(path)


def test_a_second_name_does_not_count_as_another_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.ckpt"
    SHARDED.save_checkpoint(state_of(1), path)
    link = saving_before(loading, "_tensor", lambda: link_folder(str(path), str(tmp_path / "last.ckpt")), times=100)
    monkeypatch.setattr(loading, "_tensor", link)
    assert SHARDED.load_checkpoint(path)["step"] == 1


# --- which tensors are alike ---


def test_the_fingerprint_tells_places_apart() -> None:
    def differ(a: torch.Tensor, b: torch.Tensor) -> bool:
        return fingerprint(a) != fingerprint(b)

    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.complex64):
        eye = torch.eye(2048).to(dtype)
        assert differ(eye, eye.flip(0)) and differ(eye, eye.t().roll(1, 0)) and not differ(eye, eye.clone())
    zeros = torch.zeros(5000, dtype=torch.float64)
    signed = zeros.clone()
    signed[[3, 70]] = -0.0  # the highest bits of two values
    assert differ(zeros, signed) and differ(zeros, zeros.view(50, 100)) and differ(zeros, zeros.to(torch.int64))


# --- the manifest ---


def changes() -> Iterator[tuple[str, Callable[[dict[str, Any]], Any]]]:
    """What to spoil in a manifest whose tensor ``w`` has the shape 100 x 200 and lies in one piece."""

    def first(manifest: dict[str, Any]) -> dict[str, Any]:
        chunk: dict[str, Any] = manifest["tensors"]["w"]["chunks"][0]
        return chunk

    def pieces(*places: tuple[list[int], list[int]]) -> Callable[[dict[str, Any]], Any]:
        return lambda m: m["tensors"]["w"].update(
            chunks=[{**first(m), "offsets": offsets, "sizes": sizes} for offsets, sizes in places]
        )

    for key in ("shape", "dtype", "chunks"):
        yield f"no {key}", lambda m, key=key: m["tensors"]["w"].pop(key)
    for key in ("offsets", "sizes", "file", "start", "length"):
        yield f"no {key}", lambda m, key=key: first(m).pop(key)
        yield f"{key} is text", lambda m, key=key: first(m).update({key: "ab"})
        yield f"{key} is null", lambda m, key=key: first(m).update({key: None})
    yield "beyond the file", lambda m: first(m).update(start=10)
    yield "before the file", lambda m: first(m).update(start=-1)
    yield "in the manifest", lambda m: first(m).update(file="manifest.json")
    yield "a size is true", lambda m: m["files"]["meta.pt"].update(size=True)
    yield "a file is a number", lambda m: m["files"].update({"meta.pt": 5})
    yield "no checksum", lambda m: m["files"]["meta.pt"].pop("crc32")
    yield "another checksum", lambda m: m["files"]["meta.pt"].update(crc32="zz")
    yield "another file", lambda m: m["files"].update({"x": m["files"]["meta.pt"]})
    yield "no plain values", lambda m: m["files"].pop("meta.pt")
    yield "a shape of fractions", lambda m: m["tensors"]["w"].update(shape=[100.0, 200])
    yield "tensors are a list", lambda m: m.update(tensors=[1])
    yield "twice the same half", pieces(([0, 0], [50, 200]), ([0, 0], [50, 200]))
    yield "overlapping", pieces(([0, 0], [60, 200]), ([50, 0], [40, 200]))
    yield "overlapping across", pieces(([0, 0], [50, 200]), ([50, 0], [50, 100]), ([50, 50], [50, 100]))
    yield "a piece is missing", pieces(([0, 0], [50, 200]))
    yield "out of bounds", pieces(([50, 0], [100, 200]))
    yield "negative", pieces(([0, 0], [200, 200]), ([0, 0], [-100, 200]))
    yield "of one dimension", pieces(([0], [20_000]))


@pytest.mark.parametrize(("what", "change"), list(changes()), ids=lambda value: value if isinstance(value, str) else "")
def test_a_manifest_that_cannot_be_followed_is_refused(
    what: str, change: Callable[[dict[str, Any]], Any], tmp_path: Path
) -> None:
    SHARDED.save_checkpoint({"w": torch.ones(100, 200)}, path := tmp_path / "a.ckpt")
    manifest = json.loads((path / "manifest.json").read_bytes())
    del manifest["crc32"]
    change(manifest)
    body = json.dumps(manifest)[1:].encode()
    (path / "manifest.json").write_bytes(b'{"crc32": "%08x",\n' % zlib.crc32(body) + body)
    for read in (read_whole, read_in_place, read_outline):
        with pytest.raises(CheckpointCorruptError, match=r"a\.ckpt.*no manifest"):
            read(path)


def test_pieces_of_every_cut_are_taken() -> None:
    def piece(*bounds: tuple[int, int]) -> dict[str, list[int]]:
        return {"offsets": [a for a, _ in bounds], "sizes": [b - a for a, b in bounds]}

    n = 40
    grid = [piece((i, i + 1), (j, j + 1)) for i in range(n) for j in range(n)]
    rows, columns = [piece((i, i + 1), (0, n)) for i in range(n)], [piece((0, n), (i, i + 1)) for i in range(n)]
    for pieces in (grid, rows, columns, [piece((0, n), (0, n)), piece((n, n), (0, n))], [piece()]):
        assert not manifest._overlap(pieces) and not manifest._overlap(pieces[::-1])
        assert manifest._overlap([*pieces, pieces[0]])
    assert manifest._overlap([*rows, piece((3, 4), (7, 8))]) and not manifest._overlap([])


# --- checksums ---


def test_a_save_by_another_thread_at_the_same_time_has_its_checksums(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_elsewhere() -> None:
        thread = threading.Thread(target=FILE.save_checkpoint, args=({"w": torch.ones(10)}, tmp_path / "other.ckpt"))
        thread.start()
        thread.join()

    late = saving_before(torch, "save", save_elsewhere)
    monkeypatch.setattr(torch, "save", late)
    SHARDED.save_checkpoint({"w": torch.ones(20_000)}, tmp_path / "a.ckpt")
    with zipfile.ZipFile(tmp_path / "other.ckpt") as archive:
        assert all(record.CRC for record in archive.infolist() if record.file_size)
