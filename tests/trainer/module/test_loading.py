"""Tests of ``treadle.module.loading``."""

from __future__ import annotations

import io
import json
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from treadle.module.loading import load_module_from_checkpoint
from treadle.module.module import LightningModule
from treadle_fabric.errors import CheckpointMismatchError, CheckpointNotFoundError, MisconfigurationException


class Net(LightningModule):
    def __init__(self, width: int, depth: int = 1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.loaded_epoch: int | None = None

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.loaded_epoch = checkpoint.get("epoch")


class AnyNet(LightningModule):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.kwargs = kwargs


def save(path: Path, module: nn.Module | None = None, **extra: Any) -> Path:
    state = {} if module is None else {"state_dict": module.state_dict()}
    torch.save({**state, **extra}, path)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    hparams = {"width": 3, "depth": 2, "from_a_base_class": 5}
    return save(tmp_path / "net.ckpt", Net(3, 2), hyper_parameters=hparams, hparams_name="kwargs", epoch=7)


def test_weights_and_hyperparameters_come_back(tmp_path: Path) -> None:
    net = Net(3, 2)
    path = save(tmp_path / "net.ckpt", net, hyper_parameters={"width": 3, "depth": 2}, hparams_name="kwargs", epoch=7)
    loaded = Net.load_from_checkpoint(path)
    assert loaded.hparams == {"width": 3, "depth": 2}
    assert loaded.loaded_epoch == 7
    for name, value in net.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_arguments_win_over_the_checkpoint(path: Path) -> None:
    with pytest.warns(UserWarning, match=r"layers\.1\.weight"):
        loaded = load_module_from_checkpoint(Net, path, strict=False, depth=1)
    assert loaded.hparams == {"width": 3, "depth": 1}


def test_names_must_match_unless_told_otherwise(path: Path) -> None:
    class Tolerant(Net):
        strict_loading = False

    with pytest.raises(RuntimeError, match=r"layers\.2\.weight"):
        load_module_from_checkpoint(Net, path, depth=3)
    with pytest.warns(UserWarning, match=r"in the model state dict but not in the checkpoint.*layers\.2\.weight"):
        load_module_from_checkpoint(Net, path, strict=False, depth=3)
    with pytest.warns(UserWarning, match=r"not in the model state dict but in the checkpoint.*layers\.1\.weight"):
        load_module_from_checkpoint(Tolerant, path, depth=1)
    with pytest.raises(RuntimeError, match=r"layers\.2\.weight"):
        load_module_from_checkpoint(Tolerant, path, strict=True, depth=3)


def test_an_init_with_kwargs_gets_everything(path: Path) -> None:
    with pytest.warns(UserWarning, match="They are not used"):
        loaded = load_module_from_checkpoint(AnyNet, path, strict=False, more=1)
    assert loaded.kwargs == {"width": 3, "depth": 2, "from_a_base_class": 5, "more": 1}


def test_missing_arguments_are_named(tmp_path: Path) -> None:
    path = save(tmp_path / "bare.ckpt", Net(2))
    with pytest.raises(MisconfigurationException, match=r"needs width.*save_hyperparameters"):
        Net.load_from_checkpoint(path)
    assert Net.load_from_checkpoint(path, width=2).hparams.width == 2


def test_an_argument_that_init_does_not_take_is_left_out(path: Path) -> None:
    with pytest.warns(UserWarning, match="Did you mean 'depth'"):
        net = Net.load_from_checkpoint(path, depht=1)
    assert "depht" not in net.hparams


@dataclass
class Config:
    width: int
    depth: int = 1


class WithDict(Net):
    def __init__(self, config: dict[str, Any], note: str = "") -> None:
        super().__init__(config["width"], config["depth"])
        self.config, self.note = config, note


class WithDataclass(Net):
    def __init__(self, config: Config) -> None:
        super().__init__(config.width, config.depth)
        self.config = config


class WithNamespace(Net):
    def __init__(self, config: Namespace) -> None:
        super().__init__(config.width, config.depth)
        self.config = config


@pytest.mark.parametrize(("cls", "kind"), [(WithDict, dict), (WithDataclass, Config), (WithNamespace, Namespace)])
def test_one_object_comes_back_as_its_type(tmp_path: Path, cls: type[Any], kind: type[Any]) -> None:
    path = save(tmp_path / "one.ckpt", Net(2, 3), hyper_parameters={"width": 2, "depth": 9}, hparams_name="config")
    loaded = cls.load_from_checkpoint(path, depth=3)
    assert isinstance(loaded.config, kind)
    assert len(loaded.layers) == 3, "kwargs go into the object"


def test_one_object_beside_other_arguments(tmp_path: Path) -> None:
    path = save(tmp_path / "one.ckpt", Net(2), hyper_parameters={"width": 2, "depth": 1}, hparams_name="config")
    assert WithDict.load_from_checkpoint(path, note="n").note == "n"
    assert WithDict.load_from_checkpoint(path, config={"width": 2, "depth": 1, "k": 0}).config["k"] == 0


def test_hparams_file_of_our_own_loggers(tmp_path: Path) -> None:
    path = save(tmp_path / "bare.ckpt", Net(2, 3))
    file = tmp_path / "hparams.yaml"
    file.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in {"width": 2, "depth": 3}.items()))
    assert Net.load_from_checkpoint(path, hparams_file=file).hparams == {"width": 2, "depth": 3}


def test_hparams_file_keeps_small_floats(tmp_path: Path) -> None:
    path = save(tmp_path / "bare.ckpt")
    file = tmp_path / "hparams.yaml"
    file.write_text('rate: 1e-05\nname: "a: b"\n')
    with pytest.raises(CheckpointMismatchError, match="state_dict"):
        AnyNet.load_from_checkpoint(path, hparams_file=file)
    assert AnyNet.load_from_checkpoint(save(path, nn.Module()), hparams_file=file).kwargs == {
        "rate": 1e-05,
        "name": "a: b",
    }


def test_hparams_file_csv(tmp_path: Path) -> None:
    path = save(tmp_path / "bare.ckpt", nn.Module())
    file = tmp_path / "tags.csv"
    file.write_text('key,value\nwidth,2\nrate,0.5\nname,net\nflags,"[1, 2]"\n')
    loaded = AnyNet.load_from_checkpoint(path, hparams_file=file)
    assert loaded.kwargs == {"width": 2, "rate": 0.5, "name": "net", "flags": [1, 2]}
    with pytest.raises(MisconfigurationException, match=r"neither \.yaml nor \.csv"):
        AnyNet.load_from_checkpoint(path, hparams_file=tmp_path / "hparams.toml")


def test_configure_model_builds_what_the_weights_go_into(tmp_path: Path) -> None:
    class Late(LightningModule):
        def configure_model(self) -> None:
            self.layer = nn.Linear(2, 2)

    source = Late()
    source.configure_model()
    loaded = Late.load_from_checkpoint(save(tmp_path / "late.ckpt", source))
    assert torch.equal(loaded.layer.weight, source.layer.weight)


def test_on_load_checkpoint_may_change_the_weights(tmp_path: Path) -> None:
    class Renamed(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.new = nn.Linear(1, 1)

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["state_dict"] = {k.replace("old", "new"): v for k, v in checkpoint["state_dict"].items()}

    old = nn.ModuleDict({"old": nn.Linear(1, 1)})
    loaded = Renamed.load_from_checkpoint(save(tmp_path / "old.ckpt", old))
    assert torch.equal(loaded.new.weight, old["old"].weight)  # type: ignore[arg-type]


def test_map_location_and_open_files(path: Path) -> None:
    assert Net.load_from_checkpoint(io.BytesIO(path.read_bytes())).hparams.width == 3
    net = Net.load_from_checkpoint(path, map_location="cpu")
    assert next(net.parameters()).device.type == "cpu"


def test_no_file_and_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="absent"):
        Net.load_from_checkpoint(tmp_path / "absent.ckpt", width=1)
    torch.save([1], tmp_path / "list.ckpt")
    with pytest.raises(CheckpointMismatchError, match="list"):
        Net.load_from_checkpoint(tmp_path / "list.ckpt", width=1)
