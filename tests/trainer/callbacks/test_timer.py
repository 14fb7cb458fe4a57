from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import pytest
import torch
from tests.trainer.callbacks.scripted import Scripted, fit, loader, trainer_with

from treadle import Callback
from treadle.callbacks import Timer
from treadle_fabric.errors import MisconfigurationException


class Slow(Callback):
    def on_train_batch_start(self, *_: Any) -> None:
        time.sleep(0.02)

    def on_validation_batch_start(self, *_: Any) -> None:
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("duration", "seconds"),
    [
        ("00:00:00:10", 10),
        ("01:02:03:04", 93784),
        ("00:25:00:70", 90070),
        (timedelta(days=1), 86400),
        ({"hours": 1, "seconds": 1}, 3601),
        (None, None),
    ],
)
def test_durations(duration: Any, seconds: float | None) -> None:
    assert Timer(duration).time_remaining() == seconds


@pytest.mark.parametrize(
    "arguments",
    [{"duration": "00:00:10"}, {"duration": "x"}, {"duration": 5}, {"duration": {"hour": 1}}, {"interval": "batch"}],
)
def test_what_is_no_duration_or_interval_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(MisconfigurationException, match="Timer"):
        Timer(**arguments)


@pytest.mark.parametrize(("interval", "steps"), [("step", {1, 2, 3}), ("epoch", {4})])
def test_training_ends_when_time_is_up(interval: str, steps: set[int], caplog: pytest.LogCaptureFixture) -> None:
    timer = Timer(timedelta(milliseconds=50), interval)  # a step takes 20 ms or more
    with caplog.at_level("INFO"):
        trainer = fit(Slow(), timer, validate=False)
    assert trainer.global_step in steps
    assert "Time limit reached" in caplog.text
    remaining = timer.time_remaining()
    assert remaining is not None
    assert remaining <= 0


def test_it_is_silent_if_asked_and_measures_without_a_duration(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        fit(Slow(), Timer(timedelta(milliseconds=10), verbose=False), validate=False)
        timer = Timer()
        trainer = fit(timer, max_epochs=1)
    assert "Time limit" not in caplog.text
    assert trainer.global_step == 4
    assert timer.time_remaining() is None
    assert timer.time_elapsed() > 0


def test_each_stage_has_its_time() -> None:
    timer = Timer()
    before_training: list[float] = []

    class Looks(Callback):
        def on_train_start(self, *_: Any) -> None:
            before_training.extend([timer.time_elapsed("sanity_check"), timer.time_elapsed("validate")])

    trainer = trainer_with(Slow(), timer, Looks(), max_epochs=2)
    assert timer.start_time("validate") is None
    begin = time.monotonic()
    trainer.fit(Scripted(), loader(), loader(1))
    assert 0.2 <= timer.time_elapsed("train") <= time.monotonic() - begin
    sanity, validate = before_training
    assert sanity >= 0.02
    assert validate == 0  # the sanity check is no validation
    assert 0.04 <= timer.time_elapsed("validate") < timer.time_elapsed("train")  # both validations
    assert timer.time_elapsed("test") == 0
    start, end = timer.start_time(), timer.end_time()
    assert start is not None
    assert end is not None
    assert begin < start < end < time.monotonic()
    trainer.validate(Scripted(), loader(1), verbose=False)
    assert timer.time_elapsed("validate") >= 0.06
    assert timer.end_time("test") is None
    with pytest.raises(MisconfigurationException, match="'training'"):
        timer.time_elapsed("training")


def test_a_resumed_run_has_the_rest_of_the_time() -> None:
    trainer = fit(Slow(), Timer(), validate=False, max_epochs=1)
    trainer.save_checkpoint("c.ckpt")
    spent = torch.load("c.ckpt", weights_only=True)["callbacks"]["Timer"]["time_elapsed"]
    assert spent["train"] >= 0.08
    assert set(spent) == {"train", "sanity_check", "validate", "test", "predict"}
    total = timedelta(seconds=spent["train"], milliseconds=50)
    resumed = fit(Slow(), Timer(total), validate=False, max_epochs=9, ckpt_path="c.ckpt")
    assert 4 < resumed.global_step <= 7
    none_left = fit(Timer(timedelta(milliseconds=80)), validate=False, max_epochs=9, ckpt_path="c.ckpt")
    assert none_left.global_step == 4
