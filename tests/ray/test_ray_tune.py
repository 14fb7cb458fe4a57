"""RayTuneReport in real trials of Ray Tune: `make test-ray`."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.trainer.models import Net, loader, trainer

from treadle import Callback
from treadle.callbacks import RayTrainReportCallback, RayTuneReport
from treadle_fabric import MisconfigurationException
from treadle_fabric.loggers import CSVLogger

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300), pytest.mark.filterwarnings("default")]


class Killed(Callback):
    """Kills the trial's process in the middle of an epoch, once."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == 10 and not self.flag.exists():
            self.flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)


class Finalized(CSVLogger):
    def finalize(self, status: str) -> None:
        super().finalize(status)
        Path(self.log_dir, "status").write_text(status)


def run_trial(config: dict[str, Any], folder: Path, epochs: int = 4, report: Any = None) -> Net:
    torch.manual_seed(0)
    callbacks = [] if report is None else [report]
    callbacks += [Killed(folder / "killed")] if config.get("kill") else []
    net = Net(config["lr"])
    alone = {} if isinstance(report, RayTuneReport | None) else {"devices": "auto"}
    run = trainer(
        folder, callbacks=callbacks, max_epochs=epochs, **alone, logger=Finalized(folder, version=str(config["lr"]))
    )
    path = report.ckpt_path if report else None
    if path is not None:
        (folder / f"resumed_{net.lr}").touch()
    run.fit(net, loader(), loader(), ckpt_path=path)
    return net


def trial(config: dict[str, Any], folder: Path) -> None:
    run_trial(config, folder, report=RayTuneReport({"loss": "val_loss"}))


def tuner(function: Any, space: dict[str, Any], folder: Path, **run: Any) -> Any:
    from ray import tune

    return tune.Tuner(
        partial(function, folder=folder),
        param_space=space,
        run_config=tune.RunConfig(storage_path=str(folder / "ray"), name="study", verbose=0, **run),
    )


def test_two_trials_of_which_one_is_killed_and_goes_on(cluster: None, tmp_path: Path) -> None:
    from ray import tune

    space = tune.grid_search([{"lr": 0.01, "kill": False}, {"lr": 0.05, "kill": True}])
    search = tuner(
        lambda config, folder: trial(config["own"], folder), {"own": space}, tmp_path,
        failure_config=tune.FailureConfig(max_failures=1),
    )  # fmt: skip
    results = search.fit()
    assert not results.errors and (tmp_path / "killed").exists()
    assert [file.name for file in tmp_path.glob("resumed_*")] == ["resumed_0.05"]
    for result in results:
        config = result.config["own"]
        expected = run_trial({**config, "kill": False}, tmp_path / f"alone_{config['lr']}")
        assert result.metrics["training_iteration"] == 4
        with result.checkpoint.as_directory() as folder:
            saved = torch.load(Path(folder) / "checkpoint.ckpt", weights_only=True)
        assert saved["epoch"] == 3 and saved["global_step"] == 16
        for name, value in expected.state_dict().items():
            assert torch.equal(saved["state_dict"][name], value)
        # a report that the kill came after is there twice, and Ray may not have written those before it
        losses = list(result.metrics_dataframe.drop_duplicates("training_iteration", keep="last")["loss"])
        assert len(losses) >= 2 and losses == sorted(losses, reverse=True)
    best = results.get_best_result("loss", "min")
    assert best.config["own"]["lr"] == 0.05


def stopped_after(scheduler: Any, folder: Path, function: Any) -> dict[float, int]:
    """Search with two learning rates, one after the other; the iterations of each."""
    from ray import tune

    search = tune.Tuner(
        partial(function, folder=folder),
        param_space={"lr": tune.grid_search([0.05, 0.0001])},
        tune_config=tune.TuneConfig(metric="loss", mode="min", scheduler=scheduler, max_concurrent_trials=1),
        run_config=tune.RunConfig(storage_path=str(folder / "ray"), name="study", verbose=0),
    )
    results = search.fit()
    assert not results.errors
    return {result.config["lr"]: result.metrics["training_iteration"] for result in results}


def test_asha_stops_the_worse_of_two(cluster: None, tmp_path: Path) -> None:
    from ray.tune.schedulers import ASHAScheduler

    scheduler = ASHAScheduler(max_t=4, grace_period=1, reduction_factor=2)
    assert stopped_after(scheduler, tmp_path, trial) == {0.05: 4, 0.0001: 1}
    assert sorted(file.read_text() for file in tmp_path.rglob("status")) == ["success", "success"]


def train_worker(config: dict[str, Any]) -> None:
    run_trial(config, Path(config["folder"]), report=RayTrainReportCallback({"loss": "val_loss"}))


def trial_with_workers(config: dict[str, Any], folder: Path) -> None:
    """A trial that only starts workers of Ray Train, which train."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    TorchTrainer(
        train_worker,
        train_loop_config={**config, "folder": str(folder)},
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(
            name=f"workers_{config['lr']}", storage_path=str(folder / "workers"), callbacks=[TuneReportCallback()]
        ),
    ).fit()


def test_trials_with_two_workers_each(cluster: None, tmp_path: Path) -> None:
    from ray.tune.schedulers import ASHAScheduler

    scheduler = ASHAScheduler(max_t=4, grace_period=1, reduction_factor=2)
    found = stopped_after(scheduler, tmp_path, trial_with_workers)
    assert found == {0.05: 4, 0.0001: 1}


def test_outside_of_a_trial(tmp_path: Path) -> None:
    report = RayTuneReport("val_loss")
    assert report.ckpt_path is None
    with pytest.raises(MisconfigurationException, match="this process runs none"):
        trainer(tmp_path, callbacks=report).fit(Net(), loader(), loader())
    for arguments, said in (({"metrics": {"loss": 1}}, "metrics="), ({"filename": "a/b.ckpt"}, "without a folder")):
        with pytest.raises(MisconfigurationException, match=said):
            RayTuneReport(**arguments)  # type: ignore[arg-type]


def test_a_metric_that_nobody_logged(cluster: None, tmp_path: Path) -> None:
    def wrong(config: dict[str, Any], folder: Path) -> None:
        run_trial(config, folder, report=RayTuneReport(["val_los"], save_checkpoints=False))

    results = tuner(wrong, {"lr": 0.01}, tmp_path).fit()
    assert "nothing has logged 'val_los'. Did you mean 'val_loss'?" in str(results.errors[0])
