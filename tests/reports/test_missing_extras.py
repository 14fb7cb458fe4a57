"""What needs a package that is not installed says which command installs it, before any work starts.

Tests of ``treadle_fabric.checks``, and of what asks for the packages of extras.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.processes import ROOT
from tests.trainer.models import Net
from torch.utils.data import DataLoader

import treadle.cli
from treadle import LightningModule, Trainer
from treadle.callbacks import (
    DeviceStatsMonitor,
    OptunaPruning,
    RayTrainReportCallback,
    RayTuneReport,
    RichModelSummary,
    RichProgressBar,
    TQDMProgressBar,
)
from treadle.cli.plotting.events import read_scalars
from treadle.cli.plotting.picture import check_output
from treadle.module.configured import instantiate_module
from treadle.searches import LRFinder
from treadle_fabric import (
    CPUAccelerator,
    CSVLogger,
    Fabric,
    MisconfigurationException,
    MissingPackageError,
    RayEnvironment,
    TensorBoardLogger,
    TorchCheckpointIO,
    make_precision,
)
from treadle_fabric.accelerators import XLAAccelerator
from treadle_fabric.loggers import CometLogger, MLFlowLogger, TrackioLogger, WandbLogger
from treadle_fabric.plugins import BitsandbytesPrecision, Float8Precision, XLACheckpointIO

EXTRAS: dict[str, list[str]] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
# Collections of other extras, and what belongs to engines that are still to come.
WITHOUT_USERS = {"demo", "dev", "deepspeed"}


def read_yaml() -> None:
    Path("hparams.yaml").write_text("width:\n  - 1\n")
    TorchCheckpointIO().save_checkpoint({"state_dict": {}}, "x.ckpt")
    Net.load_from_checkpoint("x.ckpt", hparams_file="hparams.yaml")


def monitor_the_device() -> None:
    Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=CSVLogger("logs"),
        callbacks=DeviceStatsMonitor(),
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(Net(), DataLoader(torch.zeros(2, 4)), DataLoader(torch.zeros(2, 4)))


def plot_the_search() -> None:
    LRFinder("exponential", 1e-3, 1.0, 10).plot()


# The extra, the packages that are hidden (the first is named), and what needs them.
USERS: list[tuple[str, tuple[str, ...], Callable[[], Any]]] = [
    ("trainer", ("tensorboard", "tensorboardX"), lambda: TensorBoardLogger("logs")),
    ("trainer", ("tensorboard",), lambda: read_scalars([])),
    ("trainer", ("tqdm",), TQDMProgressBar),
    ("trainer", ("rich",), RichProgressBar),
    ("trainer", ("rich",), RichModelSummary),
    ("trainer", ("psutil",), lambda: CPUAccelerator().get_device_stats(torch.device("cpu"))),
    ("trainer", ("psutil",), monitor_the_device),
    ("trainer", ("PIL",), lambda: CSVLogger("logs").log_image("x", torch.zeros(1, 2, 2))),
    ("plot", ("matplotlib",), lambda: check_output("x.png")),
    ("plot", ("matplotlib",), plot_the_search),
    ("tune", ("optuna",), lambda: OptunaPruning(None, "val_loss")),
    ("tune", ("ray",), RayTuneReport),
    ("ray", ("ray",), RayTrainReportCallback),
    ("ray", ("ray",), RayEnvironment),
    ("cli", ("yaml",), read_yaml),
    ("cli", ("jsonargparse",), lambda: treadle.cli.__getattr__("LightningCLI")),
    ("cli", ("jsonargparse",), lambda: instantiate_module(Net, {})),
    ("export", ("onnx",), lambda: Net().to_onnx("x.onnx", torch.zeros(1, 4))),
    ("export", ("onnxscript",), lambda: Net().to_onnx("x.onnx", torch.zeros(1, 4))),
    ("s3", ("s3fs",), lambda: TorchCheckpointIO().load_checkpoint("s3://bucket/x.ckpt")),
    ("wandb", ("wandb",), WandbLogger),
    ("mlflow", ("mlflow",), MLFlowLogger),
    ("comet", ("comet_ml",), CometLogger),
    ("trackio", ("trackio",), lambda: TrackioLogger("x")),
    ("xla", ("torch_xla",), lambda: Fabric(accelerator="tpu")),
    ("xla", ("torch_xla",), lambda: Trainer(accelerator="tpu", devices=4)),
    ("xla", ("torch_xla",), XLAAccelerator),
    *(("xla", ("torch_xla",), partial(Fabric, strategy=name)) for name in ("single_xla", "xla", "xla_fsdp")),
    ("xla", ("torch_xla",), lambda: Trainer(profiler="xla")),
    ("xla", ("torch_xla",), XLACheckpointIO),
    ("fp8", ("torchao",), lambda: Float8Precision(emulate=True)),
    ("fp8", ("torchao",), lambda: make_precision("fp8", "cuda")),
    ("bitsandbytes", ("bitsandbytes",), lambda: BitsandbytesPrecision("nf4")),
    ("tensorrt", ("torch_tensorrt",), lambda: LightningModule().to_tensorrt()),
    ("transformer-engine", ("transformer_engine",), lambda: make_precision("transformer-engine", "cuda")),
]


@pytest.mark.parametrize(("extra", "hidden", "use"), USERS)
def test_the_command_is_named(
    extra: str, hidden: tuple[str, ...], use: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    message = rf"needs the package {hidden[0]}, which is not installed: `pip install treadle\[{extra}\]`"
    with monkeypatch.context() as patch, pytest.raises(MissingPackageError, match=message) as raised:
        for package in hidden:
            patch.setitem(sys.modules, package, None)
        use()
    assert isinstance(raised.value, MisconfigurationException) and isinstance(raised.value, ModuleNotFoundError)


def test_the_extra_has_the_package() -> None:
    brought_along = {
        "yaml": "jsonargparse",
        "PIL": "tensorboard",
        "torch_xla": "torch-xla",
        "torch_tensorrt": "torch-tensorrt",
    }
    for extra, hidden, _ in USERS:
        names = {re.split(r"[\[<>=~]", requirement)[0] for requirement in EXTRAS[extra]}
        assert brought_along.get(hidden[0], hidden[0]) in names


def test_every_extra_has_a_user() -> None:
    assert {extra for extra, _, _ in USERS} == set(EXTRAS) - WITHOUT_USERS
