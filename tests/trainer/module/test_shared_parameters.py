from __future__ import annotations

import torch
from torch import nn

from treadle.module.shared_parameters import find_shared_parameters, set_shared_parameters


class Tied(nn.Module):
    def __init__(self, tie: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.body = nn.ModuleDict({"head": nn.Linear(3, 5, bias=False), "copy": nn.Linear(3, 5, bias=False)})
        if tie:
            set_shared_parameters(self, [["embed.weight", "body.head.weight", "body.copy.weight"]])


def test_found_by_every_name() -> None:
    assert find_shared_parameters(Tied()) == [["embed.weight", "body.head.weight", "body.copy.weight"]]
    assert find_shared_parameters(Tied(tie=False)) == []


def test_a_module_held_twice() -> None:
    model = nn.Module()
    model.a = nn.Linear(2, 2)
    model.b = model.a
    assert find_shared_parameters(model) == [["a.weight", "b.weight"], ["a.bias", "b.bias"]]


def test_set_joins_what_was_separated() -> None:
    model = Tied(tie=False)
    assert set_shared_parameters(model, [["embed.weight", "body.head.weight"]]) is model
    with torch.no_grad():
        model.embed.weight.fill_(2.0)
    assert torch.equal(model.get_parameter("body.head.weight"), torch.full((5, 3), 2.0))
    assert len(list(model.parameters())) == 2
