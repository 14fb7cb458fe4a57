"""Half precision on the meta device: types of parameters and buffers, and what becomes of them.

Tests of ``treadle_fabric.precision.half``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from treadle_fabric import Fabric, MisconfigurationException, SingleDeviceStrategy
from treadle_fabric.plugins import HalfPrecision


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.register_buffer("angles", torch.polar(torch.ones(8), torch.arange(8.0)))
        self.register_buffer("table", torch.tensor([1.0, 2.0]), persistent=False)


class Materializing(SingleDeviceStrategy):
    """Makes the values of meta modules at set-up, as strategies do that shard them."""

    initializes_on_meta = True

    def setup_module(self, module: nn.Module) -> nn.Module:
        return module.to_empty(device="cpu")


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-true", torch.bfloat16), ("16-true", torch.float16)])
def test_types_on_the_meta_device(precision: Any, dtype: torch.dtype) -> None:
    def check(model: nn.Module, device: str) -> None:
        kinds = {name: t.dtype for name, t in [*model.named_parameters(), *model.named_buffers()]}
        assert kinds.pop("norm.num_batches_tracked") == torch.int64
        assert kinds.pop("angles") == torch.complex64
        assert set(kinds.values()) == {dtype}
        assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {device}

    with torch.device("meta"), HalfPrecision(precision).module_init_context():
        check(Layers(), "meta")
    with torch.device("meta"):
        full = Layers()
    check(HalfPrecision(precision).convert_module(full), "meta")

    fabric = Fabric(accelerator="cpu", precision=precision, strategy=Materializing())
    with fabric.init_module(empty_init=True):
        model = Layers()
    check(model, "meta")
    fabric.setup(model)
    check(model, "cpu")
    with fabric.init_module(empty_init=False):
        check(Layers(), "cpu")
    plain = Fabric(accelerator="cpu", devices=1, precision=precision)
    with plain.init_module(empty_init=True):
        check(Layers(), "cpu")
    with (
        torch.device("meta"),
        pytest.raises(MisconfigurationException, match=r"'linear\.weight' is on the meta"),
    ):
        plain.setup(Layers())
