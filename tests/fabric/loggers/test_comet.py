"""Comet, offline: what the logger leaves in the archive, read back from the archive.

Tests of ``treadle_fabric.loggers.comet``.
"""

from __future__ import annotations

import copy
import json
import pickle
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.trainer.models import Net, loader, trainer

from treadle.callbacks import ModelCheckpoint
from treadle.loggers import CometLogger
from treadle_fabric import MisconfigurationException

comet_ml = pytest.importorskip("comet_ml")
pytestmark = pytest.mark.filterwarnings("ignore:`sentry_sdk.Hub` is deprecated")  # Comet's own use


@pytest.fixture(autouse=True)
def opened() -> Iterator[list[CometLogger]]:
    """The loggers of the test, which are ended with it: what is still open would be archived at exit."""
    loggers: list[CometLogger] = []
    yield loggers
    for logger in loggers:
        logger._close("finished")


def offline(opened: list[CometLogger], **kwargs: Any) -> CometLogger:
    quiet = ("log_code", "log_graph", "log_env_details", "log_git_metadata", "log_git_patch", "parse_args")
    logger = CometLogger(
        online=False, project="p", offline_directory="archives", auto_output_logging=False,
        **{**dict.fromkeys(quiet, False), "display_summary_level": 0, **kwargs},
    )  # fmt: skip
    opened.append(logger)
    return logger


class Read:
    """What is in the archives of an experiment, in the order in which these were written."""

    def __init__(self, key: str | None) -> None:
        self.metrics: list[tuple[str, float, int | None]] = []
        self.parameters: dict[str, Any] = {}
        self.others: dict[str, Any] = {}
        self.assets: list[dict[str, Any]] = []
        self.files: list[str] = []
        archives = sorted(Path("archives").glob(f"{key}*.zip"), key=lambda path: path.stat().st_mtime_ns)
        self.modes: list[str] = []
        for path in archives:
            with zipfile.ZipFile(path) as archive:
                self.files += archive.namelist()
                self.modes.append(json.loads(archive.read("experiment.json"))["resume_strategy"])
                for line in archive.read("messages.json").splitlines():
                    self.add(json.loads(line))

    def add(self, message: dict[str, Any]) -> None:
        kind, payload = message["type"], message["payload"]
        if kind == "metric_msg":
            metric = payload["metric"]
            self.metrics.append((metric["metricName"], metric["metricValue"], metric["step"]))
        elif kind == "parameter_msg":
            self.parameters[payload["param"]["paramName"]] = payload["param"]["paramValue"]
        elif kind == "log_other":
            self.others[payload["key"]] = payload["value"]
        elif kind == "file_upload":
            self.assets.append(payload)


class Logs(Net):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()


def test_a_fit_leaves_metrics_settings_and_checkpoints(opened: list[CometLogger], tmp_path: Path) -> None:
    logger = offline(opened, log_model=True, prefix="x", name="first", checkpoint_name="net")
    saves = ModelCheckpoint(monitor="val_loss")
    run = trainer(
        tmp_path, logger=logger, callbacks=[saves], max_epochs=2, limit_train_batches=2, enable_checkpointing=True
    )
    run.fit(Logs(5), loader(), loader())
    for twin in (copy.deepcopy(logger), pickle.loads(pickle.dumps(logger))):
        assert (twin.version, twin._experiment) == (logger.version, None)
    run.test(Logs(5), loader(), verbose=False)
    logger.experiment.end()
    read = Read(logger.version)
    assert [step for name, _, step in read.metrics if name == "x/val_loss"] == [1, 3]
    assert any(name == "x/test_loss" for name, _, _ in read.metrics)
    assert read.parameters["width"] == 5
    assert {**read.others, "Status": "success", "Name": "first"} == read.others
    [model] = read.assets
    assert model["additional_params"]["groupingName"] == "net"
    assert model["additional_params"]["fileName"] == Path(saves.best_model_path).name
    assert model["metadata"]["ModelCheckpoint"]["monitor"] == "val_loss"
    assert model["file_path"] in read.files
    assert read.modes == ["get_or_create"], "one archive: the copies have not opened the experiment"


def test_several_loggers_and_copies_write_to_their_own(opened: list[CometLogger]) -> None:
    first, second = offline(opened), offline(opened)
    first.log_metrics({"a": 1.0}, 0)
    second.log_metrics({"b": 1.0}, 0)
    opened.append(copy.deepcopy(second))
    opened[-1].log_metrics({"b": 2.0}, 1)
    assert opened[-1].version == second.version != first.version
    for logger in (first, second):
        logger.finalize("failed")
    assert Read(first.version).metrics == [("a", 1.0, 0)]
    assert Read(second.version).metrics == [("b", 1.0, 0), ("b", 2.0, 1)]


def test_media(opened: list[CometLogger], tmp_path: Path) -> None:
    import matplotlib.figure

    logger = offline(opened)
    logger.log_image("images", [torch.rand(3, 4, 5), torch.rand(4, 5)], step=3, caption=["a", "b"])
    figure = matplotlib.figure.Figure()
    figure.add_subplot().plot([1, 2])
    logger.log_figure("figure", figure, step=3)
    logger.log_text("text", "words", 4)
    logger.log_table("table", ["a", "b"], [[1, "x"], [2, "y"]], step=5)
    Path("notes.txt").write_text("written")
    logger.log_file("notes.txt")
    logger.finalize("failed")
    read = Read(logger.version)
    assert read.others["Status"] == "failed"
    named = {
        asset["additional_params"].get("figName") or asset["additional_params"]["fileName"]: asset
        for asset in read.assets
    }
    assert {*named} >= {"images_0", "images_1", "figure", "table_5.csv", "notes.txt"}
    assert named["images_1"]["metadata"] == {"caption": "b"}
    assert any(asset["metadata"] == {"name": "text"} for asset in read.assets)
    assert named["figure"]["additional_params"]["step"] == 3


def test_a_run_goes_on_or_branches(opened: list[CometLogger]) -> None:
    first = offline(opened)
    first.log_metrics({"a": 1.0, "epoch": 2}, 0)
    state = first.state_dict()
    json.dumps(state)
    first.finalize("failed")
    again = offline(opened)
    again.resume(state)
    again.log_metrics({"a": 2.0}, 1)
    assert again.version == first.version
    again.branch(state)
    again.log_metrics({"a": 4.0}, 1)
    assert again.version != first.version
    again.finalize("failed")
    assert Read(first.version).metrics == [("a", 1.0, 0), ("a", 2.0, 1)]
    assert Read(first.version).modes == ["get_or_create", "get"]
    assert Read(again.version).others["parent_run"] == first.version


def test_wrong_values_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MisconfigurationException, match="mode='some' must be"):
        CometLogger(mode="some")  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "comet_ml", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install treadle\[comet\]"):
        CometLogger()
