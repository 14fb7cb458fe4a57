"""Modules that a config made: their hyper-parameters and checkpoints, and the config that is written beside the logs.

Tests of ``treadle.cli.configured.objects``, ``treadle.cli.configured.save_config``,
``treadle.module.configured.making``.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tests.processes import run_in_ranks
from tests.trainer.cli.programs import Data, Net, WithOptimizer, cli

import treadle as L
from treadle.cli import LightningCLI, SaveConfigCallback, instantiate_module
from treadle.loggers import CSVLogger, Logger
from treadle_fabric import CheckpointUnsafeError, MisconfigurationException

MAKER = "treadle.cli.instantiate_module"
LINEAR = ["--model.encoder=torch.nn.Linear", "--model.encoder.in_features=4", "--model.encoder.out_features=4"]


@pytest.fixture(autouse=True)
def no_words_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py"])


def trained(*words: str, **kwargs: Any) -> tuple[LightningCLI, Path]:
    """Fit, and save a checkpoint."""
    made = cli("fit", *words, **{"model": WithOptimizer, "run": True, "save_config_callback": None, **kwargs})
    made.trainer.save_checkpoint("made.ckpt")
    return made, Path("made.ckpt")


# Hyper-parameters and checkpoints


def test_a_checkpoint_makes_the_module_again() -> None:
    made, path = trained(*LINEAR, "--model.hidden=3", "--model.lr=1e-5")
    saved = torch.load(path, weights_only=True)["hyper_parameters"]
    assert saved == dict(made.model.hparams)
    assert saved["lr"] == 1e-5 and saved["hidden"] == 3 and saved["_instantiator"] == MAKER
    assert saved["encoder"]["class_path"] == "torch.nn.Linear" and saved["encoder"]["init_args"]["in_features"] == 4
    again = WithOptimizer.load_from_checkpoint(path)
    assert isinstance(again.encoder, torch.nn.Linear) and torch.equal(again.encoder.weight, made.model.encoder.weight)
    assert again.hparams == made.model.hparams
    assert WithOptimizer.load_from_checkpoint(path, lr=0.5).hparams.lr == 0.5
    with pytest.raises(MisconfigurationException, match="takes no argument 'lrr'. Did you mean 'lr'"):
        WithOptimizer.load_from_checkpoint(path, lrr=0.5)
    with pytest.raises(MisconfigurationException, match="do not fit its __init__: .*hidden"):
        WithOptimizer.load_from_checkpoint(path, hidden="wide")
    assert Data.load_from_checkpoint(path).batch_size == 4


def test_a_checkpoint_knows_the_class_that_was_chosen() -> None:
    words = ["--model=tests.trainer.cli.programs.WithOptimizer", "--data=tests.trainer.cli.programs.Data"]
    made, path = trained(*words, "--model.hidden=3", "--data.batch_size=2", model=None, datamodule_class=None)
    assert made.model.hparams["_class_path"] == "tests.trainer.cli.programs.WithOptimizer"
    for cls in (WithOptimizer, Net, L.LightningModule):
        again = cls.load_from_checkpoint(path)
        assert type(again) is WithOptimizer and again.hparams.hidden == 3
    assert Data.load_from_checkpoint(path).batch_size == 2

    class Other(L.LightningModule):
        pass

    with pytest.raises(MisconfigurationException, match="WithOptimizer, which is no Other"):
        Other.load_from_checkpoint(path)


def test_a_checkpoint_of_lightnings_command_line() -> None:
    made, path = trained("--model.hidden=3")
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["hyper_parameters"]["_instantiator"] = "lightning.pytorch.cli.instantiate_module"
    del checkpoint["treadle"]
    torch.save(checkpoint, "lightning.ckpt")
    assert WithOptimizer.load_from_checkpoint("lightning.ckpt").hparams.hidden == 3


def test_a_default_load_imports_nothing_that_the_file_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "surprise.py").write_text("import torch\nprint('run')\nclass Layer(torch.nn.Identity):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    made, path = trained("--model.encoder=surprise.Layer")
    monkeypatch.delitem(sys.modules, "surprise")
    with pytest.raises(CheckpointUnsafeError, match=r"names the class surprise.Layer, .* has not imported surprise"):
        WithOptimizer.load_from_checkpoint(path)
    assert "surprise" not in sys.modules
    assert WithOptimizer.load_from_checkpoint(path, weights_only=False).encoder is not None


def test_values_that_a_link_made_are_kept_as_they_are() -> None:
    class Linked(LightningCLI):
        def add_arguments_to_parser(self, parser: Any) -> None:
            parser.link_arguments("data.width", "model.hidden", apply_on="instantiate")

    made, path = trained(of=Linked)
    assert made.model.hparams.hidden == 4
    assert WithOptimizer.load_from_checkpoint(path).hparams.hidden == 4


class Outer(WithOptimizer):
    def __init__(self, inner: Net, **more: int) -> None:
        super().__init__()
        self.inner = inner
        self.save_hyperparameters()


def test_modules_inside_of_modules_keep_what_is_their_own() -> None:
    words = ["--model.inner=tests.trainer.cli.programs.Net", "--model.inner.hidden=2"]
    made, path = trained(*words, model=Outer)
    assert made.model.inner.hparams == {"hidden": 2, "lr": 0.1, "encoder": None}
    assert made.model.hparams.inner["init_args"]["hidden"] == 2
    assert Outer.load_from_checkpoint(path).inner.hparams.hidden == 2


def test_some_hyperparameters_and_none() -> None:
    class Some(WithOptimizer):
        def __init__(self, hidden: int = 8, secret: int = 1) -> None:
            super().__init__()
            self.hparams.clear()
            self.save_hyperparameters(ignore="secret")

    assert dict(cli(model=Some).model.hparams) == {"hidden": 8, "_instantiator": MAKER}
    assert dict(cli(model=Some, load_from_checkpoint_support=False).model.hparams) == {"hidden": 8}


def test_instantiate_module_by_hand() -> None:
    made = instantiate_module(Net, {"hidden": 2, "encoder": {"class_path": "torch.nn.Identity"}})
    assert isinstance(made.encoder, torch.nn.Identity) and made.hparams.hidden == 2


def test_the_checkpoint_decides_how_the_module_is_made(caplog: pytest.LogCaptureFixture) -> None:
    _, path = trained("--model.hidden=3")
    with caplog.at_level("INFO"):
        made = cli("test", f"--ckpt_path={path}", "--model.hidden=5", run=True, save_config_callback=None)
    assert made.model.hparams.hidden == 3
    assert "hyperparameters of made.ckpt: hidden=3 (configured: 5)" in caplog.text
    made = cli(
        "fit", f"--ckpt_path={path}", "--model=WithOptimizer", "--trainer.max_epochs=2", model=None, run=True,
        save_config_callback=None,
    )  # fmt: skip
    assert made.model.hparams.hidden == 3 and made.trainer.global_step == 4


# The config beside the logs


def test_the_config_is_written_once_and_reads_back() -> None:
    words = ["--model.hidden=3", "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs"]
    made = cli("fit", *words, model=WithOptimizer, run=True)
    path = Path(made.trainer.log_dir or "", "config.yaml")
    values = yaml.safe_load(path.read_text())
    assert values["model"]["hidden"] == 3 and values["seed_everything"] == 0 and values["trainer"]["precision"] is None
    made.trainer.validate(made.model, made.datamodule)  # writes none
    assert [each.name for each in path.parent.glob("config*")] == ["config.yaml"]
    again = cli("fit", "-c", str(path), model=WithOptimizer, run=True)
    written = Path(again.trainer.log_dir or "", "config.yaml")
    assert written.parent.name == "version_1" and written.read_text() == path.read_text()


@pytest.mark.filterwarnings("ignore:.*metrics.csv. is there already:UserWarning")
@pytest.mark.filterwarnings("ignore:Experiment logs directory")
def test_another_config_is_not_overwritten() -> None:
    kwargs: Any = {"model": WithOptimizer, "run": True}
    words = ["fit", *(f"--trainer.logger{more}" for more in ("=CSVLogger", ".save_dir=logs", ".version=0"))]
    made = cli(*words, **kwargs)
    made.trainer.save_checkpoint("last.ckpt")
    folder = Path(made.trainer.log_dir or "")
    before = (folder / "config.yaml").read_text()
    with pytest.raises(MisconfigurationException, match=r"has the config of another run.*'overwrite': True"):
        cli(*words, **kwargs)
    assert (folder / "config.yaml").read_text() == before
    for _ in range(2):  # the run goes on, with a config of its own
        cli(*words, "--ckpt_path=last.ckpt", "--trainer.max_epochs=2", **kwargs)
    assert sorted(each.name for each in folder.glob("config*")) == ["config.yaml", "config_1.yaml"]
    assert yaml.safe_load((folder / "config_1.yaml").read_text())["trainer"]["max_epochs"] == 2
    cli(*words, "--model.hidden=2", save_config_kwargs={"overwrite": True}, **kwargs)
    assert yaml.safe_load((folder / "config.yaml").read_text())["model"]["hidden"] == 2


def test_parts_of_the_config_in_files_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "net.yaml").write_text("hidden: 2\n")
    words = ["--model=net.yaml", "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs"]
    kwargs = {"multifile": True, "config_filename": "settings.yaml"}
    made = cli("fit", *words, model=WithOptimizer, run=True, save_config_kwargs=kwargs)
    folder = Path(made.trainer.log_dir or "")
    assert yaml.safe_load((folder / "settings.yaml").read_text())["model"] == "net.yaml"
    assert yaml.safe_load((folder / "net.yaml").read_text())["hidden"] == 2


def test_the_config_goes_to_a_logger() -> None:
    class ToLogger(SaveConfigCallback):
        def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
            assert trainer.logger is not None
            trainer.logger.log_hyperparams({"stage": stage, "hidden": self.config.model.hidden})

    words = ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs"]
    kwargs: Any = {"save_config_callback": ToLogger, "save_config_kwargs": {"save_to_log_dir": False}}
    made = cli("validate", *words, run=True, **kwargs)
    assert isinstance(made.trainer.logger, CSVLogger)
    made.trainer.logger.save()
    folder = Path(made.trainer.log_dir or "")
    assert "stage" in (folder / "hparams.yaml").read_text() and not (folder / "config.yaml").exists()
    with pytest.raises(SystemExit):
        cli("fit", run=True, save_config_kwargs={"save_to_log_dir": False})


def test_a_trial_run_writes_none() -> None:
    cli("fit", "--trainer.fast_dev_run=true", model=WithOptimizer, run=True)
    assert not list(Path().glob("**/config.yaml"))


def fit_on_a_rank() -> None:
    words = ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp", "--model.hidden=3"]
    words += ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs"]
    made = cli("fit", *words, model=WithOptimizer, run=True)
    print("rank", made.trainer.global_rank, made.trainer.log_dir, flush=True)


def test_on_two_ranks() -> None:
    said = run_in_ranks(fit_on_a_rank)
    ranks = sorted(line for line in said.splitlines() if line.startswith("rank"))
    assert ranks == ["rank 0 logs/lightning_logs/version_0", "rank 1 logs/lightning_logs/version_0"]
    [config] = Path().glob("**/config.yaml")
    assert yaml.safe_load(config.read_text())["model"]["hidden"] == 3


def test_a_module_without_arguments() -> None:
    class Bare(WithOptimizer):
        def __init__(self) -> None:
            super().__init__()

    assert instantiate_module(Bare, {}).hparams.hidden == 8
    assert dict(cli(model=Bare).model.hparams)["hidden"] == 8


class Numbers(Logger):
    """Writes no files, as the loggers of services."""

    runs = itertools.count()

    def __init__(self) -> None:
        self._version = f"run{next(self.runs)}"

    @property
    def name(self) -> str:
        return "net"

    @property
    def version(self) -> str:
        return self._version

    def log_metrics(self, metrics: Any, step: int | None = None) -> None: ...

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None: ...


def test_the_config_of_a_run_without_a_folder_of_its_own() -> None:
    """It never meets a file of the user's, such as the config that was read, nor the config of another run."""
    given = "model:\n  hidden: 3\n"
    Path("config.yaml").write_text(given)
    kwargs: Any = {"model": WithOptimizer, "run": True}
    for _ in range(2):
        cli("fit", "--config=config.yaml", f"--trainer.logger={Numbers.__module__}.Numbers", **kwargs)
    assert len(list(Path("net").glob("run*/config.yaml"))) == 2
    for epochs in ("2", "2", "3"):
        cli("fit", "--config=config.yaml", f"--trainer.max_epochs={epochs}", **kwargs)
    assert sorted(each.name for each in Path().glob("config*")) == ["config.yaml", "config_1.yaml", "config_2.yaml"]
    assert Path("config.yaml").read_text() == given
