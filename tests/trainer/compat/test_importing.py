"""Imports of Lightning give Treadle.

Tests of ``treadle.compat.importing``, ``treadle.compat.messages``.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import logging
import os
import pickle
import re
import runpy
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from lightning_utilities.core.imports import RequirementCache, module_available

import treadle
import treadle.callbacks
import treadle_fabric
from treadle import MisconfigurationException
from treadle.compat import SHIM, replace_lightning
from treadle.utilities import rank_zero_info, rank_zero_warn
from treadle_fabric import LeftOutError, MissingPackageError

pytestmark = [pytest.mark.apart, pytest.mark.timeout(60)]


def load(name: str) -> Any:
    """Import a module of Lightning, in the fork that a test here runs in."""
    replace_lightning()
    return importlib.import_module(name)


@pytest.mark.parametrize("name", ["lightning.pytorch", "pytorch_lightning"])
def test_one_class_under_all_names(name: str) -> None:
    for module, attribute, thing in [
        ("", "Trainer", treadle.Trainer),
        (".trainer", "Trainer", treadle.Trainer),
        (".trainer.trainer", "Trainer", treadle.Trainer),
        (".callbacks", "EarlyStopping", treadle.callbacks.EarlyStopping),
        (".callbacks.early_stopping", "EarlyStopping", treadle.callbacks.EarlyStopping),
        (".core.module", "LightningModule", treadle.LightningModule),
    ]:
        assert getattr(load(name + module), attribute) is thing
    assert load("lightning").Fabric is load("lightning.fabric").Fabric is load("lightning_fabric").Fabric
    assert load("lightning").Fabric is treadle_fabric.Fabric


def test_submodules_are_there_without_an_import_of_their_own() -> None:
    found = load("lightning").pytorch.callbacks.early_stopping.EarlyStopping
    assert found is treadle.callbacks.EarlyStopping
    assert load("lightning").fabric.strategies.DDPStrategy is treadle_fabric.DDPStrategy
    assert {"callbacks", "loggers", "Trainer", "utilities"} <= set(dir(load("lightning.pytorch")))


def test_import_star_takes_what_lightning_names_so() -> None:
    replace_lightning()
    space: dict[str, Any] = {}
    exec("from lightning.pytorch import *\nfrom lightning.pytorch.callbacks import *", space)
    assert space["Trainer"] is treadle.Trainer and space["ModelCheckpoint"] is treadle.callbacks.ModelCheckpoint
    assert not [name for name in space if name.startswith("_") and name != "__builtins__"]


def test_the_version_is_lightnings() -> None:
    assert load("lightning").__version__ == load("lightning.pytorch").__version__ == "2.6.6"
    assert load("lightning.__version__").version == "2.6.6" and load("lightning").__version__ == "2.6.6"
    for distribution in ("lightning", "pytorch-lightning", "pytorch_lightning", "lightning_fabric"):
        assert importlib.metadata.version(distribution) == "2.6.6"
    assert RequirementCache("pytorch-lightning>=2.6.6") and not RequirementCache("lightning>=2.7")
    assert "lightning" in importlib.metadata.packages_distributions()["lightning"]


def test_modules_look_like_modules() -> None:
    module = load("lightning.pytorch.callbacks")
    assert inspect.ismodule(module) and module.__name__ == module.__spec__.name == "lightning.pytorch.callbacks"
    assert module.__file__ == str(SHIM / "lightning/pytorch/callbacks/__init__.py") and module.__path__
    assert inspect.getmodule(treadle.callbacks.EarlyStopping).__name__.startswith("treadle.")  # type: ignore[union-attr]
    assert not hasattr(module, "__wrapped__") and not hasattr(module, "nothing")
    assert module_available("lightning.pytorch.callbacks") and not module_available("lightning.app")
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        exec("from lightning.pytorch.callbacks import nothing")
    with pytest.raises(ModuleNotFoundError, match="No module named 'lightning.nothing'"):
        load("lightning.nothing")


def test_what_is_set_on_a_module_is_set_in_treadle(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_lightning()
    with mock.patch("lightning.pytorch.callbacks.EarlyStopping") as fake:
        assert treadle.callbacks.EarlyStopping is fake  # type: ignore[comparison-overlap]
        assert load("pytorch_lightning.callbacks").EarlyStopping is fake
    assert inspect.isclass(treadle.callbacks.EarlyStopping)
    monkeypatch.setattr("lightning.pytorch.Trainer", "fake")
    assert treadle.Trainer == "fake"  # type: ignore[comparison-overlap]
    monkeypatch.undo()
    assert load("lightning").Trainer is treadle.Trainer and inspect.isclass(treadle.Trainer)
    module = load("lightning.pytorch")
    module.of_the_program = 1
    assert module.of_the_program == 1 and not hasattr(treadle, "of_the_program")


def test_pickles_that_name_lightnings_modules_load() -> None:
    replace_lightning()
    named = b"clightning.pytorch.callbacks.early_stopping\nEarlyStopping\n."
    assert pickle.loads(named) is treadle.callbacks.EarlyStopping


@pytest.mark.parametrize(
    ("statement", "remedy"),
    [
        ("from pytorch_lightning.utilities.cli import LightningCLI", "Lightning 2 has it as lightning.pytorch.cli."),
        ("from pytorch_lightning.utilities import cli", "Lightning 2 has it as lightning.pytorch.cli."),
        ("from pytorch_lightning.plugins import DDPPlugin", "lightning.pytorch.strategies.DDPStrategy."),
        ("import pytorch_lightning.loggers.base", "lightning.pytorch.loggers.logger."),
        ("from pytorch_lightning.loggers import TestTubeLogger", "use TensorBoardLogger"),
        ("from lightning.pytorch.loops import FitLoop", "Fabric"),
        ("import pytorch_lightning.plugins.precision.native_amp", "use MixedPrecision"),
        ("from lightning.fabric.strategies import DataParallelStrategy", "left out on purpose: use strategy='ddp'"),
        ("import lightning.pytorch.serve", "left out on purpose: export the model, with to_onnx"),
    ],
)
def test_what_is_not_there_says_what_to_use(statement: str, remedy: str) -> None:
    replace_lightning()
    with pytest.raises(ImportError, match=re.escape(remedy)):
        exec(statement)


def test_what_is_inside_of_lightning_can_be_imported_and_not_used() -> None:
    """For libraries that name such a thing in an annotation, or use it in one case of many."""
    connector = load("lightning.pytorch.trainer.connectors.checkpoint_connector")._CheckpointConnector
    assert connector is load("pytorch_lightning.trainer.connectors.checkpoint_connector")._CheckpointConnector
    assert not isinstance(1, load("lightning.pytorch.loggers").LitLogger)
    with pytest.raises(LeftOutError, match="_CheckpointConnector is left out on purpose: use trainer.save_checkpoint"):
        connector(None)


def test_names_that_need_a_package_are_imported_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries import LightningCLI, and only those who run a command line have jsonargparse."""
    for name in [name for name in sys.modules if name.startswith("treadle.cli")]:  # an earlier test may have had it
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    cli = load("lightning.pytorch.cli")
    made = cli.instantiate_class((), {"class_path": "collections.Counter", "init_args": {"a": 2}})
    assert made["a"] == 2
    with pytest.raises(MissingPackageError, match="jsonargparse"):
        cli.LightningCLI(args=[])


def test_an_attribute_that_is_left_out_is_not_there() -> None:
    loggers = load("pytorch_lightning.loggers")
    assert not hasattr(loggers, "TestTubeLogger")
    with pytest.raises(AttributeError, match="TensorBoardLogger"):
        _ = loggers.TestTubeLogger


@pytest.mark.parametrize("name", ["lightning", "lightning.pytorch", "pytorch_lightning", "lightning.fabric"])
def test_lightnings_loggers_govern_messages(name: str, caplog: pytest.LogCaptureFixture) -> None:
    early = logging.getLogger(name)
    early.setLevel(logging.ERROR)  # as programs do before they import Lightning, too
    replace_lightning()
    logger = logging.getLogger(name)
    rank_zero_info("not to be seen")
    logger.setLevel(logging.INFO)
    rank_zero_info("to be seen")
    assert caplog.messages == ["to be seen"]
    logging.getLogger(f"{name}.accelerators.cuda").setLevel(logging.CRITICAL)  # a child, by which nothing is logged
    logger.addHandler(handler := mock.Mock(level=logging.NOTSET))
    rank_zero_info("handled")
    assert handler.handle.call_count == 1
    logger.propagate = False
    rank_zero_info("kept")
    assert "kept" not in caplog.messages


@pytest.mark.parametrize(
    "module", ["lightning", "lightning.*", r"lightning\.pytorch\..*", "pytorch_lightning", "lightning.fabric"]
)
def test_filters_of_lightnings_warnings_hold(module: str) -> None:
    replace_lightning()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", module="torch")
        warnings.filterwarnings("ignore", "nothing of this", module=module)
        rank_zero_warn("seen")
        warnings.filterwarnings("ignore", module=module)
        rank_zero_warn("not seen")
    assert [str(each.message) for each in seen] == ["seen"]


def test_processes_that_are_started_inherit_it() -> None:
    """Without an import of Lightning, which takes seconds."""
    replace_lightning()
    code = "import importlib.util as u; print(u.find_spec('lightning').origin)"
    code += "\nimport importlib.metadata as m; print(m.version('lightning'))"
    said = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True, timeout=30
    ).stdout
    assert said.split() == [str(SHIM / "lightning/__init__.py"), "2.6.6"]
    replace_lightning()
    assert os.environ["PYTHONPATH"].count(str(SHIM)) == 1


def test_a_lightning_that_is_there_already_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import json

    monkeypatch.setitem(sys.modules, "lightning", json)
    with pytest.raises(MisconfigurationException, match="lightning is imported already, from .*json.*treadle run"):
        replace_lightning()


def test_a_program_trains(capsys: pytest.CaptureFixture[str]) -> None:
    program = """
        import lightning as L, pytorch_lightning, torch, treadle
        from lightning.pytorch.callbacks.early_stopping import EarlyStopping
        from torch.utils.data import DataLoader, TensorDataset

        class Net(L.LightningModule):
            def __init__(self):
                super().__init__()
                self.layer = torch.nn.Linear(4, 1)
            def training_step(self, batch, batch_idx):
                loss = self.layer(batch[0]).square().mean()
                self.log("loss", loss)
                return loss
            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.1)

        stop = EarlyStopping("loss", check_on_train_epoch_end=True)
        trainer = L.Trainer(max_epochs=2, callbacks=stop, logger=False, enable_checkpointing=False)
        trainer.fit(Net(), DataLoader(TensorDataset(torch.ones(8, 4)), batch_size=4))
        assert isinstance(trainer, treadle.Trainer) and pytorch_lightning.Trainer is L.Trainer
        print("steps", trainer.global_step)
    """
    Path("program.py").write_text(textwrap.dedent(program))
    replace_lightning()
    runpy.run_path("program.py", run_name="__main__")
    assert "steps 4\n" in capsys.readouterr().out
