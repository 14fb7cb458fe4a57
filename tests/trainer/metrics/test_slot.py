"""Slots, where the values of a name wait to be reduced."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from treadle.metrics.slot import stack


def test_scalars_on_a_device_without_double_precision_are_stacked_in_single_precision() -> None:
    """A device that only reports to be MPS: one such device needs no process group to log on."""
    with FakeTensorMode():
        on_device = torch.ones((), device="mps")
        assert stack([on_device, 2.0]).dtype is torch.float32
        assert stack([on_device, on_device]).dtype is torch.float32
        assert stack([torch.ones(()), 2.0]).dtype is torch.float64
