"""Checkpoints that releases of Lightning 1 wrote go on, and are made plain.

``tests/data/lightning-1.*.ckpt`` were saved by these releases after one epoch of ``Old`` on ``batches()``, and
``AFTERWARDS`` is what the weights were there after the second epoch.

Tests of ``treadle.formats``, ``treadle.cli.convert``, ``treadle_fabric.checkpoint.values.moved``.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tests.trainer.models import trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

import treadle as L
from treadle.callbacks import EarlyStopping, ModelCheckpoint
from treadle.cli.main import main
from treadle.formats import modernize
from treadle_fabric import AttributeDict, CheckpointUnsafeError, MisconfigurationException

pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:The checkpoint folder"),
    pytest.mark.filterwarnings("ignore:ModelCheckpoint forgets"),
]

DATA = Path(__file__).parent.parent / "data"
PLAIN, PICKLED = ("1.6.5", "1.9.5"), ("1.0.8", "1.2.10")
AFTERWARDS = {"out.bias": 0.1638181209564209, "net.bias": -0.24549050629138947}


class Old(L.LightningModule):
    def __init__(self, hidden: int = 8, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net, self.out = nn.Linear(4, hidden), nn.Linear(hidden, 1)
        self.first_epoch: int | None = None

    def loss(self, batch: Tensor) -> Tensor:
        return self.out(self.net(batch)).pow(2).mean()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.first_epoch = self.current_epoch if self.first_epoch is None else self.first_epoch
        return self.loss(batch)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), self.hparams.lr, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


def batches() -> DataLoader[Tensor]:
    torch.manual_seed(0)
    return DataLoader(torch.randn(20, 4), batch_size=4)  # type: ignore[arg-type]


def go_on(folder: Path, path: Path, **options: Any) -> tuple[Old, L.Trainer]:
    module = Old()
    callbacks = [ModelCheckpoint(folder, monitor="val_loss"), EarlyStopping("val_loss", patience=9)]
    run = trainer(folder, max_epochs=2, callbacks=callbacks, enable_checkpointing=True)
    data = batches()
    run.fit(module, data, data, ckpt_path=path, **options)
    assert (module.first_epoch, run.current_epoch, run.global_step) == (1, 2, 10)
    assert callbacks[1].patience == 3  # the file's
    return module, run


def as_in_lightning(module: nn.Module) -> None:
    for name, value in AFTERWARDS.items():
        assert module.state_dict()[name][0].item() == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize("release", PLAIN)
def test_a_plain_checkpoint_of_lightning_1_goes_on(release: str, tmp_path: Path) -> None:
    path = DATA / f"lightning-{release}.ckpt"
    module, run = go_on(tmp_path, path)
    as_in_lightning(module)
    assert run.early_stopping_callback.best_score.item() == pytest.approx(0.0800, abs=1e-4)
    assert Old.load_from_checkpoint(path).hparams == {"hidden": 8, "lr": 0.1}
    (tested,) = run.test(Old(), batches(), ckpt_path=path, verbose=False)
    assert tested["val_loss"] == pytest.approx(0.1240, abs=1e-4)


@pytest.mark.parametrize("release", PICKLED)
def test_a_checkpoint_that_names_lightnings_classes_goes_on_where_that_is_allowed(release: str, tmp_path: Path) -> None:
    path = DATA / f"lightning-{release}.ckpt"
    with pytest.raises(CheckpointUnsafeError, match=r"ModelCheckpoint.*treadle checkpoint convert"):
        go_on(tmp_path, path)
    module, _ = go_on(tmp_path, path, weights_only=False)
    if release != "1.0.8":  # which saved the scheduler before its step
        as_in_lightning(module)
    assert Old.load_from_checkpoint(path, weights_only=False).hparams.hidden == 8
    assert (
        not {"pytorch_lightning", "lightning"} & sys.modules.keys() or "lightning" in sys.modules["lightning"].__name__
    )


@pytest.mark.parametrize("release", PLAIN + PICKLED)
def test_convert_makes_a_file_that_always_loads(release: str, tmp_path: Path, capsys: Any) -> None:
    assert main(["checkpoint", "convert", str(DATA / f"lightning-{release}.ckpt"), "new.ckpt"]) == 0
    said = capsys.readouterr().out
    assert "pickle is run" in said and "dropped" not in said and "kept" not in said
    plain = torch.load("new.ckpt", weights_only=True)
    assert all(isinstance(key, str) for key in plain["callbacks"]) and len(plain["callbacks"]) == 2
    go_on(tmp_path, Path("new.ckpt"))
    assert main(["checkpoint", "convert", "new.ckpt", "new.ckpt"]) != 0


class Settings:
    """Of the user's program."""

    def __init__(self, size: int) -> None:
        self.size = size


def test_convert_lists_what_stays_pickled_and_what_is_dropped(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = ModuleType("gone_since_then")
    gone.Backbone = type("Backbone", (), {"__module__": "gone_since_then"})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "gone_since_then", gone)
    content = torch.load(DATA / "lightning-1.9.5.ckpt", weights_only=True)
    content["hyper_parameters"] = AttributeDict(
        hidden=8, settings=Settings(3), layers=[gone.Backbone(), 2], path=tmp_path
    )
    content["callbacks"]["Other"] = {"backbone": gone.Backbone(), "n": 1}
    torch.save(content, "old.ckpt")
    monkeypatch.delitem(sys.modules, "gone_since_then")
    assert main(["checkpoint", "convert", "old.ckpt", "new.ckpt"]) == 0
    said = capsys.readouterr().out
    assert "kept pickled: hyper_parameters.settings (" in said and "Settings)" in said
    assert (
        "dropped, because its class cannot be imported here: hyper_parameters.layers[0] (gone_since_then.Back" in said
    )
    assert "callbacks.Other.backbone (gone_since_then.Backbone)" in said
    assert Old.load_from_checkpoint("new.ckpt").hparams.hidden == 8
    assert torch.load("new.ckpt", weights_only=True)["callbacks"]["Other"] == {"n": 1}


def test_keys_of_before_1_0_and_before_1_6_are_those_of_now() -> None:
    old = {
        "epoch": 3,
        "global_step": 30,
        "pytorch-lightning_version": "0.9.0",
        "hparams": Namespace(lr=0.5),
        "checkpoint_callback_best_model_score": 0.25,
        "checkpoint_callback_best_model_path": "best.ckpt",
        "early_stop_callback_wait": 2,
        "early_stop_callback_patience": 4,
        "loops": {"fit_loop": {"epoch_loop.batch_loop.manual_loop.x": 1}},
    }
    new = modernize(dict(old))
    assert new["hyper_parameters"] == Namespace(lr=0.5)
    assert new["callbacks"] == {
        "ModelCheckpoint": {"best_model_score": 0.25, "best_model_path": "best.ckpt"},
        "EarlyStopping": {"wait_count": 2, "patience": 4},
    }
    assert new["loops"]["fit_loop"] is None  # the counters beside it were what the run went on from
    moved = modernize(old | {"pytorch-lightning_version": "1.6.0"})["loops"]["fit_loop"]
    assert moved == {"epoch_loop.manual_optimization.x": 1}
    now = old | {"pytorch-lightning_version": "2.0.0"}
    assert modernize(now) is now


def test_convert_writes_over_nothing() -> None:
    Path("there.ckpt").touch()
    with pytest.raises((MisconfigurationException, SystemExit)):
        raise SystemExit(main(["checkpoint", "convert", str(DATA / "lightning-1.9.5.ckpt"), "there.ckpt"]))
    assert Path("there.ckpt").read_bytes() == b""
