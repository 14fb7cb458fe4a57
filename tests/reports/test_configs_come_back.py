"""Hydra's and OmegaConf's configs in hyper-parameters and states: with their classes, links and missing values.

Tests of ``treadle_fabric.checkpoint.values.omegaconf_kinds``, ``treadle_fabric.checkpoint.values.kinds``,
``treadle.module.hparams``.
"""

from __future__ import annotations

import enum
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tests.trainer.models import Net, loader, trainer

import treadle as L
from treadle_fabric import Fabric, MisconfigurationException
from treadle_fabric.loggers import CSVLogger

omegaconf = pytest.importorskip("omegaconf")
OmegaConf, DictConfig = omegaconf.OmegaConf, omegaconf.DictConfig


class Act(enum.Enum):
    RELU = "relu"
    GELU = "gelu"


@dataclass
class Layer:
    dim: int = 4
    act: Act = Act.RELU


@dataclass
class Config:
    net: Layer = field(default_factory=Layer)
    layers: list[Layer] = field(default_factory=list)
    root: Path = Path("data")
    lr: float = 0.1
    seed: int = omegaconf.MISSING


@dataclass
class Plain:
    dim: int = 4


class Argument(Net):
    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.cfg = cfg


class Whole(Net):
    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.save_hyperparameters(cfg)
        self.cfg = cfg


class Unannotated(Net):
    def __init__(self, cfg: Any) -> None:
        super().__init__()
        self.save_hyperparameters(cfg)
        self.cfg = cfg


class Copied(Net):
    def __init__(self, cfg: Any) -> None:
        super().__init__()
        self.save_hyperparameters(OmegaConf.to_container(cfg, resolve=True))
        self.cfg = cfg


def save(module: L.LightningModule, **kwargs: Any) -> None:
    run = trainer(Path(), max_steps=1, limit_val_batches=0, **kwargs)
    run.fit(module, loader(4))
    run.save_checkpoint("a.ckpt")


def structured() -> Any:
    config = OmegaConf.structured(Config)
    config.layers.append(Layer(7, Act.GELU))
    config.lr = 0.5
    return config


@pytest.mark.parametrize("module", [Argument, Whole])
@pytest.mark.parametrize("seed", [None, 3])
def test_a_structured_config_has_its_classes_again(module: Any, seed: int | None) -> None:
    config = structured()
    if seed is not None:
        config.seed = seed
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(module(config))
    loaded = module.load_from_checkpoint("a.ckpt").cfg
    assert loaded == config
    assert [OmegaConf.get_type(each) for each in (loaded, loaded.net, loaded.layers[0])] == [Config, Layer, Layer]
    assert OmegaConf.is_missing(loaded, "seed") == (seed is None)
    if seed is not None:
        assert OmegaConf.to_object(loaded) == OmegaConf.to_object(config)
    with pytest.raises(omegaconf.ValidationError):
        loaded.lr = "fast"
    assert module.load_from_checkpoint("a.ckpt", **({"lr": 2.0} if module is Whole else {})).cfg.net.dim == 4


def test_structured_parts_of_a_config_have_their_classes_again() -> None:
    config = OmegaConf.create({"groups": {"model": OmegaConf.structured(Config(seed=1))}, "list": [Layer(3), {"a": 1}]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(Argument(config))
    loaded = Argument.load_from_checkpoint("a.ckpt").cfg
    assert OmegaConf.to_object(loaded) == OmegaConf.to_object(config)
    assert type(OmegaConf.to_object(loaded)["groups"]["model"]) is Config


def test_a_config_whose_class_is_not_known_is_told_and_a_default_load_gives_the_values() -> None:
    config = OmegaConf.structured(Plain(5))
    with pytest.warns(UserWarning, match=r"DictConfig.*weights_only=False"):
        save(Unannotated(config))
    assert Unannotated.load_from_checkpoint("a.ckpt").cfg == {"dim": 5}
    assert OmegaConf.get_type(Unannotated.load_from_checkpoint("a.ckpt", weights_only=False).cfg) is Plain
    runtime = Fabric(accelerator="cpu", devices=1)
    with pytest.warns(UserWarning, match=r"state\['cfg'\].*weights_only=False"):
        runtime.save("b.ckpt", {"cfg": OmegaConf.create({"group": config})})
    assert runtime.load("b.ckpt")["cfg"] == {"group": {"dim": 5}}
    assert OmegaConf.get_type(runtime.load("b.ckpt", weights_only=False)["cfg"].group) is Plain


def test_values_that_are_missing_stay_missing() -> None:
    config = OmegaConf.create({"lr": 0.1, "data": "???", "net": {"dim": "???", "rate": "${lr}"}})
    save(Unannotated(config), logger=(logger := CSVLogger(".")))
    logger.save()
    assert "data" not in Unannotated(config).hparams
    assert '"dim": "???"' in (Path(logger.log_dir) / "hparams.yaml").read_text()
    loaded = Unannotated.load_from_checkpoint("a.ckpt").cfg
    assert OmegaConf.to_yaml(loaded) == OmegaConf.to_yaml(config), "with the link of net.rate to lr"
    with pytest.raises(omegaconf.MissingMandatoryValue):
        loaded.data
    changed = Unannotated.load_from_checkpoint("a.ckpt", lr=3, data="here").cfg
    assert (changed.net.rate, changed.data) == (3, "here")


def test_a_config_that_may_not_be_changed_takes_arguments_of_the_load() -> None:
    config = OmegaConf.create({"lr": 0.1, "net": {"rate": "${lr}"}})
    OmegaConf.set_readonly(config, True)
    save(Unannotated(config))
    loaded = Unannotated.load_from_checkpoint("a.ckpt", lr=0.5).cfg
    assert OmegaConf.is_readonly(loaded)
    assert loaded.net.rate == 0.5
    assert config.lr == 0.1


def test_a_copy_in_plain_containers_is_known_for_the_argument_that_it_equals() -> None:
    config = OmegaConf.create({"net": {"dim": 3, "twice": "${net.dim}"}})
    save(Copied(config))
    loaded = Copied.load_from_checkpoint("a.ckpt").cfg
    assert type(loaded) is DictConfig
    assert loaded == config


def test_a_copy_that_equals_no_argument_asks_for_the_argument() -> None:
    save(Copied(OmegaConf.create()))
    with pytest.raises(MisconfigurationException, match=r"cfg=\.\.\."):
        Copied.load_from_checkpoint("a.ckpt")
