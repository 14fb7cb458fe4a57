"""Slots, where the values of a name wait to be reduced."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from treadle.metrics.options import LogOptions
from treadle.metrics.reduction import Kind
from treadle.metrics.slot import Slot, stack


def test_scalars_on_a_device_without_double_precision_are_stacked_in_single_precision() -> None:
    """A device that only reports to be MPS: one such device needs no process group to log on."""
    with FakeTensorMode():
        on_device = torch.ones((), device="mps")
        assert stack([on_device, 2.0]).dtype is torch.float32
        assert stack([on_device, on_device]).dtype is torch.float32
        assert stack([torch.ones(()), 2.0]).dtype is torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_values_of_the_host_are_added_up_as_lightning_adds_tensors(dtype: torch.dtype, reduce: str) -> None:
    """One after the other, each product and each sum rounded; 16 bits as 32. These are the numbers of Lightning."""
    values = [torch.sin(torch.tensor(i * 0.7)).to(dtype) / 3 for i in range(300)]  # more than are folded at once
    weights = [7 if i % 3 else 5 for i in range(300)]
    slot = Slot("x", LogOptions(reduce_fx=reduce), on_step=False, on_epoch=True)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    total, samples = torch.zeros((), dtype=torch.float32), torch.tensor(0)
    for value, weight in zip(values, weights):
        slot.accumulate(value, weight)
        total = total + value.to(wide) * (weight if reduce == "mean" else 1)
        samples = samples + weight
    expected = total / samples if reduce == "mean" else total
    assert slot.compute() == expected and slot.compute().dtype == expected.dtype == wide


def test_numbers_are_single_precision_and_whole_numbers_are_summed_exactly() -> None:
    mean = Slot("x", LogOptions(), on_step=False, on_epoch=True)
    total = Slot("x", LogOptions(reduce_fx="sum"), on_step=False, on_epoch=True)
    for _ in range(300):
        mean.accumulate(0.1, 50)
        total.accumulate(100_001, 50)
    expected = torch.tensor(0.0)
    for _ in range(300):
        expected = expected + torch.tensor(0.1) * 50
    assert mean.compute() == expected / (300 * 50)
    assert total.compute() == 30_000_300


@pytest.mark.parametrize("values", [[1.0], [1], [1, 1.0], [torch.tensor(1)], [0.1], [torch.tensor(True), 1]])
def test_sums_of_python_numbers_and_of_whole_numbers_are_exact_beyond_single_precision(values: list[Any]) -> None:
    slot = Slot("x", LogOptions(reduce_fx="sum"), on_step=False, on_epoch=True)
    slot.accumulate(2**24 if values[0] != 0.1 else 0.0, 1)
    for i in range(300):
        slot.accumulate(values[i % len(values)], 1)
    assert slot.compute() == (pytest.approx(30, rel=1e-14) if values[0] == 0.1 else 2**24 + 300)
    assert slot.kind is Kind.NUMBER
