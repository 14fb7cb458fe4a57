"""What Lightning has at a path is there at the same path, and is the same object as at home.

Tests of ``treadle.core``, ``treadle.demos``, ``treadle.strategies``, ``treadle.tuner`` and ``treadle.utilities``.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import treadle
from treadle import LightningDataModule, LightningModule, Trainer
from treadle.core import saving
from treadle.core.hooks import CheckpointHooks, DataHooks, ModelHooks
from treadle.core.mixins import HyperparametersMixin
from treadle.core.optimizer import LightningOptimizer, _init_optimizers_and_lr_schedulers, do_nothing_closure
from treadle.demos.boring_classes import BoringModel, ManualOptimBoringModel
from treadle.utilities import parsing, testing
from treadle.utilities.data import extract_batch_size
from treadle.utilities.model_helpers import is_overridden
from treadle.utilities.signature_utils import is_param_in_hook_signature
from treadle.utilities.types import LRSchedulerConfig
from treadle_fabric import MisconfigurationException

HOMES = """
    accelerators:AcceleratorRegistry = treadle_fabric:ACCELERATOR_REGISTRY
    callbacks.model_checkpoint:ModelCheckpoint = treadle.callbacks:ModelCheckpoint
    cli:ReduceLROnPlateau = treadle.cli.configured:ReduceLROnPlateau
    cli:SaveConfigCallback = treadle.cli.configured:SaveConfigCallback
    cli:instantiate_class = treadle.cli.configured:instantiate_class
    core:LightningModule = treadle:LightningModule
    core.datamodule:LightningDataModule = treadle:LightningDataModule
    core.hooks:DataHooks = treadle.module.hooks:DataHooks
    core.mixins.hparams_mixin:HyperparametersMixin = treadle.module.hparams:HyperparametersMixin
    core.module:LightningModule = treadle:LightningModule
    core.optimizer:LightningOptimizer = treadle.module.optimizer:LightningOptimizer
    demos:BoringModel = treadle.demos.boring_classes:BoringModel
    demos.transformer:WikiText2 = treadle.demos:WikiText2
    loggers.tensorboard:TensorBoardLogger = treadle_fabric:TensorBoardLogger
    plugins.io:AsyncCheckpointIO = treadle_fabric:AsyncCheckpointIO
    plugins.precision:MixedPrecision = treadle_fabric:MixedPrecision
    strategies:StrategyRegistry = treadle_fabric:STRATEGY_REGISTRY
    strategies.ddp:DDPStrategy = treadle_fabric:DDPStrategy
    strategies.deepspeed:DeepSpeedStrategy = treadle_fabric.strategies:DeepSpeedStrategy
    strategies.fsdp:FSDPStrategy = treadle_fabric:FSDPStrategy
    strategies.model_parallel:ModelParallelStrategy = treadle_fabric:ModelParallelStrategy
    strategies.parallel:ParallelStrategy = treadle_fabric:ParallelStrategy
    strategies.single_device:SingleDeviceStrategy = treadle_fabric:SingleDeviceStrategy
    strategies.single_xla:SingleDeviceXLAStrategy = treadle_fabric.strategies:SingleDeviceXLAStrategy
    strategies.strategy:Strategy = treadle_fabric:Strategy
    strategies.xla:XLAStrategy = treadle_fabric.strategies:XLAStrategy
    tuner.lr_finder:_LRFinder = treadle.searches:LRFinder
    tuner.tuning:Tuner = treadle.tuner:Tuner
    utilities.combined_loader:CombinedLoader = treadle:CombinedLoader
    utilities.model_helpers:is_overridden = treadle.run.dispatch:is_overridden
    utilities.model_summary.model_summary:ModelSummary = treadle.utilities.model_summary:ModelSummary
    utilities.model_summary.model_summary_deepspeed:DeepSpeedSummary = treadle.utilities.model_summary:DeepSpeedSummary
    utilities.parsing:AttributeDict = treadle_fabric:AttributeDict
    utilities.rank_zero:rank_zero_only = treadle_fabric:rank_zero_only
    utilities.rank_zero:LightningDeprecationWarning = treadle_fabric:LightningDeprecationWarning
"""


def look_up(place: str) -> Any:
    module, _, name = place.strip().partition(":")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("row", HOMES.strip().splitlines())
def test_a_path_leads_to_the_same_object_as_its_home(row: str) -> None:
    path, home = row.split(" = ")
    assert look_up(f"treadle.{path.strip()}") is look_up(home)


@pytest.mark.parametrize(
    "path",
    """accelerators cli core core.hooks demos demos.boring_classes loggers loggers.csv_logs plugins plugins.precision
    strategies strategies.ddp tuner utilities utilities.types utilities.parsing
    utilities.model_summary.model_summary""".split(),
)
def test_packages_are_attributes(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found: Any = treadle
    for name in path.split("."):
        assert name in dir(found)
        if hasattr(found, "__getattr__"):  # as if nobody had imported the submodule yet
            monkeypatch.delitem(vars(found), name, raising=False)
        found = getattr(found, name)
    assert found is importlib.import_module(f"treadle.{path}")


class Pair(LightningModule):
    def __init__(self, lr: float = 0.1, ignored: Any = None, **kwargs: Any) -> None:
        super().__init__()
        parsing.save_hyperparameters(self, ignore="ignored")
        self.own = 3


class TestParsing:
    def test_attributes_are_found_wherever_they_are(self) -> None:
        module, data = Pair(lr=0.5), LightningDataModule()
        data.batch_size = 4  # type: ignore[attr-defined]
        assert parsing.lightning_hasattr(module, "lr") and parsing.lightning_hasattr(module, "own")
        assert (parsing.lightning_getattr(module, "lr"), parsing.lightning_getattr(module, "own")) == (0.5, 3)
        parsing.lightning_setattr(module, "lr", 7)
        parsing.lightning_setattr(module, "own", 8)
        assert module.hparams.lr == 7 and module.own == 8
        assert not parsing.lightning_hasattr(module, "batch_size")
        for call in (parsing.lightning_getattr, lambda *a: parsing.lightning_setattr(*a, 1)):
            with pytest.raises(AttributeError, match="batch_size is an attribute neither of Pair"):
                call(module, "batch_size")

    def test_hyperparameters_are_saved_by_a_function(self) -> None:
        assert Pair(0.2, "x", more=1).hparams == {"lr": 0.2, "more": 1}

    def test_arguments_of_running_constructors(self) -> None:
        class Base:
            def __init__(self, a: int, *rest: int, b: int = 2, **kwargs: int) -> None:
                frame = inspect.currentframe()
                assert frame is not None
                self.given = parsing.get_init_args(frame)
                self.path = parsing.collect_init_args(frame, [])

        class Derived(Base):
            def __init__(self, x: int, **kwargs: int) -> None:
                super().__init__(1, 5, z=3)

        assert Base(1, 2, b=3, c=4).given == {"a": 1, "b": 3, "c": 4}
        assert Derived(9, y=1).path == [{"a": 1, "b": 2, "z": 3}, {"x": 9, "y": 1}]
        frame = inspect.currentframe()
        assert frame is not None and parsing.get_init_args(frame) == {}
        assert parsing.parse_class_init_keys(Base) == ("self", "rest", "kwargs")
        assert parsing.parse_class_init_keys(nn.Linear) == ("self", None, None)

    def test_a_namespace_is_cleaned(self) -> None:
        values = {"a": 1, "f": lambda: 1}
        parsing.clean_namespace(values)
        assert values == {"a": 1}


class Hooks:
    def named(self, batch: Any, dataloader_iter: Any) -> None: ...

    def some(self, batch: Any, *args: Any) -> None: ...


@pytest.mark.parametrize(
    ("hook", "param", "arguments", "takes"),
    [
        (Hooks().named, "dataloader_iter", {}, True),
        (Hooks().named, "batch_idx", {}, False),
        (Hooks.named, "dataloader_iter", {"explicit": True}, True),
        (Hooks().named, "batch_idx", {"min_args": 2}, True),
        (Hooks().named, "batch_idx", {"min_args": 3}, False),
        (Hooks().some, "batch_idx", {}, True),
        (Hooks().some, "batch_idx", {"explicit": True}, False),
    ],
)
def test_arguments_of_hooks(hook: Any, param: str, arguments: dict[str, Any], takes: bool) -> None:
    assert is_param_in_hook_signature(hook, param, **arguments) is takes


def test_what_is_overridden() -> None:
    model = BoringModel()
    assert is_overridden("training_step", model) and not is_overridden("predict_step", model)
    assert not is_overridden("training_step", None) and not is_overridden("no_such_hook", model)
    with pytest.raises(ValueError, match="Pass the class"):
        is_overridden("__len__", [])
    assert isinstance(model, CheckpointHooks) and isinstance(model, DataHooks) and isinstance(model, ModelHooks)
    assert isinstance(LightningDataModule(), HyperparametersMixin)


def test_sizes_of_batches() -> None:
    assert extract_batch_size({"a": [torch.ones(3, 2)]}) == 3
    with pytest.raises(MisconfigurationException, match="batch_size="):
        extract_batch_size({})


@pytest.mark.filterwarnings("ignore:There is no file")
def test_files_with_hyperparameters(tmp_path: Path) -> None:
    values = {"a": 1, "b": {"c": [1, 2]}, "d": None, "e": 1e-05, "f": "x"}
    saving.save_hparams_to_yaml(tmp_path / "h.yaml", values)
    assert saving.load_hparams_from_yaml(tmp_path / "h.yaml") == values
    saving.save_hparams_to_yaml(tmp_path / "n.yaml", argparse.Namespace(a=1))
    assert saving.load_hparams_from_yaml(tmp_path / "n.yaml") == {"a": 1}
    saving.save_hparams_to_tags_csv(tmp_path / "h.csv", {"a": 1, "b": "x", "c": [1], "e": 1.5})
    assert saving.load_hparams_from_tags_csv(tmp_path / "h.csv") == {"a": 1, "b": "x", "c": [1], "e": 1.5}
    assert saving.load_hparams_from_yaml(tmp_path / "none.yaml") == {}
    for wrong, message in (([1], "a dictionary or a Namespace"), ({}, "make the folder first")):
        path = tmp_path / ("wrong.yaml" if wrong else "no/folder.yaml")
        with pytest.raises(MisconfigurationException, match=message):
            saving.save_hparams_to_yaml(path, wrong)  # type: ignore[arg-type]
    nested = {"a": {"b": 1, "z": {"q": 1}}, "c": 2}
    saving.update_hparams(nested, {"a": {"b": 5, "z": {"r": 1}}, "d": 1})
    assert nested == {"a": {"b": 5, "z": {"q": 1, "r": 1}}, "c": 2, "d": 1}


class Toggling(ManualOptimBoringModel):
    """Two optimizers; notes which layers require gradients while each is toggled."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(32, 2)
        self.seen: list[tuple[bool, bool]] = []

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            assert isinstance(optimizer, LightningOptimizer) and isinstance(optimizer, torch.optim.SGD)
            assert repr(optimizer).startswith("LightningSGD") and optimizer.optimizer is not optimizer
            with optimizer.toggle_model(sync_grad=batch_idx == 1):
                self.note()
                optimizer.step()
        self.note()

    def note(self) -> None:
        self.seen.append((self.layer.weight.requires_grad, self.other.weight.requires_grad))

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.layer, self.other)]


def test_an_optimizer_toggles_the_model(tmp_path: Path) -> None:
    model = Toggling()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        limit_train_batches=1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(model)
    assert model.seen == [(True, False), (False, True), (True, True)]
    alone = LightningOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    alone.step(do_nothing_closure)
    with pytest.raises(MisconfigurationException, match="of a running fit"), alone.toggle_model():
        pass


def test_optimizers_and_schedulers_of_a_module() -> None:
    (sgd,), (config,) = _init_optimizers_and_lr_schedulers(BoringModel())
    assert type(sgd) is torch.optim.SGD and type(config) is LRSchedulerConfig and config.interval == "epoch"


def test_the_keys_of_hyperparameters_in_a_checkpoint(tmp_path: Path) -> None:
    class Model(BoringModel):
        def __init__(self, width: int = 3) -> None:
            super().__init__()
            self.save_hyperparameters()

    class Renamed(Model):
        CHECKPOINT_HYPER_PARAMS_KEY = "mine"  # type: ignore[misc]

    trainer = Trainer(
        accelerator="cpu",
        fast_dev_run=True,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(Renamed(4))
    trainer.save_checkpoint(tmp_path / "r.ckpt")
    assert Renamed.load_from_checkpoint(tmp_path / "r.ckpt").hparams == torch.load(tmp_path / "r.ckpt")["mine"]
    trainer.fit(Model())
    trainer.save_checkpoint(tmp_path / "m.ckpt")
    saved = torch.load(tmp_path / "m.ckpt")
    assert saved[LightningModule.CHECKPOINT_HYPER_PARAMS_KEY] == {"width": 3}
    assert saved[LightningModule.CHECKPOINT_HYPER_PARAMS_NAME] == "kwargs"
    assert LightningModule.CHECKPOINT_HYPER_PARAMS_TYPE == "hparams_type"
    assert LightningDataModule.CHECKPOINT_HYPER_PARAMS_KEY == "datamodule_hyper_parameters"


def test_what_a_test_needs() -> None:
    assert testing._runif_reasons(rich=True, psutil=True)[1] == {}
    assert "tensorrt" in testing._runif_reasons(tensorrt=True)[0]
