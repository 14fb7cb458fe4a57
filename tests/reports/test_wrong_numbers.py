"""An argument that is no number, or out of range, is refused where it is given, and NumPy's numbers are numbers.

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
    EMAWeightAveraging,
    LearningRateFinder,
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
