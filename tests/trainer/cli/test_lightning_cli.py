"""LightningCLI: command lines, configs and environment variables, and what is made of them.

Tests of ``treadle.cli.configured.program``, ``treadle.cli.configured.parser``, ``treadle.cli.configured.types``,
``treadle.cli.configured.optimizers``, ``treadle.cli.configured.explain``.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import pickle
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tests.processes import importing_tests
from tests.trainer.cli.programs import QUIET, Data, Injected, Net, WithOptimizer, cli
from torch.optim import lr_scheduler

import treadle as L
import treadle.callbacks
import treadle.loggers
import treadle.strategies
import treadle_fabric
from treadle.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from treadle.cli import (
    LightningArgumentParser,
    LightningCLI,
    LRSchedulerTypeTuple,
    ReduceLROnPlateau,
    SaveConfigCallback,
    instantiate_class,
)
from treadle.loggers import CSVLogger
from treadle_fabric import (
    CheckpointIO,
    ClusterEnvironment,
    MisconfigurationException,
    MissingPackageError,
    Precision,
    TorchCheckpointIO,
)
from treadle_fabric.strategies import DDPStrategy


@pytest.fixture(autouse=True)
def no_words_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The words after `pytest` are not for the command lines of the tests."""
    monkeypatch.setattr(sys, "argv", ["train.py"])


def refused(capsys: pytest.CaptureFixture[str], *words: str, **kwargs: Any) -> str:
    """What the parser says of a command line, after the usage."""
    with pytest.raises(SystemExit) as ended:
        cli(*words, **kwargs)
    assert ended.value.code == 2
    return capsys.readouterr().err.partition("error: ")[2]


# What is made


def test_arguments_reach_module_data_and_trainer() -> None:
    made = cli("--model.hidden=3", "--model.lr=1e-3", "--data.batch_size=2", "--trainer.max_epochs=7")
    assert isinstance(made.model, Net) and made.model.layers[0].out_features == 3
    assert isinstance(made.datamodule, Data) and made.datamodule.batch_size == 2
    assert made.trainer.max_epochs == 7
    assert made.model.hparams.lr == 0.001  # a number, though YAML takes "1e-3" for text


def test_arguments_of_our_own_trainer_are_there_with_their_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli("--help")
    said = " ".join(capsys.readouterr().out.split())
    assert "--trainer.on_nonfinite" in said and "--trainer.auto_resume {true,false}" in said
    assert "--trainer.on_save_error {raise,warn}" in said and "(type: int, default: 50)" not in said
    assert "batches of one optimizer step. Default: 1. (type: int, default: 1)" in said
    assert "--model.hidden HIDDEN The width. (type: int, default: 8)" in said


def test_a_name_alone_is_enough_for_all_callbacks_and_loggers() -> None:
    """Also for those that a program imports only where it uses them."""
    names = ["DeviceStatsMonitor", "StochasticWeightAveraging"]
    words = [*(f"--trainer.callbacks+={name}" for name in names), "--trainer.callbacks.swa_lrs=0.1"]
    made = cli(*words, "--trainer.logger=WandbLogger", save_config_callback=None)
    assert [type(each).__name__ for each in made.trainer.callbacks][:2] == names
    assert type(made.trainer.logger).__name__ == "WandbLogger"
    assert made.config.trainer.callbacks[1].init_args.device == torch.device("cpu")
    assert "device: cpu\n" in made.parser.dump(made.config)


def test_classes_by_path_or_name() -> None:
    made = cli(
        "--trainer.callbacks=EarlyStopping",
        "--trainer.callbacks.monitor=loss",
        "--trainer.callbacks+=treadle.callbacks.LearningRateMonitor",
        "--trainer.logger=CSVLogger",
        "--trainer.logger.save_dir=logs",
        "--trainer.logger.version=3",
        "--trainer.strategy=DDPStrategy",
        "--trainer.strategy.find_unused_parameters=true",
        "--trainer.plugins+=TorchCheckpointIO",
        "--trainer.plugins+=MixedPrecision",
        "--trainer.plugins.precision=bf16-mixed",
        "--trainer.plugins.device=cpu",
        "--model.encoder=torch.nn.Linear",
        "--model.encoder.in_features=4",
        "--model.encoder.out_features=4",
        save_config_callback=None,
    )
    assert [type(each) for each in made.trainer.callbacks] == [EarlyStopping, LearningRateMonitor]
    assert isinstance(made.trainer.logger, CSVLogger) and made.trainer.logger.version == 3
    strategy = made.trainer.strategy
    assert isinstance(strategy, DDPStrategy) and isinstance(strategy.checkpoint_io, TorchCheckpointIO)
    assert strategy.precision.precision == "bf16-mixed"
    assert isinstance(made.model.encoder, torch.nn.Linear)
    assert cli("--trainer.devices=2", "--trainer.strategy=ddp").trainer.world_size == 2


def test_the_user_chooses_the_classes() -> None:
    made = cli("--model=Injected", model=None, datamodule_class=None)
    assert type(made.model) is Injected and made.datamodule is None
    path = "tests.trainer.cli.programs.Data"
    made = cli(f"--data={path}", "--model=WithOptimizer", model=Net, subclass_mode_model=True, datamodule_class=None)
    assert type(made.model) is WithOptimizer and type(made.datamodule) is Data


def test_a_function_makes_the_module_and_the_trainer() -> None:
    def make(width: int = 3) -> Net:
        return Net(hidden=width)

    def train(epochs: int = 5) -> L.Trainer:
        return L.Trainer(max_epochs=epochs, **{k: v for k, v in QUIET["trainer"].items() if k != "max_epochs"})

    with pytest.warns(UserWarning, match="not expose the `callbacks` argument, so these do nothing: SaveConfig"):
        made = cli("--model.width=2", model=make, trainer_class=train, trainer_defaults=None)
    assert type(made.model) is Net and made.model.hparams.hidden == 2 and made.trainer.max_epochs == 5


def test_defaults_of_the_trainer_and_callbacks_on_top() -> None:
    own = ModelCheckpoint(monitor="loss")
    defaults = {"max_epochs": 4, "logger": False, "callbacks": own}
    made = cli("--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=loss", trainer_defaults=defaults)
    kinds = {type(each) for each in made.trainer.callbacks}
    assert made.trainer.max_epochs == 4 and {EarlyStopping, ModelCheckpoint, SaveConfigCallback} <= kinds
    assert own in made.trainer.callbacks
    trainer = made.instantiate_trainer(max_epochs=6, logger=False)
    assert trainer.max_epochs == 6 and own in trainer.callbacks


@pytest.mark.parametrize(("default", "word", "seed"), [(True, None, 0), (7, None, 7), (7, "3", 3), (False, None, None)])
def test_seed(default: bool | int, word: str | None, seed: int | None) -> None:
    torch.manual_seed(12345)
    made = cli(*([] if word is None else [f"--seed_everything={word}"]), seed_everything_default=default)
    assert made.config["seed_everything"] == (False if seed is None else seed)
    assert torch.initial_seed() == (12345 if seed is None else seed)


# Configs


def test_configs_are_merged_and_words_come_last(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({"model": {"hidden": 2, "lr": 0.5}, "data": {"batch_size": 2}}))
    (tmp_path / "b.yaml").write_text(yaml.safe_dump({"model": {"lr": 0.7}, "trainer": {"max_epochs": 9}}))
    made = cli("-c", "a.yaml", "--config", "b.yaml", "--trainer.max_epochs=3")
    assert (made.model.hparams.hidden, made.model.hparams.lr, made.datamodule.batch_size) == (2, 0.7, 2)
    assert made.trainer.max_epochs == 3
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({"batch_size": 1}))
    assert cli("--data=data.yaml").datamodule.batch_size == 1


def test_configs_before_and_after_the_sub_command(tmp_path: Path) -> None:
    (tmp_path / "all.yaml").write_text(yaml.safe_dump({"fit": {"model": {"hidden": 2, "lr": 0.5}}}))
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump({"model": {"lr": 0.7}}))
    made = cli("-c", "all.yaml", "fit", "-c", "fit.yaml", model=WithOptimizer, run=True)
    assert (made.model.hparams.hidden, made.model.hparams.lr) == (2, 0.7)
    assert made.subcommand == "fit" and made.config.fit.model.hidden == 2


def test_a_printed_config_reads_back_the_same(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=loss", "--optimizer=Adam"]
    words += ["--optimizer.lr=1e-5", "--trainer.max_time=00:00:01:00", "--trainer.strategy=DDPStrategy"]
    words += ["--lr_scheduler=ReduceLROnPlateau", "--lr_scheduler.monitor=loss", "--model.encoder=torch.nn.Identity"]
    with pytest.raises(SystemExit):
        cli("fit", *words, "--print_config", run=True)
    printed = capsys.readouterr().out
    (tmp_path / "config.yaml").write_text(printed)
    with pytest.raises(SystemExit):
        cli("fit", "-c", "config.yaml", "--print_config", run=True)
    assert capsys.readouterr().out == printed
    assert printed.startswith(f"# treadle=={L.__version__}\n")
    values = yaml.safe_load(printed)
    assert values["lr_scheduler"]["class_path"] == "treadle.cli.ReduceLROnPlateau"
    assert values["trainer"]["callbacks"][0]["class_path"] == "treadle.callbacks.EarlyStopping"


def named(home: Any, *bases: type) -> list[type]:
    """The classes of a package that a config can name without arguments, or with those of ``REQUIRED``."""
    classes = [getattr(home, name) for name in dir(home)]
    return [
        cls
        for cls in classes
        if isinstance(cls, type) and issubclass(cls, bases) and not inspect.isabstract(cls)
        if cls.__name__ in REQUIRED or not takes(cls)
    ]


def takes(cls: type) -> list[str]:
    parameters = inspect.signature(cls).parameters.values()
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [each.name for each in parameters if each.default is each.empty and each.kind not in variable]


REQUIRED = {
    "EarlyStopping": ["monitor=x"],
    "GradientAccumulationScheduler": ["scheduling={0: 1}"],
    "MixedPrecision": ["precision=bf16-mixed", "device=cpu"],
    "OnExceptionCheckpoint": ["dirpath=x"],
    "HalfPrecision": ["precision=bf16-true"],
    "ModelPruning": ["pruning_fn=l1_unstructured"],
    "StochasticWeightAveraging": ["swa_lrs=0.1"],
    "ThroughputMonitor": ["batch_size_fn=builtins.len"],
}


@pytest.mark.parametrize(
    ("key", "home", "bases"),
    [
        ("callbacks", treadle.callbacks, (L.Callback,)),
        ("logger", treadle.loggers, (treadle_fabric.Logger,)),
        ("strategy", treadle.strategies, (treadle_fabric.Strategy,)),
        ("plugins", treadle_fabric, (Precision, CheckpointIO, ClusterEnvironment)),
    ],
)
def test_what_a_config_can_name_reads_back_the_same(key: str, home: Any, bases: tuple[type, ...]) -> None:
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(L.Trainer, "trainer")
    found = named(home, *bases)
    assert len(found) > 1
    for cls in found:
        words = [f"--trainer.{key}={cls.__name__}"]
        words += [f"--trainer.{key}.{value}" for value in REQUIRED.get(cls.__name__, [])]
        text = parser.dump(parser.parse_args(words), skip_unset=False)
        again = parser.parse_object(yaml.safe_load(text))
        assert parser.dump(again, skip_unset=False) == text and f".{cls.__name__}" in text


def test_a_config_makes_every_callback() -> None:
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_argument("--callback", type=L.Callback)
    for cls in named(treadle.callbacks, L.Callback):
        words = [f"--callback={cls.__name__}", *(f"--callback.{value}" for value in REQUIRED.get(cls.__name__, []))]
        try:
            made = parser.instantiate(parser.parse_args(words)).callback
        except ValueError as error:  # RayTuneReport: its package is not for the default tests
            assert isinstance(error.__cause__, MissingPackageError), error
        else:
            assert type(made) is cls


def test_a_config_of_lightning(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Written by lightning 2.6.6; read with `lightning.pytorch` replaced, and refused without, with the new path."""
    text = (Path(__file__).parents[2] / "fixtures" / "lightning_config.yaml").read_text()
    (tmp_path / "old.yaml").write_text(text)
    (tmp_path / "new.yaml").write_text(text.replace("lightning.pytorch", "treadle"))
    made = cli("fit", "-c", "new.yaml", run=True, save_config_callback=None)
    stopping, saving = made.trainer.callbacks[0], made.trainer.checkpoint_callback
    assert isinstance(stopping, EarlyStopping) and stopping.patience == 2 and isinstance(saving, ModelCheckpoint)
    assert made.trainer.global_step == 4 and isinstance(made.trainer.logger, CSVLogger)
    assert made.trainer.lr_scheduler_configs[0].monitor == "loss"
    said = refused(capsys, "fit", "-c", "old.yaml", run=True)
    assert "lightning.pytorch.cli.ReduceLROnPlateau is Lightning's: write treadle.cli.ReduceLROnPlateau;" in said
    assert "in a config, replace lightning.pytorch by treadle." in said


def test_environment_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_TRAINER__MAX_EPOCHS", "3")
    monkeypatch.setenv("PL_FIT__MODEL__HIDDEN", "2")
    monkeypatch.setenv("OWN_MODEL__HIDDEN", "5")
    assert cli().trainer.max_epochs == 1
    assert cli(parser_kwargs={"default_env": True}).trainer.max_epochs == 3
    assert cli(parser_kwargs={"default_env": True, "env_prefix": "OWN"}).model.hparams.hidden == 5
    made = cli("fit", model=WithOptimizer, run=True, parser_kwargs={"default_env": True})
    assert made.model.hparams.hidden == 2


def test_parsers_of_sub_commands_have_arguments_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"model": {"hidden": 2}}))
    parsers = {"fit": {"default_config_files": ["mine.yaml"]}, "description": "Trains."}
    kwargs: Any = {"model": WithOptimizer, "run": True, "save_config_callback": None, "parser_kwargs": parsers}
    assert cli("fit", **kwargs).model.hparams.hidden == 2
    assert cli("validate", **kwargs).model.hparams.hidden == 8


def test_interpolation_by_omegaconf(tmp_path: Path) -> None:
    (tmp_path / "net.yaml").write_text("model:\n  hidden: 2\ndata:\n  batch_size: ${model.hidden}\n")
    assert cli("-c", "net.yaml", parser_kwargs={"parser_mode": "omegaconf"}).datamodule.batch_size == 2  # type: ignore[union-attr]


def test_arguments_as_a_dictionary() -> None:
    values = {"fit": {"model": {"hidden": 2}, **QUIET}, "subcommand": "fit"}
    made = LightningCLI(WithOptimizer, Data, args=values)
    assert made.model.hparams.hidden == 2 and made.trainer.global_step == 2


# The run


class Telling(LightningCLI):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.told: list[str] = []
        super().__init__(*args, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--told", default=0)
        parser.add_lightning_class_args(EarlyStopping, "stopping")
        parser.set_defaults({"stopping.monitor": "loss"})

    def before_instantiate_classes(self) -> None:
        self.told.append("before_instantiate_classes")

    def after_instantiate_classes(self) -> None:
        self.told.append(f"after_instantiate_classes {self.config[self.subcommand]['told']}")

    def before_fit(self) -> None:
        self.told.append("before_fit")

    def after_fit(self) -> None:
        self.told.append(f"after_fit {self.trainer.global_step}")

    def test(self, **kwargs: Any) -> None:
        self.told.append(f"test {sorted(kwargs)}")


def test_hooks_come_in_order() -> None:
    made = cli("fit", "--told=3", "--stopping.patience=5", of=Telling, model=WithOptimizer, run=True)
    told = ["before_instantiate_classes", "after_instantiate_classes 3", "before_fit", "after_fit 2"]
    assert made.told == told  # type: ignore[attr-defined]
    [stopping] = [each for each in made.trainer.callbacks if isinstance(each, EarlyStopping)]
    assert stopping.patience == 5
    made = cli("test", "--verbose=false", of=Telling, run=True)
    assert made.told[-1] == "test ['ckpt_path', 'datamodule', 'model', 'verbose', 'weights_only']"  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_sub_commands_run(command: str) -> None:
    made = cli(command, model=Net, run=True)
    assert made.trainer.state.fn is not None and made.trainer.state.fn.value == command
    assert made.trainer.state.status.value == "finished"


# Optimizers


def test_optimizer_and_scheduler_of_the_command_line() -> None:
    words = ["--optimizer=Adam", "--optimizer.lr=0.01", "--lr_scheduler=CosineAnnealingLR", "--lr_scheduler.T_max=3"]
    made = cli("fit", *words, run=True)
    [config] = made.trainer.lr_scheduler_configs
    [optimizer] = made.trainer.optimizers
    assert isinstance(optimizer, torch.optim.Adam) and optimizer.defaults["lr"] == 0.01
    assert isinstance(config.scheduler, lr_scheduler.CosineAnnealingLR) and config.scheduler.T_max == 3
    for other in (copy.deepcopy(made.model), pickle.loads(pickle.dumps(made.model))):
        [optimizer], _ = other.configure_optimizers()
        assert optimizer.param_groups[0]["params"][0] is next(other.parameters())


def test_plateau_schedulers_know_their_metric() -> None:
    made = cli("--optimizer=SGD", "--lr_scheduler=ReduceLROnPlateau", "--lr_scheduler.monitor=loss")
    chosen: Any = made.model.configure_optimizers()
    assert isinstance(chosen["lr_scheduler"]["scheduler"], ReduceLROnPlateau)
    assert chosen["lr_scheduler"]["monitor"] == "loss"


def test_the_optimizer_of_the_command_line_replaces_the_modules() -> None:
    with pytest.warns(UserWarning, match="`WithOptimizer.configure_optimizers` will be overridden"):
        made = cli("--optimizer=Adam", model=WithOptimizer)
    assert isinstance(made.model.configure_optimizers(), torch.optim.Adam)


def test_a_program_says_how_optimizers_are_configured() -> None:
    class ByStep(LightningCLI):
        @staticmethod
        def configure_optimizers(lightning_module: Any, optimizer: Any, lr_scheduler: Any = None) -> Any:
            return [optimizer], [{"scheduler": lr_scheduler, "interval": "step"}]

    made = cli("fit", "--optimizer=SGD", "--lr_scheduler=StepLR", "--lr_scheduler.step_size=1", of=ByStep, run=True)
    assert made.trainer.lr_scheduler_configs[0].interval == "step"


def test_one_class_of_optimizer_and_others_for_arguments_of_the_module() -> None:
    class Two(Net):
        def __init__(self, first: dict[str, Any], second: dict[str, Any], plan: dict[str, Any]) -> None:
            super().__init__()
            self.inits = first, second, plan

    class TwoCLI(LightningCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.add_optimizer_args(torch.optim.Adam, "optim.one", link_to="model.first")
            parser.add_optimizer_args((torch.optim.SGD, torch.optim.AdamW), "two", link_to="model.second")
            parser.add_lr_scheduler_args(lr_scheduler.StepLR, "plan", link_to="model.plan")

    words = ["--optim.one.lr=0.3", "--two=AdamW", "--two.lr=0.4", "--plan.step_size=2"]
    made: Any = cli(*words, of=TwoCLI, model=Two)
    first, second, plan = made.model.inits
    optimizer = instantiate_class(made.model.parameters(), first)
    assert isinstance(optimizer, torch.optim.Adam) and optimizer.defaults["lr"] == 0.3
    assert instantiate_class(made.model.parameters(), second).defaults["lr"] == 0.4
    assert instantiate_class(optimizer, plan).step_size == 2


def test_one_class_of_optimizer_is_configured() -> None:
    class Only(LightningCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.add_optimizer_args(torch.optim.Adam)
            parser.add_lr_scheduler_args(lr_scheduler.ExponentialLR)
            parser.set_defaults({"optimizer.lr": 0.25, "lr_scheduler.gamma": 0.5})

    [optimizer], [scheduler] = cli(of=Only).model.configure_optimizers()  # type: ignore[misc]
    assert isinstance(optimizer, torch.optim.Adam) and optimizer.defaults["lr"] == 0.25
    assert scheduler.gamma == 0.5


def test_injected_optimizers() -> None:
    words = ["--model.optimizer=Adam", "--model.optimizer.lr=0.5", "--model.scheduler=StepLR"]
    made = cli(*words, "--model.scheduler.step_size=3", model=Injected)
    chosen: Any = made.model.configure_optimizers()
    assert isinstance(chosen["optimizer"], torch.optim.Adam) and chosen["optimizer"].defaults["lr"] == 0.5
    assert chosen["lr_scheduler"].step_size == 3
    assert made.model.hparams.optimizer["class_path"] == "torch.optim.Adam"


def test_arguments_are_linked_when_parsed_and_when_made() -> None:
    class Linked(LightningCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.link_arguments("data.batch_size", "model.lr", compute_fn=lambda size: size / 10)
            parser.link_arguments("data.width", "model.hidden", apply_on="instantiate")

    made = cli("--data.batch_size=3", of=Linked)
    assert (made.model.hparams.lr, made.model.hparams.hidden) == (0.3, 4)


# Errors


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--trainer.mx_epochs=3"],
            "unrecognized arguments: --trainer.mx_epochs=3\nDid you mean '--trainer.max_epochs'",
        ),
        (["--trainer.max_epoch=3"], "Did you mean '--trainer.max_epochs'"),
        (["--trainer.max_epochs=two"], "Expected a <class 'int'>"),
        (["--trainer.callbacks+=EarlyStoping"], "Did you mean 'EarlyStopping'"),
        (
            ["--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitr=x"],
            "EarlyStopping: Did you mean 'monitor'?",
        ),
        (["--trainer.callbacks=ModelCheckpoint", "--trainer.callbacks.save_top_k=-3"], "save_top_k=-3"),
        (["--optimizer=Adm"], "Did you mean 'Adam'"),
        (["--optimizer=Adam", "--optimizer.lrr=1"], "torch.optim.Adam: Did you mean 'lr'?"),
        (
            ["--lr_scheduler=StepLR", "--lr_scheduler.step_size=1"],
            "no optimizer for it: Net.configure_optimizers decides",
        ),
        (["--model.encoder=torch.nn.Liner"], "Did you mean 'Linear'"),
        (["--trainer.accelerator=cpuu"], "accelerator='cpuu' is unknown. Did you mean 'cpu'?"),
        (["--trainer.logger=CSVLogger"], "A logger needs a folder to write to."),
        (["--trainer.on_save_error=wrn"], "Literal['raise', 'warn']"),
        (["--seed_everything=-4"], "seed=-4 is out of range"),
        (["--config=nothing.yaml"], "File does not exist"),
        (["--trainer.strategy=lightning.pytorch.strategies.DDPStrategy"], "write treadle.strategies.DDPStrategy;"),
        (["--model.encoder=lightning.fabric.Nothing"], "and there is no such name here"),
    ],
)
def test_wrong_values_end_the_program_before_it_starts(
    capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert said in refused(capsys, *words)


def test_wrong_keys_and_commands(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text("trainer:\n  mx_epochs: 3\n")
    assert "Did you mean 'max_epochs'" in refused(capsys, "-c", "wrong.yaml")
    assert "Did you mean 'trainer.max_epochs'" in refused(capsys, "fit", "-c", "wrong.yaml", run=True)
    assert "invalid choice: 'ftt' (choose from 'fit'" in refused(capsys, "ftt", run=True)
    assert "one of {fit,validate,test,predict}, but it was not provided" in refused(capsys, run=True)


def test_what_a_program_gets_wrong() -> None:
    parser = LightningArgumentParser()
    with pytest.raises(MisconfigurationException, match="neither a class derived from one of Trainer"):
        parser.add_lightning_class_args(dict, "wrong")
    with pytest.raises(MisconfigurationException, match="is not derived from an Optimizer"):
        parser.add_optimizer_args(Net)  # type: ignore[arg-type]
    with pytest.raises(MisconfigurationException, match="is not derived from an LRScheduler"):
        parser.add_lr_scheduler_args(torch.optim.SGD)
    with pytest.raises(MisconfigurationException, match="There is no class 'torch.optim.Nothing'"):
        instantiate_class((), {"class_path": "torch.optim.Nothing"})

    class Several(LightningCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.add_optimizer_args(torch.optim.Adam, "one")
            parser.add_optimizer_args(torch.optim.Adam, "two")

    with pytest.raises(SystemExit):
        cli(of=Several)


def test_values_that_a_user_gives_in_code_and_words_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "fit"])
    with pytest.warns(UserWarning, match=r"the command line are not read: \['fit'\]"):
        cli("--model.hidden=2")


def test_without_the_extra() -> None:
    """The command `treadle` runs; the error for LightningCLI says what to install."""
    code = (
        "import sys; sys.modules['jsonargparse'] = None\n"
        "import treadle.cli\n"
        "assert callable(treadle.cli.main)\n"
        "try:\n    from treadle.cli import LightningCLI\n"
        "except ModuleNotFoundError as e:\n    print(e)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=importing_tests(), capture_output=True, text=True, timeout=60
    )
    assert "treadle.cli.LightningCLI needs the package jsonargparse" in done.stdout, done.stderr
    assert "pip install treadle[cli]" in done.stdout


def test_types_for_annotations() -> None:
    assert LRSchedulerTypeTuple == (lr_scheduler.LRScheduler, ReduceLROnPlateau)
    optimizer = torch.optim.SGD(Net().parameters(), lr=1.0)
    scheduler = ReduceLROnPlateau(optimizer, "loss", factor=0.5)
    assert scheduler.monitor == "loss" and scheduler.factor == 0.5


def test_the_documentation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its program, its command lines and its config, in order."""
    text = (Path(__file__).parents[3] / "docs" / "cli.md").read_text()
    program, derived = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    [config] = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    Path("train.py").write_text(program)
    Path("config.yaml").write_text(config)
    monkeypatch.syspath_prepend(tmp_path)
    lines = re.findall(r"^python train.py (.*)$", text, re.MULTILINE)
    quiet = [f"--trainer.{each}=false" for each in ("enable_progress_bar", "enable_model_summary", "logger")]
    for number, line in enumerate(lines):
        words = line.split()
        if "-c" not in words:
            words += [*quiet, "--trainer.enable_checkpointing=false", f"--trainer.default_root_dir={number}"]
        monkeypatch.setattr(sys, "argv", ["train.py", *words])
        printed = "--help" in words or "--print_config" in words
        with pytest.raises(SystemExit) if printed else contextlib.nullcontext():
            runpy.run_path("train.py", run_name="__main__")
    assert len(lines) == 9 and Path("logs/lightning_logs/version_0/config.yaml").exists()
    monkeypatch.setattr(sys, "argv", ["derived.py"])
    exec(compile(derived, "derived.py", "exec"), {"__name__": "derived"})
    sys.modules.pop("train")
