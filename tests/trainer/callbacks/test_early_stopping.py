"""Tests of ``treadle.callbacks.early_stopping``, ``treadle.callbacks.monitoring.monitored_metric``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.trainer.callbacks.scripted import Scripted, fit, loader, trainer_with

from treadle import Trainer
from treadle.callbacks import EarlyStopping
from treadle_fabric.errors import MisconfigurationException

NAN = float("nan")


def stop(script: list[float], epochs: int = 8, **arguments: Any) -> tuple[EarlyStopping, Trainer]:
    stopping = EarlyStopping("val_loss", **arguments)
    trainer = fit(stopping, script=script, max_epochs=epochs)
    return stopping, trainer


@pytest.mark.parametrize(
    ("script", "arguments", "epochs", "reason"),
    [
        ([3, 2, 2, 2, 2], {"patience": 2}, 4, 3),
        ([3, 2.9, 2.8, 2.7, 2.6], {"patience": 2, "min_delta": 0.15}, 7, 3),
        ([3, 2.9, 2.8, 2.7, 2.6], {"patience": 2, "min_delta": -0.15}, 7, 3),
        ([1, 2, 1.5, 3, 2], {"patience": 1, "mode": "max"}, 3, 3),
        ([1, 1.1, 1.3, 1.35, 1.35], {"patience": 2, "mode": "max", "min_delta": 0.2}, 5, 3),
        ([3, 2], {"patience": 0}, 3, 3),
        ([3, 2, NAN, 1], {}, 3, 4),
        ([3, float("inf"), 1], {}, 2, 4),
        ([3, 2, NAN, 1, 1, 1], {"check_finite": False, "patience": 2}, 6, 3),
        ([3, 2, 0.5, 0.4], {"stopping_threshold": 1.0}, 3, 1),
        ([3, 1, 0.5, 0.4], {"stopping_threshold": 1.0}, 3, 1),
        ([3, 2, 12, 1], {"divergence_threshold": 10.0}, 3, 2),
        ([3, 2, 0.5, 1], {"divergence_threshold": 1.0, "mode": "max"}, 3, 2),
        ([5, 4, 3, 2, 1], {}, 5, 0),
    ],
)
def test_when_and_why_it_stops(script: list[float], arguments: dict[str, Any], epochs: int, reason: int) -> None:
    stopping, trainer = stop(script, epochs=max(epochs, 5) if reason == 0 else 8, **arguments)
    assert trainer.current_epoch == epochs
    assert stopping.stopping_reason == reason
    assert stopping.stopped_epoch == (epochs - 1 if reason else 0)
    assert trainer.should_stop == bool(reason)
    assert bool(stopping.stopping_reason_message) == bool(reason)


def test_best_score_and_state_are_those_of_lightning() -> None:
    stopping, _ = stop([3, 2, 2, 2], patience=2)
    assert stopping.state_key == "EarlyStopping{'monitor': 'val_loss', 'mode': 'min'}"
    state = stopping.state_dict()
    assert float(state.pop("best_score")) == 2.0
    message = state.pop("stopping_reason_message")
    assert "did not improve in the last 2 records" in message
    assert state == {"wait_count": 2, "stopped_epoch": 3, "patience": 2, "stopping_reason": 3}
    other = EarlyStopping("val_loss")
    other.load_state_dict({**stopping.state_dict()})
    assert other.state_dict() == stopping.state_dict()
    assert other.monitor_op is torch.lt


def test_a_resumed_run_goes_on_counting() -> None:
    trainer = fit(EarlyStopping("val_loss", patience=3), script=[1, 2, 2], max_epochs=3)
    trainer.save_checkpoint("c.ckpt")
    assert torch.load("c.ckpt", weights_only=True)["callbacks"]["EarlyStopping{'monitor': 'val_loss', 'mode': 'min'}"]
    resumed = fit(EarlyStopping("val_loss", patience=3), script=[2], max_epochs=9, ckpt_path="c.ckpt")
    assert resumed.current_epoch == 4


@pytest.mark.parametrize(
    ("arguments", "run", "checks"),
    [
        ({}, {}, 2),
        ({}, {"val_check_interval": 0.5}, 4),
        ({}, {"val_check_interval": 2}, 4),
        ({}, {"val_check_interval": 1}, 8),
        ({"check_on_train_epoch_end": True}, {"val_check_interval": 0.5}, 2),
        ({"check_on_train_epoch_end": False}, {}, 2),
        ({}, {"check_val_every_n_epoch": 2}, 1),
        ({}, {"fast_dev_run": 1}, 0),
    ],
)
def test_when_it_checks(arguments: dict[str, Any], run: dict[str, Any], checks: int) -> None:
    stopping = EarlyStopping("val_loss", patience=100, **arguments)
    fit(stopping, script=[1, 2, 3, 4], **{"max_epochs": 2, **run})
    seen = stopping.wait_count + int(torch.isfinite(stopping.best_score))
    assert seen == checks


def test_a_training_metric_without_validation() -> None:
    stopping = EarlyStopping("train_loss_epoch", patience=1, min_delta=100)
    trainer = fit(stopping, validate=False, max_epochs=5, check_val_every_n_epoch=2)
    assert trainer.current_epoch == 2


def test_the_sanity_check_does_not_count() -> None:
    stopping = EarlyStopping("val_loss")
    fit(stopping, script=[3], max_epochs=1)
    assert stopping.wait_count == 0


def test_min_epochs_wins() -> None:
    stopping = EarlyStopping("val_loss", patience=1)
    trainer = fit(stopping, script=[1], min_epochs=5, max_epochs=10)
    assert trainer.current_epoch == 5


def test_a_metric_that_nobody_logs() -> None:
    trainer = trainer_with(EarlyStopping("val_los"), num_sanity_val_steps=0)
    with pytest.raises(MisconfigurationException, match=r"'val_los'.*Did you mean 'val_loss'"):
        trainer.fit(Scripted([1]), loader(), loader(1))
    with pytest.warns(RuntimeWarning, match="Early stopping does nothing"):
        lax = fit(EarlyStopping("nope", strict=False), script=[1], max_epochs=2)
    assert lax.current_epoch == 2


def test_a_validation_metric_before_the_first_validation_is_no_error() -> None:
    stopping = EarlyStopping("val_loss", check_on_train_epoch_end=True)
    fit(stopping, script=[1], max_epochs=2, check_val_every_n_epoch=2, num_sanity_val_steps=0)
    assert float(stopping.best_score) == 1.0


@pytest.mark.parametrize("arguments", [{"mode": "least"}, {"patience": -1}])
def test_arguments_that_cannot_work_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(MisconfigurationException, match="EarlyStopping"):
        EarlyStopping("val_loss", **arguments)


@pytest.mark.parametrize(("verbose", "lines"), [(True, 3), (False, 1)])
def test_what_it_says(verbose: bool, lines: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        stop([3, 2, 2], patience=1, verbose=verbose)
    said = [r.message for r in caplog.records if "val_loss" in r.message]
    assert len(said) == lines
    if verbose:
        assert "improved by 1.000 >= min_delta = 0.0. New best score: 2.000" in said[1]
    assert "did not improve in the last 1 records" in said[-1]


def test_the_trainer_knows_it() -> None:
    stopping = EarlyStopping("val_loss")
    trainer = trainer_with(stopping)
    assert trainer.early_stopping_callback is stopping
    assert trainer.early_stopping_callbacks == [stopping]
