"""Checkpoints for other programs: one file out of a folder, and weights that safetensors alone reads.

Tests of ``treadle_fabric.checkpoint.export.consolidate``, ``treadle_fabric.checkpoint.export.exporting``,
``treadle_fabric.checkpoint.export.safetensors_file``, ``treadle_fabric.checkpoint.export.weights``,
``treadle_fabric.cli.consolidate``.
"""

from __future__ import annotations

import json
import os
import re
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tests.processes import run_in_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard as _  # noqa: F401 # heavy: the forks find it imported
from torch.distributed.tensor import Shard, distribute_tensor

from treadle_fabric import (
    AsyncCheckpointIO,
    CheckpointCorruptError,
    CheckpointError,
    CheckpointIO,
    DistributedCheckpointIO,
    ExportingCheckpointIO,
    Fabric,
    MisconfigurationException,
    TorchCheckpointIO,
)
from treadle_fabric.checkpoint import PerRank, checkpoints_in
from treadle_fabric.checkpoint.export import exporting, safetensors_file
from treadle_fabric.cli import main

FOLDER = DistributedCheckpointIO()


@pytest.fixture(autouse=True)
def pieces_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_file, "_AT_ONCE", 1000)
    monkeypatch.setattr(exporting, "_WORTHWHILE", 1000)


@pytest.fixture
def memory() -> Iterator[Any]:
    fs = fsspec.filesystem("memory")
    yield fs
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


def every_dtype() -> dict[str, Tensor]:
    w = torch.randn(70, 300)
    kinds = "float64 float32 float16 bfloat16 float8_e4m3fn int64 int32 int16 int8 uint8 bool complex64".split()
    state = {f"as.{kind}": w.to(getattr(torch, kind), copy=True) for kind in kinds}
    return {**state, "transposed": w.t(), "one": torch.tensor(3.0), "none": torch.zeros(0, 4), "tied": w, "a.tie": w}


def read(path: Path) -> dict[str, Tensor]:
    """What the library reads."""
    with safe_open(path, "pt") as file:
        assert file.metadata()["format"] == "pt"
    return load_file(path)


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(found[name].to(torch.complex128), tensor.to(torch.complex128)), name


# --- consolidate ---


def consolidated(*arguments: object) -> int:
    return main(["consolidate", *map(str, arguments)])


def own_of_rank(path: str) -> None:
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp", plugins=DistributedCheckpointIO())
    fabric.launch()
    mesh = init_device_mesh("cpu", (2,))
    rows = distribute_tensor(torch.arange(30_000.0).view(100, 300), mesh, [Shard(0)])
    own = {"rank": fabric.global_rank, "line": deque([fabric.global_rank, 1.5], maxlen=7)}
    state = {"state_dict": {"rows": rows}, "own": PerRank(own), "line": deque([3], maxlen=2), "step": 7}
    fabric.save(path, state)


def test_one_file_holds_all_that_the_folder_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "a.ckpt"
    run_in_ranks(own_of_rank, os.fspath(folder))
    assert consolidated(folder) == 0
    file = tmp_path / "a.ckpt.consolidated"
    assert "Wrote" in capsys.readouterr().out and sorted(os.listdir(tmp_path)) == ["a.ckpt", file.name]
    fabric = Fabric(accelerator="cpu", devices=1)
    whole, one = fabric.load(folder), fabric.load(file)
    assert torch.equal(one["state_dict"]["rows"], torch.arange(30_000.0).view(100, 300))
    del whole["state_dict"], one["state_dict"]
    assert one == whole and one["own"][1]["line"].maxlen == 7 and one["line"] == deque([3]) and one["step"] == 7
    plain = torch.load(file, weights_only=True)
    assert plain["state_dict"]["rows"].shape == (100, 300) and plain["own"][1]["rank"] == 1
    # the same with Lightning's name of the option
    assert consolidated(folder, "--output_file", tmp_path / "deep" / "b.ckpt") == 0
    assert torch.load(tmp_path / "deep" / "b.ckpt", weights_only=True).keys() == plain.keys()
    assert checkpoints_in(tmp_path / "deep")[0][0].is_file()


def test_a_file_of_the_weights_is_read_by_safetensors(tmp_path: Path) -> None:
    state = every_dtype()
    FOLDER.save_checkpoint({"model": state, "optimizer": {"state": {}, "param_groups": []}}, tmp_path / "a.ckpt")
    assert consolidated(tmp_path / "a.ckpt", "--output", tmp_path / "w.safetensors") == 0
    tied = state.pop("tied")
    same(read(tmp_path / "w.safetensors"), state)
    with safe_open(tmp_path / "w.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "tied": "a.tie"} and torch.equal(tied, state["a.tie"])
    TorchCheckpointIO().save_checkpoint({"state_dict": {"model.w": tied, "loss.w": tied + 1}}, tmp_path / "f.ckpt")
    options = ["--dtype", "bfloat16", "--strip-prefix", "model."]
    assert consolidated(tmp_path / "f.ckpt", "--output", tmp_path / "f.safetensors", *options) == 0
    same(read(tmp_path / "f.safetensors"), {"w": tied.bfloat16(), "loss.w": (tied + 1).bfloat16()})
    assert sorted(os.listdir(tmp_path)) == ["a.ckpt", "f.ckpt", "f.safetensors", "w.safetensors"]


def test_what_cannot_be_consolidated_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    w, folder = torch.ones(100, 100), tmp_path / "a.ckpt"
    FOLDER.save_checkpoint({"student": {"w": w}, "teacher": {"w": w + 1}, "step": 1}, folder)
    (tmp_path / "taken").touch()
    (tmp_path / "empty").mkdir()
    TorchCheckpointIO().save_checkpoint({"step": 1}, tmp_path / "one.ckpt")
    FOLDER.save_checkpoint({"same": {"a.w": w, "w": w + 1}, "sparse": {"w": w.to_sparse()}}, tmp_path / "odd.ckpt")
    weights = tmp_path / "w.safetensors"
    for arguments, says in (
        ([tmp_path / "missing"], r"no checkpoint at .*missing"),
        ([tmp_path / "empty"], "manifest.json' is missing"),
        ([folder, "--output", tmp_path / "taken"], "is there already"),
        ([tmp_path / "one.ckpt"], "is one file already"),
        ([tmp_path / "one.ckpt", "--output", weights], "no entry that is weights.*'step'"),
        ([folder, "--output", weights], "several entries.*'student', 'teacher'.*key"),
        ([folder, "--output", weights, "--key", "studnt"], "no entry 'studnt'.*Did you mean 'student'"),
        ([folder, "--output", weights, "--key", "step"], "'step'.*does not hold tensors.*'student', 'teacher'"),
        ([folder, "--output", weights, "--key", "student", "--dtype", "int8"], "--dtype=int8"),
        ([folder, "--key", "student"], r"ends in '\.safetensors'"),
        ([tmp_path / "odd.ckpt", "--output", weights, "--key", "same", "--strip-prefix", "a."], "two tensors.*'w'"),
        ([tmp_path / "odd.ckpt", "--output", weights, "--key", "sparse"], "'w'.*sparse_coo"),
    ):
        assert consolidated(*arguments) == 1
        assert re.search(says, capsys.readouterr().err), says
    damaged = folder / "__0_0.distcp"
    content = damaged.read_bytes()
    damaged.write_bytes(content[:1000] + bytes([content[1000] ^ 1]) + content[1001:])
    assert consolidated(folder) == 1 and "is damaged" in capsys.readouterr().err
    assert not weights.exists() and not (tmp_path / "a.ckpt.consolidated").exists()
    assert consolidated(folder, "--output", weights, "--key", "student") == 1
    with pytest.raises(SystemExit):
        main(["consolidate", "--help"])
    said = capsys.readouterr().out
    assert "--output-file" in said and ".safetensors" in said


# --- with every save ---


def stores() -> Iterator[tuple[str, Callable[[CheckpointIO], CheckpointIO], CheckpointIO]]:
    for kind, io in (("file", TorchCheckpointIO()), ("folder", DistributedCheckpointIO())):
        yield kind, lambda exporting: exporting, io
        yield f"{kind} in the background", AsyncCheckpointIO, io


@pytest.mark.parametrize("at", ["local", "remote"])
@pytest.mark.parametrize(
    ("kind", "around", "io"), list(stores()), ids=lambda value: value if type(value) is str else ""
)
def test_every_save_is_exported_and_every_removal_removes_the_export(
    kind: str, around: Any, io: CheckpointIO, at: str, tmp_path: Path, memory: Any
) -> None:
    store = around(ExportingCheckpointIO(io, key="model", max_shard_size=100_000))
    path = "memory://runs/e=1.ckpt" if at == "remote" else os.fspath(tmp_path / "e=1.ckpt")

    def listed() -> set[str]:
        if at == "local":
            return {*os.listdir(tmp_path)}
        return {name.split("/")[2] for name in memory.find("/runs")}

    def export() -> dict[str, Tensor]:
        if at == "remote":
            memory.get("/runs/e=1.hf", os.fspath(tmp_path / "got"), recursive=True)
        folder = tmp_path / ("e=1.hf" if at == "local" else "got")
        if (folder / "model.safetensors").exists():
            return read(folder / "model.safetensors")
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        files = sorted({*index["weight_map"].values()})
        assert files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
        found = {file: read(folder / file) for file in files}
        return {name: found[file][name] for name, file in index["weight_map"].items()}

    state = {"model": {**every_dtype(), "_extra": "text"}, "n": 1}
    store.save_checkpoint(state, path)
    store.wait()
    tensors = {name: each for name, each in state["model"].items() if name not in ("tied", "_extra")}
    same(export(), tensors)
    assert store.load_checkpoint(path)["n"] == 1 and listed() == {"e=1.ckpt", "e=1.hf"}
    store.save_checkpoint({"model": {"w": torch.ones(3, 3)}}, path)  # replaces both
    store.wait()
    if at == "remote":
        (tmp_path / "got").rename(tmp_path / "before")
    same(export(), {"w": torch.ones(3, 3)})
    with pytest.raises(CheckpointError, match=r"e=1\.ckpt' was written, but its weights were not exported.*no entry"):
        store.save_checkpoint({"weights": {"w": torch.ones(3, 3)}}, path)
        store.wait()
    assert store.load_checkpoint(path).keys() == {"weights"}
    store.save_checkpoint({"model": {"w": torch.ones(3, 3)}}, path)
    store.remove_checkpoint(path)
    store.wait()
    assert not {"e=1.ckpt", "e=1.hf"} & (listed() if at == "local" or memory.exists("/runs") else set())
    store.teardown()


def train(path: str) -> None:
    fabric = Fabric(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        plugins=AsyncCheckpointIO(ExportingCheckpointIO(DistributedCheckpointIO(), key="weights")),
    )
    fabric.launch()
    mesh = init_device_mesh("cpu", (2,))
    full = torch.arange(40_000.0).view(200, 200)
    weights = {f"w{n}": distribute_tensor(full + n, mesh, [Shard(n % 2)]) for n in range(4)}
    weights["tied"] = weights["w0"]
    fabric.save(path, {"weights": weights, "step": 1})
    fabric.barrier()  # trains on
    with pytest.raises(CheckpointError, match="not exported.*'bad' has the layout|not exported.*'bad'"):
        fabric.save(f"{path}.b", {"weights": {"bad": torch.eye(3).to_sparse()}})
        fabric.load(f"{path}.b")


def test_ranks_share_the_export_out_in_the_background(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    run_in_ranks(train, os.fspath(path))
    index = json.loads((tmp_path / "a.hf" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 4 * 160_000} and {*index["weight_map"]} == {"tied", "w1", "w2", "w3"}
    assert len({*index["weight_map"].values()}) == 2
    full = torch.arange(40_000.0).view(200, 200)
    for name, file in index["weight_map"].items():
        expected = full + (0 if name == "tied" else int(name[1]))
        assert torch.equal(load_file(tmp_path / "a.hf" / file)[name], expected)


def train_in_shards(path: str) -> None:
    torch.manual_seed(0)
    fabric = Fabric(accelerator="cpu", devices=2, strategy="fsdp", plugins=ExportingCheckpointIO(FOLDER, key="model"))
    fabric.launch()
    model, optimizer = fabric.setup(module := make_net(), torch.optim.Adam(module.parameters()))
    fabric.backward(model(torch.randn(4, 64)).sum())
    optimizer.step()
    fabric.save(path, {"model": model, "optimizer": optimizer, "step": 1})
    whole = {name: each.full_tensor() for name, each in module.state_dict().items()}
    if fabric.global_rank == 0:
        torch.save(whole, f"{path}.whole")


def make_net() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 301), nn.ReLU(), nn.Linear(301, 64, bias=False))


def test_what_was_sharded_is_exported_consolidated_and_loaded_by_one_process(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    run_in_ranks(train_in_shards, os.fspath(path))
    whole = torch.load(f"{path}.whole")
    index = json.loads((tmp_path / "a.hf" / "model.safetensors.index.json").read_text())
    found = {name: load_file(tmp_path / "a.hf" / file)[name] for name, file in index["weight_map"].items()}
    same(found, whole)
    assert consolidated(path) == consolidated(path, "--output", tmp_path / "w.safetensors") == 0
    same(read(tmp_path / "w.safetensors"), whole)
    fabric = Fabric(accelerator="cpu", devices=1)
    for each in (path, f"{path}.consolidated"):
        model, optimizer = fabric.setup(module := make_net(), torch.optim.Adam(module.parameters()))
        assert fabric.load(each, {"model": model, "optimizer": optimizer}) == {"step": 1}
        same(module.state_dict(), whole)
        states = optimizer.state_dict()["state"]
        assert len(states) == 3 and all(type(state["exp_avg"]) is Tensor for state in states.values())


def test_what_an_export_refuses(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"AsyncCheckpointIO\(ExportingCheckpointIO\(...\)\)"):
        ExportingCheckpointIO(AsyncCheckpointIO())
    for wrong in ({"dtype": "bf16"}, {"dtype": torch.int8}, {"max_shard_size": 0}, {"checkpoint_io": 3}):
        with pytest.raises(MisconfigurationException, match=next(iter(wrong))):
            ExportingCheckpointIO(**wrong)  # type: ignore[arg-type]
    store, path = ExportingCheckpointIO(), tmp_path / "a.ckpt"
    store.save_checkpoint({"m": nn.Linear(2, 2).state_dict()}, path)
    (tmp_path / "a.hf" / "config.json").write_text("{}")  # of the user
    with pytest.raises(CheckpointError, match=r"not exported: .*config\.json"):
        store.save_checkpoint({"m": nn.Linear(2, 2).state_dict()}, path)
    with pytest.warns(UserWarning, match=r"a\.hf' stays: .*config\.json"):
        store.remove_checkpoint(path)
    assert os.listdir(tmp_path) == ["a.hf"] and len(os.listdir(tmp_path / "a.hf")) == 2
    with pytest.raises(CheckpointCorruptError, match="safetensors file"):
        TorchCheckpointIO().load_checkpoint(tmp_path / "a.hf" / "model.safetensors")
