"""When things fall, as tables.

Tests of ``treadle.loops.schedule``, ``treadle.durations``.
"""

from __future__ import annotations

import math
from datetime import timedelta
from typing import Any

import pytest

import treadle as L
from treadle.data.limits import limit_batches
from treadle.durations import parse_duration
from treadle.loops.schedule import (
    Durations,
    ValidationSchedule,
    check_validation_arguments,
    resolve_durations,
    total_steps,
)
from treadle.run.accumulation import Accumulation
from treadle_fabric import MisconfigurationException


@pytest.mark.parametrize(
    ("given", "seconds"),
    [("00:00:00:05", 5), ("01:02:03:04", 93784), (timedelta(minutes=2), 120), ({"hours": 1, "seconds": 1}, 3601)],
)
def test_durations_are_read(given: Any, seconds: int) -> None:
    assert parse_duration(given, "max_time") == timedelta(seconds=seconds)


@pytest.mark.parametrize("given", ["5", "1:2:3", {"ours": 1}, {}, 5, "aa:00:00:01"])
def test_what_is_no_duration_is_refused(given: Any) -> None:
    with pytest.raises(L.MisconfigurationException, match="max_time"):
        parse_duration(given, "max_time")


@pytest.mark.parametrize(
    ("length", "limit", "batches"),
    [
        (10, 1.0, 10), (10, 0.5, 5), (10, 0.25, 2), (10, 3, 3), (10, 30, 10), (10, 0, 0), (10, 0.0, 0),
        (None, 1.0, math.inf), (None, 7, 7), (None, 0, 0), (10, 1, 1),
    ],
)  # fmt: skip
def test_limits(length: int | None, limit: float, batches: float) -> None:
    assert limit_batches(length, limit, "limit_train_batches") == batches


def test_a_fraction_needs_a_length_and_at_least_one_batch() -> None:
    with pytest.raises(L.MisconfigurationException, match="length is unknown"):
        limit_batches(None, 0.5, "limit_val_batches")
    with pytest.raises(L.MisconfigurationException, match=r"less than one batch: use at least 0\.1"):
        limit_batches(10, 0.05, "limit_val_batches")


@pytest.mark.parametrize(
    ("interval", "every_n_epochs", "num_batches", "epochs", "expected"),
    [
        (1.0, 1, 3, 2, [(0, 3), (1, 3)]),
        (0.5, 1, 4, 1, [(0, 2), (0, 4)]),
        (0.5, 1, 5, 1, [(0, 2), (0, 4)]),
        (2, 1, 5, 2, [(0, 2), (0, 4), (1, 2), (1, 4)]),
        (2, None, 3, 2, [(0, 2), (1, 1), (1, 3)]),
        (1.0, 2, 3, 4, [(1, 3), (3, 3)]),
        (5, None, 3, 4, [(1, 2), (3, 1)]),
        (1.0, 1, math.inf, 1, [(0, 4)]),
    ],
)
def test_validation_falls_where_it_should(
    interval: Any, every_n_epochs: int | None, num_batches: float, epochs: int, expected: list[tuple[int, int]]
) -> None:
    schedule = ValidationSchedule.resolve(interval, every_n_epochs, num_batches)
    length = 4 if num_batches == math.inf else int(num_batches)
    due = [
        (epoch, batch)
        for epoch in range(epochs)
        for batch in range(1, length + 1)
        if schedule.due(epoch, batch, epoch * length + batch, is_last=batch == length)
    ]
    assert due == expected


def test_an_interval_longer_than_the_epoch_is_refused_unless_batches_count_across_epochs() -> None:
    with pytest.raises(L.MisconfigurationException, match="check_val_every_n_epoch=None"):
        ValidationSchedule.resolve(10, 1, 5)
    ValidationSchedule.resolve(10, None, 5)
    with pytest.raises(L.MisconfigurationException, match="length is unknown"):
        ValidationSchedule.resolve(0.5, 1, math.inf)


@pytest.mark.parametrize(
    ("batch_idx", "total", "accumulate", "size"), [(0, 5, 2, 2), (3, 5, 2, 2), (4, 5, 2, 1), (7, math.inf, 3, 3)]
)
def test_windows(batch_idx: int, total: float, accumulate: int, size: int) -> None:
    assert Accumulation(accumulate).place(batch_idx, total).window == size


@pytest.mark.parametrize(
    ("max_epochs", "max_steps", "batches", "accumulate", "steps"),
    [(2, -1, 5, 2, 6), (2, 4, 5, 2, 4), (-1, -1, 5, 1, math.inf), (-1, 7, 5, 1, 7), (3, -1, math.inf, 1, math.inf)],
)
def test_total_steps(max_epochs: int, max_steps: int, batches: float, accumulate: int, steps: float) -> None:
    assert total_steps(Durations(max_epochs, max_steps, None, None, None), batches, accumulate) == steps


def test_the_default_is_1000_epochs() -> None:
    default = resolve_durations(None, None, -1, None, None)
    assert (default.max_epochs, default.max_epochs_assumed) == (1000, True)
    assert not resolve_durations(1000, None, -1, None, None).max_epochs_assumed
    assert resolve_durations(None, None, 5, None, None).max_epochs == -1
    assert resolve_durations(None, None, -1, None, "00:00:00:01").max_epochs == -1


@pytest.mark.parametrize("interval", ["00:00:00:00", timedelta(0), timedelta(seconds=-1), {"seconds": 0}])
def test_an_interval_of_no_time_is_refused(interval: Any) -> None:
    with pytest.raises(MisconfigurationException, match=r"val_check_interval=.* must be longer than no time"):
        check_validation_arguments(interval, 1)
