"""What needs a package that is not installed says which command installs it, before any work starts.

Tests of ``treadle_fabric.checks``, and of what asks for the packages of extras.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.processes import ROOT
from tests.trainer.models import Net

from treadle.callbacks import OptunaPruning, RayTuneReport, RichModelSummary, RichProgressBar, TQDMProgressBar
from treadle.cli.plotting.events import read_scalars
from treadle.cli.plotting.picture import check_output
from treadle_fabric import (
    CPUAccelerator,
    MisconfigurationException,
    MissingPackageError,
    TensorBoardLogger,
    TorchCheckpointIO,
)

EXTRAS: dict[str, list[str]] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
# Collections of other extras, and what belongs to engines that are still to come.
WITHOUT_USERS = {"demo", "dev", "deepspeed", "xla"}


def read_yaml() -> None:
    Path("hparams.yaml").write_text("width:\n  - 1\n")
    TorchCheckpointIO().save_checkpoint({"state_dict": {}}, "x.ckpt")
    Net.load_from_checkpoint("x.ckpt", hparams_file="hparams.yaml")


# The extra, the packages that are hidden (the first is named), and what needs them.
USERS: list[tuple[str, tuple[str, ...], Callable[[], Any]]] = [
    ("trainer", ("tensorboard", "tensorboardX"), lambda: TensorBoardLogger("logs")),
    ("trainer", ("tensorboard",), lambda: read_scalars([])),
    ("trainer", ("tqdm",), TQDMProgressBar),
    ("trainer", ("rich",), RichProgressBar),
    ("trainer", ("rich",), RichModelSummary),
    ("trainer", ("psutil",), lambda: CPUAccelerator().get_device_stats(torch.device("cpu"))),
    ("plot", ("matplotlib",), lambda: check_output("x.png")),
    ("tune", ("optuna",), lambda: OptunaPruning(None, "val_loss")),
    ("tune", ("ray",), RayTuneReport),
    ("cli", ("yaml",), read_yaml),
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
    brought_along = {"yaml": "jsonargparse"}
    for extra, hidden, _ in USERS:
        names = {re.split(r"[\[<>=~]", requirement)[0] for requirement in EXTRAS[extra]}
        assert brought_along.get(hidden[0], hidden[0]) in names


def test_every_extra_has_a_user() -> None:
    assert {extra for extra, _, _ in USERS} == set(EXTRAS) - WITHOUT_USERS
