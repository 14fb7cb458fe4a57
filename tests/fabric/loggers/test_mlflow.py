"""MLflow on the local disk: what the logger leaves in a store, read back with MLflow's own client.

Tests of ``treadle_fabric.loggers.mlflow``.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.trainer.models import Net, loader, trainer

from treadle.callbacks import ModelCheckpoint
from treadle.loggers import CSVLogger, MLFlowLogger
from treadle_fabric import MisconfigurationException

mlflow = pytest.importorskip("mlflow")
pytestmark = [  # of MLflow's own code
    pytest.mark.filterwarnings("ignore:For backward compatibility, 'str' dtypes"),
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy"),
]


@pytest.fixture(autouse=True)
def files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain files, as MLflow 2 writes them; a database takes a second to make."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("GIT_PYTHON_REFRESH", "quiet")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def values(logger: MLFlowLogger, name: str) -> list[tuple[int, float]]:
    history = client_of(logger).get_metric_history(logger.run_id, name)
    return sorted((point.step, point.value) for point in history)


def client_of(logger: MLFlowLogger) -> Any:
    """A client of another process would be like this one."""
    return mlflow.MlflowClient(logger.experiment.tracking_uri)


def artifacts(logger: MLFlowLogger, folder: str | None = None) -> list[str]:
    found = []
    for item in client_of(logger).list_artifacts(logger.run_id, folder):
        found += artifacts(logger, item.path) if item.is_dir else [item.path]
    return sorted(found)


def content(logger: MLFlowLogger, path: str) -> str:
    return Path(client_of(logger).download_artifacts(logger.run_id, path)).read_text()


class Logs(Net):
    def __init__(self, width: int = 3, deep: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters()


def test_a_fit_leaves_metrics_settings_and_checkpoints(tmp_path: Path) -> None:
    logger = MLFlowLogger("exp", run_name="first", tags={"kind": "test"}, log_model="all", prefix="x")
    saves = ModelCheckpoint(monitor="val_loss", save_top_k=1)
    run = trainer(
        tmp_path, logger=[CSVLogger(tmp_path), logger], callbacks=[saves], max_epochs=2, limit_train_batches=2,
        enable_checkpointing=True,
    )  # fmt: skip
    run.fit(Logs(5, {"lr": [0.1]}), loader(), loader())
    found = client_of(logger).get_run(logger.version)
    assert (found.info.status, found.info.run_name, found.data.tags["kind"]) == ("FINISHED", "first", "test")
    assert found.data.params == {"width": "5", "deep/lr": "[0.1]"}
    assert client_of(logger).get_experiment(logger.name).name == "exp"
    assert [step for step, _ in values(logger, "x-val_loss")] == [1, 3]
    best = f"model/checkpoints/{Path(saves.best_model_path).stem}"
    assert {f"{best}/{Path(saves.best_model_path).name}", f"{best}/metadata.yaml", f"{best}/aliases.txt"} <= {
        *artifacts(logger)
    }
    assert json.loads(content(logger, f"{best}/metadata.yaml"))["ModelCheckpoint"]["mode"] == "min"
    assert len({Path(path).parent for path in artifacts(logger)}) == 2  # each when it was saved
    assert client_of(logger).get_run(logger.version).info.status == "FINISHED", "a look does not open the run again"
    for twin in (copy.deepcopy(logger), pickle.loads(pickle.dumps(logger))):
        assert twin.run_id == logger.run_id
        twin.finalize("success")
    run.test(Logs(5), loader(), verbose=False)  # into the same run; its parameter "deep" is another one
    assert values(logger, "x-test_loss")
    assert client_of(logger).get_run(logger.version).info.status == "FINISHED"


def test_media_become_artifacts(tmp_path: Path) -> None:
    import matplotlib.figure

    logger = MLFlowLogger(save_dir=str(tmp_path / "runs"), synchronous=False)
    logger.log_image("images/a", [torch.rand(3, 4, 5), torch.rand(4, 5)], step=3)
    logger.log_image("still", torch.rand(3, 4, 5))
    figure = matplotlib.figure.Figure()
    figure.add_subplot().plot([1, 2])
    logger.log_figure("figure", figure, step=3)
    logger.log_text("text", "words", 4)
    logger.log_table("table", ["a", "b"], [[1, "x"], [2, "y"]], step=5)
    Path("notes.txt").write_text("written")
    logger.log_file("notes.txt")
    logger.log_file("deep/other", "notes.txt", 6)
    logger.log_metrics({"a": 1.0, "deep": {"b": torch.tensor(2.0)}, "nan": float("nan")}, 1)
    assert pickle.loads(pickle.dumps(logger)).run_id == logger.run_id  # with values that are on their way
    with pytest.warns(UserWarning, match="'a@b' is called 'a_b'"):
        logger.log_metrics({"a@b": 1.0})
    with pytest.warns(UserWarning, match="'name' = 'text' is left out"):
        logger.log_metrics({"name": "text"})
    logger.finalize()
    found = artifacts(logger)
    assert {*found} >= {
        "media/deep/other_6.txt", "media/figure_3.png", "media/notes.txt", "media/still.png", "media/table_5.json",
        "media/text_4.txt",
    }  # fmt: skip
    images = [path for path in found if path.startswith("images/") and path.endswith(".png")]
    assert [path.split("+timestamp")[0] for path in images] == [f"images/images~a_{i}+step+3" for i in (0, 1)]
    assert content(logger, "media/notes.txt") == content(logger, "media/deep/other_6.txt") == "written"
    assert json.loads(content(logger, "media/table_5.json")) == {"columns": ["a", "b"], "data": [[1, "x"], [2, "y"]]}
    assert (values(logger, "a"), values(logger, "deep/b")) == ([(1, 1.0)], [(1, 2.0)])
    assert logger.save_dir == str(tmp_path / "runs")
    assert sorted(os.listdir()) == ["notes.txt", "runs"], "nothing is written anywhere else"


def test_a_run_goes_on_or_branches() -> None:
    first = MLFlowLogger()
    first.log_metrics({"a": 1.0}, 0)
    first.log_hyperparams({"lr": 1})
    state = first.state_dict()
    first.finalize("failed")
    assert mlflow.MlflowClient("file:./mlruns").get_run(state["run"]).info.status == "FAILED"
    json.dumps(state)
    again = MLFlowLogger()
    assert again.name == first.name
    again.resume(state)
    again.log_metrics({"a": 2.0}, 1)
    assert client_of(again).get_run(first.version).info.status == "RUNNING"
    with pytest.warns(UserWarning, match=r"first value of a parameter, so that \['lr'\]"):
        again.log_hyperparams({"lr": 2, "new": 3})
    again.finalize("success")
    assert again.run_id == first.run_id
    assert len(client_of(again).search_runs([again.name])) == 1, "no other run was begun on the way"
    assert values(again, "a") == [(0, 1.0), (1, 2.0)]
    assert client_of(again).get_run(first.run_id).data.params == {"lr": "1", "new": "3"}
    branch = MLFlowLogger()
    branch.branch(state)
    branch.log_metrics({"a": 4.0}, 1)
    assert branch.run_id != first.run_id
    assert client_of(branch).get_run(branch.run_id).data.tags["mlflow.parentRunId"] == first.run_id
    named = MLFlowLogger(run_id=branch.run_id)
    named.resume(state)
    assert named.run_id == branch.run_id
    fold = branch.run_id
    branch.begin_anew()
    assert branch.run_id != fold
    assert client_of(branch).get_run(fold).info.status == "FINISHED"
    branch.finalize()
    named.finalize()


def test_where_mlflow_refuses_files_a_database_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE")
    logger = MLFlowLogger("with / slash")
    logger.log_metrics({"a": 1.0}, 2)
    logger.log_text("text", "words")
    logger.finalize()
    assert Path("mlruns/mlflow.db").is_file()
    assert values(logger, "a") == [(2, 1.0)]
    assert next(Path("mlruns/artifacts").rglob("text.txt")).read_text() == "words"
    assert logger.save_dir == "./mlruns"


def test_without_mlflow_the_constructor_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install treadle\[mlflow\]"):
        MLFlowLogger()
    monkeypatch.undo()
    with pytest.raises(MisconfigurationException, match="log_model='some' must be"):
        MLFlowLogger(log_model="some")  # type: ignore[arg-type]
