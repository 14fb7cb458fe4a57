"""An argument that is no number, out of range, no flag or no name is refused where it is given; NumPy's are numbers.

Tests of ``treadle_fabric.checks``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from treadle.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    DeviceStatsMonitor,
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateFinder,
    ModelCheckpoint,
    SpikeDetection,
    StochasticWeightAveraging,
)
from treadle_fabric import MisconfigurationException
from treadle_fabric.utilities.throughput import Throughput

TAKES: list[tuple[Callable[..., Any], str]] = [
    (BackboneFinetuning, "backbone_initial_lr"),
    (BackboneFinetuning, "backbone_initial_ratio_lr"),
    (BatchSizeFinder, "margin"),
    (EMAWeightAveraging, "decay"),
    (LearningRateFinder, "min_lr"),
    (LearningRateFinder, "early_stop_threshold"),
    (SpikeDetection, "atol"),
    (SpikeDetection, "rtol"),
    (StochasticWeightAveraging, "swa_lrs"),
    (Throughput, "available_flops"),
]


@pytest.mark.parametrize(("make", "name"), TAKES)
@pytest.mark.parametrize("value", ["0.5", True, -1, float("nan"), [None]])
def test_what_is_no_number_of_the_range_is_refused(make: Callable[..., Any], name: str, value: Any) -> None:
    with pytest.raises(MisconfigurationException, match=f"{name}="):
        make(**{name: value})


@pytest.mark.parametrize(("make", "name"), TAKES)
def test_numbers_of_numpy_are_numbers(make: Callable[..., Any], name: str) -> None:
    make(**{name: np.float32(1.5 if name == "early_stop_threshold" else 0.5)})


def test_digits_are_a_whole_number() -> None:
    with pytest.raises(MisconfigurationException, match="rounding='x'"):
        BackboneFinetuning(rounding="x")  # type: ignore[arg-type]


FLAGS: list[tuple[Callable[..., Any], str]] = [
    (DeviceStatsMonitor, "cpu_stats"),
    (EMAWeightAveraging, "use_buffers"),
    (SpikeDetection, "finite_only"),
]


@pytest.mark.parametrize(("make", "name"), FLAGS)
def test_a_text_is_no_flag(make: Callable[..., Any], name: str) -> None:
    with pytest.raises(MisconfigurationException, match=f"{name}='False' must be True or False"):
        make(**{name: "False"})
    make(**{name: False})


@pytest.mark.parametrize("make", [EarlyStopping, ModelCheckpoint])
def test_a_metric_has_a_name(make: Callable[..., Any]) -> None:
    with pytest.raises(MisconfigurationException, match="monitor=3"):
        make(monitor=3)
