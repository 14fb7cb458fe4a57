"""Trackio on the local disk: what the logger leaves in the database, read back through Trackio's own interface.

Tests of ``treadle_fabric.loggers.trackio``.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.trainer.models import Net, loader, trainer

from treadle.callbacks import ModelCheckpoint
from treadle.loggers import TrackioLogger
from treadle_fabric import MisconfigurationException

FOLDER = tempfile.TemporaryDirectory(prefix="treadle-trackio-")
os.environ["TRACKIO_DIR"] = FOLDER.name  # which Trackio reads on import
trackio = pytest.importorskip("trackio")


@pytest.fixture
def project(tmp_path: Path) -> str:
    """A project of its own for each test: all are in one folder."""
    return f"p-{tmp_path.parent.name}-{tmp_path.name}"


def rows(logger: TrackioLogger) -> list[dict[str, Any]]:
    from trackio.sqlite_storage import SQLiteStorage

    found = SQLiteStorage.get_logs(logger.name, logger._run)
    return [{key: value for key, value in row.items() if key != "timestamp"} for row in found]


def config(logger: TrackioLogger) -> dict[str, Any]:
    from trackio.sqlite_storage import SQLiteStorage

    found = SQLiteStorage.get_run_config(logger.name, logger._run)
    assert found is not None
    return {key: value for key, value in found.items() if not key.startswith("_")}


class Logs(Net):
    def __init__(self, width: int = 3, _target_: str = "x") -> None:
        super().__init__()
        self.save_hyperparameters()


def test_a_fit_leaves_metrics_settings_and_checkpoints(project: str, tmp_path: Path) -> None:
    logger = TrackioLogger(project, log_model=True, prefix="x", checkpoint_name="net", auto_log_cpu=False)
    other = TrackioLogger(project, "second", auto_log_cpu=False)
    saves = ModelCheckpoint(monitor="val_loss", save_top_k=2)
    run = trainer(
        tmp_path, logger=[logger, other], callbacks=[saves], max_epochs=2, limit_train_batches=2,
        enable_checkpointing=True,
    )  # fmt: skip
    run.fit(Logs(5), loader(), loader())
    assert config(logger) == {"width": 5, "target_": "x"}
    for twin in (copy.deepcopy(logger), pickle.loads(pickle.dumps(logger))):
        twin.log_metrics({"twin": 1.0}, 9)
        twin.finalize("success")
    run.test(Logs(5), loader(), verbose=False)
    assert [row["step"] for row in rows(logger) if "x/val_loss" in row] == [1, 3]
    assert any("x/test_loss" in row for row in rows(logger))
    assert sum("x/twin" in row for row in rows(logger)) == 2
    assert [row["step"] for row in rows(other) if "val_loss" in row] == [1, 3]
    assert other.version == "second"
    assert config(logger) == {"width": 5, "target_": "x"}
    from trackio.sqlite_storage import SQLiteStorage

    sent = SQLiteStorage.list_artifacts(project)
    assert [artifact["name"] for artifact in sent] == ["net"]


def test_media(project: str) -> None:
    import matplotlib.figure
    from trackio.sqlite_storage import SQLiteStorage

    logger = TrackioLogger(project, auto_log_cpu=False)
    logger.log_image("images", [torch.rand(3, 4, 5), torch.rand(4, 5)], step=3, caption=["a", "b"])
    figure = matplotlib.figure.Figure()
    figure.add_subplot().plot([1, 2])
    logger.log_figure("figure", figure, step=3)
    logger.log_text("text", "words", 4)
    logger.log_table("table", ["a", "b"], [[1, "x"], [2, None]], step=5)
    Path("notes.txt").write_text("written")
    logger.log_file("notes.txt")
    logger.log_metrics({"deep": {"a": torch.tensor(1.0)}}, 6)
    logger.finalize("success")
    values = {name: value for row in rows(logger) for name, value in row.items()}
    kinds = {name: value["_type"] for name, value in values.items() if isinstance(value, dict)}
    assert kinds == {
        "images_0": "trackio.image", "images_1": "trackio.image", "figure": "trackio.image",
        "text": "trackio.markdown", "table": "trackio.table",
    }  # fmt: skip
    assert values["images_1"]["caption"] == "b"
    assert values["text"]["_value"] == "words"
    assert values["table"]["_value"] == [{"a": 1, "b": "x"}, {"a": 2, "b": None}]
    assert values["deep/a"] == 1.0
    assert [artifact["name"] for artifact in SQLiteStorage.list_artifacts(project)] == ["notes.txt"]


def test_a_run_goes_on_or_branches(project: str) -> None:
    first = TrackioLogger(project, auto_log_cpu=False)
    first.log_hyperparams({"lr": 1})
    first.log_metrics({"a": 1.0}, 0)
    state = first.state_dict()
    json.dumps(state)
    first.finalize("failed")
    again = TrackioLogger(project, auto_log_cpu=False)
    again.resume(state)
    again.log_hyperparams({"lr": 1})
    again.log_metrics({"a": 2.0}, 1)
    again.finalize("success")
    assert again.version == first.version
    assert [(row["step"], row["a"]) for row in rows(first)] == [(0, 1.0), (1, 2.0)]
    again.branch(state)
    again.log_hyperparams({"lr": 3})
    again.log_metrics({"a": 4.0}, 1)
    again.finalize("success")
    assert again.version != first.version
    assert config(again) == {"lr": 3, "parent_run": first.version}
    assert len(rows(first)) == 2
    third = TrackioLogger(project, auto_log_cpu=False)
    third.resume(again.state_dict())
    third.log_metrics({"a": 5.0}, 2)
    third.finalize("success")
    assert config(again)["parent_run"] == first.version


def test_wrong_values_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MisconfigurationException, match="log_model='some' must be"):
        TrackioLogger(log_model="some")  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install treadle\[trackio\]"):
        TrackioLogger()
