"""The summary of a model whose parameters are shared out, and files of weights of DeepSpeed's folders.

Tests of ``treadle.callbacks.summary.layers``, ``treadle_fabric.checkpoint.zero.foreign``,
``treadle_fabric.checkpoint.zero.files``, ``treadle_fabric.checkpoint.zero.converting``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from tests.processes import run_in_ranks
from treadle.utilities.deepspeed import convert_zero_checkpoint_to_fp32_state_dict
from treadle.utilities.model_summary import DeepSpeedSummary
from treadle_fabric import CheckpointCorruptError, CheckpointError, Fabric
from treadle_fabric.checkpoint import DistributedCheckpointIO
from treadle_fabric.strategies import DeepSpeedStrategy

pytestmark = [pytest.mark.deepspeed, pytest.mark.timeout(200)]


def train(folder: Path, stage: int) -> None:
    """A step, and the state in a folder of ours and in one of DeepSpeed alone, and what is expected of both."""
    fabric = Fabric(accelerator="cpu", devices=2, strategy=DeepSpeedStrategy(stage=stage))
    fabric.launch()
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))
    module[2].bias.requires_grad_(False)
    model, optimizer = fabric.setup(module, AdamW([p for p in module.parameters() if p.requires_grad]))
    fabric.backward(model(torch.ones(4, 5)).square().mean())
    optimizer.step()
    fabric.save(folder / "ours", {"model": model, "optimizer": optimizer, "step": 1})
    engine = fabric.strategy.engine
    engine.save_checkpoint(str(folder / "theirs"))
    weights = fabric.strategy.get_module_state_dict(model)
    if stage == 3:
        summary = DeepSpeedSummary(module, max_depth=1)
        assert summary.param_nums == [42, 14, 24]
        assert summary.parameters_per_layer == [22, 8, 13]  # a share of each parameter, and padding
        assert summary.total_parameters == 80
        assert "Params per Device" in str(summary)
    if fabric.global_rank == 0:
        torch.save(weights, folder / "expected.pt")
    fabric.barrier()
    for each in module.parameters():
        each.data.zero_()  # DeepSpeed loads what we saved
    engine.load_checkpoint(str(folder / "ours"), tag="checkpoint")
    found = fabric.strategy.get_module_state_dict(model)
    if fabric.global_rank == 0:
        assert all(torch.equal(found[name], value) for name, value in weights.items())


@pytest.fixture(scope="module", params=[2, 3])
def folder(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(f"stage{request.param}")
    run_in_ranks(train, path, request.param)
    return path


@pytest.mark.parametrize("name", ["ours", "theirs"])
def test_a_folder_becomes_one_file_of_weights(folder: Path, name: str) -> None:
    expected = torch.load(folder / "expected.pt")
    written = convert_zero_checkpoint_to_fp32_state_dict(folder / name, folder / f"{name}.pt")
    found = torch.load(folder / f"{name}.pt", weights_only=True)["state_dict"]
    assert found.keys() == expected.keys() == written["state_dict"].keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_a_folder_of_deepspeed_is_a_checkpoint(folder: Path) -> None:
    content = DistributedCheckpointIO().load_checkpoint(folder / "theirs")
    (state,) = content["optimizer_states"]
    assert [tuple(state["state"][key]["exp_avg"].shape) for key in range(5)] == [(7, 5), (7,), (7,), (7,), (3, 7)]
    ours = DistributedCheckpointIO().load_checkpoint(folder / "ours")
    for key in range(5):
        assert torch.equal(ours["optimizer"]["state"][key]["exp_avg"], state["state"][key]["exp_avg"])


def test_a_damaged_partition_is_named(folder: Path) -> None:
    file = next((folder / "ours" / "checkpoint").glob("*optim_states.pt"))
    whole = file.read_bytes()
    try:
        file.write_bytes(whole[:-100] + bytes(100))
        with pytest.raises(CheckpointCorruptError, match="optim_states"):
            DistributedCheckpointIO().load_checkpoint(folder / "ours")
    finally:
        file.write_bytes(whole)


def test_another_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no folder that DeepSpeed wrote"):
        convert_zero_checkpoint_to_fp32_state_dict(tmp_path, tmp_path / "out.pt")
