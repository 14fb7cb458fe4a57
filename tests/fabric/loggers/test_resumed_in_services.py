"""A run that the trainer resumes goes on in the runs of services; a run that branches off begins others.

Tests of ``treadle_fabric.loggers.service``.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from tests.trainer.models import Net, loader, trainer

from treadle.callbacks import ModelCheckpoint
from treadle.loggers import CSVLogger, MLFlowLogger, TrackioLogger

FOLDER = tempfile.TemporaryDirectory(prefix="treadle-trackio-")
os.environ["TRACKIO_DIR"] = FOLDER.name  # which Trackio reads on import
mlflow = pytest.importorskip("mlflow")
pytest.importorskip("trackio")


def run(folder: Path, steps: int, ckpt_path: Any = None) -> tuple[list[Any], str]:
    loggers = [CSVLogger(folder), MLFlowLogger(), TrackioLogger("resumed", auto_log_cpu=False)]
    saves = ModelCheckpoint(folder / "checkpoints", save_top_k=0, save_last=True, every_n_train_steps=2)
    fit = trainer(
        folder, logger=loggers, max_steps=steps, max_epochs=-1, callbacks=[saves], enable_checkpointing=True,
        log_every_n_steps=1, limit_val_batches=0,
    )  # fmt: skip
    fit.fit(Net(), loader(), ckpt_path=ckpt_path)
    return loggers[1:], saves.last_model_path


@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")  # MLflow's own
def test_a_run_goes_on_or_branches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("GIT_PYTHON_REFRESH", "quiet")
    first, path = run(tmp_path, 4)
    start = shutil.copy(path, "start.ckpt")
    again, _ = run(tmp_path, 6, "last")
    branch, _ = run(tmp_path, 6, start)
    for begun, resumed, branched in zip(first, again, branch, strict=True):
        assert begun.version == resumed.version != branched.version
        assert branched.state_dict()["parent"] == begun.version
    client = mlflow.MlflowClient("file:./mlruns")
    steps = [
        {point.step for point in client.get_metric_history(log.version, "train_loss")} for log in (first[0], branch[0])
    ]
    assert steps[0] == {*range(6)}
    assert steps[1] <= {3, 4, 5} and steps[1] >= {4, 5}
    assert len(client.search_runs([first[0].name])) == 2
