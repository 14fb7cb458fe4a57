"""A run goes on, or is looked at again, on a device with another index than before.

Tests of ``treadle_fabric.randomness.state``, ``treadle.checkpoint.exact``, ``treadle.replay``,
``treadle_fabric.data.resumable``. Generators of the CPU stand for those of the devices.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.random_devices import Devices, Draws
from tests.trainer.models import loader, trainer

import treadle as L
from treadle.replay import replay
from treadle_fabric import NonFiniteError, collect_rng_states


class Saves(L.Callback):
    """Saves in the middle of an epoch, and keeps what a checkpoint held once in place of the own device's state."""

    old: list[torch.Tensor]

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if trainer.global_step == 3:
            trainer.save_checkpoint("a.ckpt")
            self.old = collect_rng_states()["cuda"]


def fit(folder: Path, ckpt_path: str | None = None, **kwargs: Any) -> list[float]:
    torch.manual_seed(3)
    model = Draws()
    trainer(folder, max_epochs=2, **kwargs).fit(model, loader(8, shuffle=True), ckpt_path=ckpt_path)
    return model.losses


@pytest.mark.parametrize("old", [False, True])
def test_a_run_is_resumed(old: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Devices(monkeypatch, current=2)
    losses = fit(tmp_path, callbacks=[saves := Saves()])
    content = torch.load("a.ckpt", weights_only=True)
    (rank,) = content["treadle"]["ranks"]
    assert rank["rng"].keys() & {"own_cuda", "other_cuda", "cuda"} == {"own_cuda"}
    if old:
        del rank["rng"]["own_cuda"]
        rank["rng"]["cuda"] = saves.old
        torch.save(content, "a.ckpt")
    for generator in Devices(monkeypatch, current=0).generators:
        generator.manual_seed(5)
    assert fit(tmp_path, "a.ckpt") == losses[3:]


def test_a_hand_written_loop_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loop(save_after: int) -> list[float]:
        """The numbers that the batches drew; from the checkpoint on, if there is one."""
        fabric = L.Fabric(accelerator="cpu", devices=1)
        batches = fabric.setup_dataloaders(loader(8), resumable=True)
        if (tmp_path / "loop.ckpt").exists():
            fabric.load(tmp_path / "loop.ckpt", {"loader": batches})
        drawn = []
        for batch_idx, _ in enumerate(batches):
            drawn.append(Devices.now.draw_own())
            if batch_idx == save_after:
                fabric.save(tmp_path / "loop.ckpt", {"loader": batches})
        return drawn

    Devices(monkeypatch, current=3)
    whole = loop(save_after=1)
    for generator in Devices(monkeypatch, current=1).generators:
        generator.manual_seed(5)
    assert loop(save_after=-1) == whole[2:]


def test_a_batch_is_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Devices(monkeypatch, current=2)
    with pytest.raises(NonFiniteError):
        trainer(tmp_path, on_nonfinite="raise").fit(Draws(fails=2), loader(8))
    (file,) = (tmp_path / "nonfinite").iterdir()
    content = torch.load(file, weights_only=True)
    drawn = torch.Generator()
    drawn.set_state(content["rng"]["own_cuda"])
    found: list[float] = []
    for generator in (devices := Devices(monkeypatch, current=0)).generators:
        generator.manual_seed(5)
    draw = devices.draw_own
    monkeypatch.setattr(devices, "draw_own", lambda: found.append(draw()) or found[-1])
    replay(file, module="tests.random_devices:Draws")
    assert found[0] == float(torch.rand((), generator=drawn))
