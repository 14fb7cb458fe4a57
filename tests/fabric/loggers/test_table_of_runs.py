"""TensorBoard's table of runs (the tab HPARAMS), as TensorBoard's own backend reads it from the files.

Tests of ``treadle_fabric.loggers.tensorboard``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2, backend_context, get_experiment, list_session_groups
from tests.trainer.models import Net, loader, trainer
from torch import Tensor

from treadle_fabric.loggers import TensorBoardLogger


def table(folder: Path) -> list[dict[str, Any]]:
    """The lines of the table: hyper-parameters, the last values of the metrics, and the status."""
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(folder)).Reload()
    provider = MultiplexerDataProvider(multiplexer, str(folder))
    context = backend_context.Context(TBContext(data_provider=provider))
    request = get_experiment.Handler(
        RequestContext(), context, "", api_pb2.GetExperimentRequest(experiment_name="", include_metrics=True)
    )
    columns = [info.name for info in request.run().metric_infos]
    parameters = [api_pb2.ColParams(metric=name) for name in columns]
    asked = api_pb2.ListSessionGroupsRequest(
        col_params=parameters, allowed_statuses=api_pb2.Status.values(), slice_size=100, include_metrics=True
    )
    groups = list_session_groups.Handler(RequestContext(), context, "", asked).run().session_groups
    return [
        {name: value.number_value or value.string_value for name, value in group.hparams.items()}
        | {value.name.tag: round(value.value, 6) for value in group.metric_values}
        | {"status": api_pb2.Status.Name(group.sessions[0].status).removeprefix("STATUS_")}
        for group in groups
    ]


class Logs(Net):
    def __init__(self, width: int, act: str = "relu", fails: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="fails")
        self.fails = fails

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.log("both", float(self.global_step), on_step=True, on_epoch=True)
        if self.fails and self.global_step == 2:
            raise RuntimeError("failed")
        return super().training_step(batch, batch_idx)


def fit(tmp_path: Path, module: Logs, **kwargs: Any) -> None:
    logger = TensorBoardLogger(tmp_path, **kwargs)
    trainer(tmp_path, logger=logger, log_every_n_steps=1, max_epochs=1).fit(module, loader(), loader())


def test_a_run_shows_the_last_values_of_all_its_metrics(tmp_path: Path) -> None:
    fit(tmp_path, Logs(5))
    [line] = table(tmp_path)
    assert line.pop("val_loss") > 0 and line.pop("train_loss") > 0
    assert line == {"width": 5, "act": "relu", "hp_metric": -1, "both_epoch": 1.5, "status": "SUCCESS"}


def test_runs_are_compared_and_a_failed_one_says_so(tmp_path: Path) -> None:
    fit(tmp_path, Logs(5), default_hp_metric=False)
    with pytest.raises(RuntimeError, match="failed"):
        fit(tmp_path, Logs(6, fails=True), default_hp_metric=False)
    lines = table(tmp_path)
    assert sorted((line["width"], line["status"]) for line in lines) == [(5, "SUCCESS"), (6, "FAILURE")]
    assert all("hp_metric" not in line for line in lines)
    assert "both_epoch" in lines[0]


def test_a_run_that_is_killed_is_in_the_table_too(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    logger.log_hyperparams({"lr": 0.5})
    logger.log_metrics({"loss": 2.0}, 0)
    logger.log_metrics({"loss": 1.0}, 1)
    logger.save()
    assert table(tmp_path) == [{"lr": 0.5, "hp_metric": -1, "loss": 1.0, "status": "UNKNOWN"}]


def test_the_metrics_that_the_user_chose_are_the_columns(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, default_hp_metric=False)
    logger.log_hyperparams({"lr": 0.5}, {"best": 0.0})
    logger.log_metrics({"loss": 1.0, "best": 3.0}, 1)
    logger.finalize("success")
    assert table(tmp_path) == [{"lr": 0.5, "best": 3.0, "status": "SUCCESS"}]
