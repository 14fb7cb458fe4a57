from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from treadle.numbers.grad_norm import grad_norm
from treadle_fabric.errors import MisconfigurationException


def net() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 1))
    model[0].weight.grad = torch.tensor([[3.0, -4.0]])
    model[0].bias.grad = torch.tensor([12.0])
    return model


@pytest.mark.parametrize(
    ("norm_type", "name", "weight", "total"),
    [(2, "2.0", 5.0, 13.0), (1.0, "1.0", 7.0, 19.0), ("inf", "inf", 4.0, 12.0), (math.inf, "inf", 4.0, 12.0)],
)
def test_norms(norm_type: float | str, name: str, weight: float, total: float) -> None:
    assert {key: value.item() for key, value in grad_norm(net(), norm_type).items()} == {
        f"grad_{name}_norm/0.weight": weight,
        f"grad_{name}_norm/0.bias": 12.0,
        f"grad_{name}_norm_total": total,
    }


def test_separator_and_no_gradients() -> None:
    assert "grad_2.0_norm.0.bias" in grad_norm(net(), 2, group_separator=".")
    assert grad_norm(nn.Linear(1, 1), 2) == {}


@pytest.mark.parametrize("norm_type", [0, -1.0, "nan"])
def test_not_a_norm(norm_type: Any) -> None:
    with pytest.raises(MisconfigurationException, match="norm_type"):
        grad_norm(net(), norm_type)
