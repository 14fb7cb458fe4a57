"""OptunaPruning, with real studies."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.pruners import BasePruner, MedianPruner, NopPruner, ThresholdPruner
from optuna.trial import TrialState
from tests.processes import run_in_ranks
from tests.trainer.models import Net, loader, trainer

from treadle import Callback
from treadle.callbacks import ModelCheckpoint, OnExceptionCheckpoint, OptunaPruning
from treadle.stages import TrainerStatus
from treadle_fabric import MisconfigurationException
from treadle_fabric.loggers import CSVLogger

optuna.logging.set_verbosity(optuna.logging.ERROR)


class Listens(Callback):
    """Notes how runs end."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def on_exception(self, *args: Any) -> None:
        self.said.append("exception")

    def on_fit_end(self, *args: Any) -> None:
        self.said.append("fit end")


class Finalized(CSVLogger):
    statuses: list[str] = []

    def finalize(self, status: str) -> None:
        super().finalize(status)
        self.statuses.append(status)


def objective(trial: Any, **arguments: Any) -> float:
    rate = trial.suggest_float("lr", 0.0, 1.0)
    callbacks = [OptunaPruning(trial, "val_loss"), *arguments.pop("callbacks", [])]
    run = trainer(Path(), callbacks=callbacks, **{"max_epochs": 4, **arguments})
    try:
        run.fit(Net(rate), loader(), loader())
    finally:
        assert run.state.status is TrainerStatus.FINISHED
    return run.callback_metrics["val_loss"].item()


def study(*rates: float, pruner: BasePruner | None = None, storage: str | None = None) -> optuna.Study:
    made = optuna.create_study(
        study_name="study", storage=storage, load_if_exists=True, pruner=pruner or MedianPruner(n_startup_trials=1)
    )
    for rate in rates:
        made.enqueue_trial({"lr": rate})
    return made


def states(of: optuna.Study) -> list[TrialState]:
    return [trial.state for trial in of.trials]


def test_a_study_with_pruned_and_finished_trials() -> None:
    listens, Finalized.statuses = Listens(), []
    saves = OnExceptionCheckpoint("errors")
    search = study(0.1, 0.0, 0.2)
    search.optimize(
        lambda trial: objective(
            trial,
            callbacks=[listens, saves, ModelCheckpoint(f"trial_{trial.number}", save_top_k=-1)],
            enable_checkpointing=True,
            logger=Finalized("logs"),
        ),
        n_trials=3,
    )
    assert states(search) == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.COMPLETE]
    assert [len(trial.intermediate_values) for trial in search.trials] == [4, 1, 4]
    first = search.trials[0]
    assert first.value == first.intermediate_values[3] < first.intermediate_values[0]
    assert listens.said == ["fit end"] * 3 and Finalized.statuses == ["success"] * 3
    assert not Path("errors").exists()
    assert [len(list(Path(f"trial_{i}").iterdir())) for i in range(3)] == [4, 1, 4]
    with open("logs/lightning_logs/version_1/metrics.csv", newline="") as file:
        [row] = csv.DictReader(file)
    assert float(row["val_loss"]) == pytest.approx(search.trials[1].intermediate_values[0])


def test_a_study_in_sqlite_goes_on_with_what_it_knows() -> None:
    study(0.1, storage="sqlite:///study.db").optimize(objective, n_trials=1)
    later = study(0.0, storage="sqlite:///study.db")
    later.optimize(objective, n_trials=1)
    assert states(later) == [TrialState.COMPLETE, TrialState.PRUNED]


def test_a_resumed_run_reports_each_validation_once() -> None:
    search = study(0.1, 0.1, pruner=NopPruner())
    search.optimize(objective, n_trials=1)

    def stopped_and_resumed(trial: Any) -> float:
        rate = trial.suggest_float("lr", 0.0, 1.0)
        for epochs, path in ((2, None), (4, "saved/mid.ckpt")):
            # The first run reports once more after the save, as a run that is killed then.
            saver = ModelCheckpoint("saved", filename="mid", every_n_train_steps=6)  # within epoch 1
            callbacks = [OptunaPruning(trial, "val_loss"), saver]
            run = trainer(Path(), callbacks=callbacks, enable_checkpointing=True, max_epochs=epochs)
            run.fit(Net(rate), loader(), loader(), ckpt_path=path)
        return run.callback_metrics["val_loss"].item()

    search.optimize(stopped_and_resumed, n_trials=1)
    assert search.trials[1].intermediate_values == search.trials[0].intermediate_values
    assert search.trials[1].value == search.trials[0].value


def test_the_steps_are_validations_and_the_sanity_check_is_none() -> None:
    search = study(0.1, pruner=NopPruner())
    search.optimize(lambda t: objective(t, max_epochs=2, val_check_interval=2, num_sanity_val_steps=2), n_trials=1)
    assert list(search.trials[0].intermediate_values) == [0, 1, 2, 3]
    without = study(0.1, pruner=NopPruner())
    seen = []

    def training_only(trial: Any) -> float:
        run = trainer(Path(), callbacks=OptunaPruning(trial, "train_loss"), max_epochs=2)
        run.fit(Net(0.1), loader())
        seen.append(run.callback_metrics["train_loss"].item())
        return seen[-1]

    without.optimize(training_only, n_trials=1)
    assert without.trials[0].intermediate_values[1] == pytest.approx(seen[0])


def test_not_before_min_epochs() -> None:
    search = study(0.1, pruner=ThresholdPruner(upper=0.0))
    search.optimize(lambda trial: objective(trial, min_epochs=3), n_trials=1)
    assert states(search) == [TrialState.PRUNED] and len(search.trials[0].intermediate_values) == 3


def test_the_next_fit_of_the_trainer_is_not_pruned() -> None:
    search = study(0.1, pruner=ThresholdPruner(upper=0.0))
    run = trainer(
        Path(), callbacks=OptunaPruning(search.ask({"lr": optuna.distributions.FloatDistribution(0, 1)}), "val_loss")
    )
    with pytest.raises(optuna.TrialPruned, match=r"step 0: val_loss = "):
        run.fit(Net(), loader(), loader())
    run.callbacks.clear()
    run.fit(Net(), loader(), loader())


def both_ranks(folder: str) -> None:
    import torch.distributed

    search = study(0.1, pruner=ThresholdPruner(upper=0.0))
    given = trainer(Path(folder), devices=2, strategy="ddp", max_epochs=3, callbacks=[])
    trial = search.ask() if given.global_rank == 0 else None
    given.callbacks.append(OptunaPruning(trial, "val_loss"))
    try:
        given.fit(Net(), loader(), loader())
    except optuna.TrialPruned:
        print(f"rank {given.global_rank} pruned in epoch {given.current_epoch}")
    if given.global_rank == 0:
        assert list(search.trials[0].intermediate_values) == [0]
    torch.distributed.destroy_process_group()


def test_rank_zero_decides_and_all_ranks_raise(tmp_path: Path) -> None:
    said = run_in_ranks(both_ranks, str(tmp_path))
    assert "rank 0 pruned in epoch 1" in said and "rank 1 pruned in epoch 1" in said


def test_the_study_stays_in_the_process_that_starts_others() -> None:
    search = study(0.1, 0.0, pruner=MedianPruner(n_startup_trials=1))
    search.optimize(lambda t: objective(t, devices=2, strategy="ddp_fork", max_epochs=2), n_trials=2)
    assert states(search) == [TrialState.COMPLETE, TrialState.PRUNED]
    assert [len(trial.intermediate_values) for trial in search.trials] == [2, 1]


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="the trial that the study gives"):
        OptunaPruning("trial", "val_loss")
    run = trainer(Path(), callbacks=OptunaPruning(None, "val_loss"))
    with pytest.raises(MisconfigurationException, match="rank 0 needs the trial"):
        run.fit(Net(), loader(), loader())
    trial = study(0.1).ask()
    with pytest.raises(MisconfigurationException, match=r"nothing has logged 'val_los'. Did you mean 'val_loss'\?"):
        run = trainer(Path(), callbacks=OptunaPruning(trial, "val_los"), num_sanity_val_steps=0)
        run.fit(Net(), loader(), loader())
    with pytest.raises(MisconfigurationException, match="nothing has logged 'other'"):
        trainer(Path(), callbacks=OptunaPruning(trial, "other")).fit(Net(), loader())
    run = trainer(Path(), callbacks=OptunaPruning(trial, "other"), fast_dev_run=True)
    run.fit(Net(), loader(), loader())
