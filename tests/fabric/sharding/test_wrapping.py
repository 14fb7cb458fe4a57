"""Which submodules are gathered one after the other.

Tests of ``treadle_fabric.strategies.sharding.wrapping``.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp.wrap import (
    CustomPolicy,
    ModuleWrapPolicy,
    always_wrap_policy,
    lambda_auto_wrap_policy,
    size_based_auto_wrap_policy,
    transformer_auto_wrap_policy,
)

from treadle_fabric import MisconfigurationException
from treadle_fabric.strategies.sharding.wrapping import modules_to_shard


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)
        self.dropout = nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.down(self.up(x)))


class Mixture(Block):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Block() for _ in range(2))


class Net(nn.Module):
    def __init__(self, kind: type[nn.Module] = Block, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.blocks = nn.ModuleList(kind() for _ in range(2))
        self.attention = nn.MultiheadAttention(4, 2)
        self.by_name = nn.ModuleDict({"a": nn.Linear(4, 4)})
        self.head = nn.Linear(4, 7)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return x


def names(model: nn.Module, policy: Any = None, ignored: Any = ()) -> list[str]:
    found = {id(m): name for name, m in model.named_modules()}
    return [found[id(m)] for m in modules_to_shard(model, policy, ignored)]


ALL = ["embed", *(f"blocks.{i}.{m}" for i in range(2) for m in ("up", "down")), "attention", "by_name.a", "head"]


def is_block(module: nn.Module) -> bool:
    return isinstance(module, Block)


def fsdp1(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
    return recurse or nonwrapped_numel > 70


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ({Block}, ["blocks.0", "blocks.1"]),
        (Block, ["blocks.0", "blocks.1"]),
        ([Block, nn.Embedding], ["embed", "blocks.0", "blocks.1"]),
        ({Block, nn.Linear}, ["blocks.0.up", "blocks.0.down", "blocks.0", "blocks.1.up", "blocks.1.down", "blocks.1",
                              "by_name.a", "head"]),
        (lambda m: isinstance(m, Block), ["blocks.0", "blocks.1"]),
        (lambda m: True, ["embed", "blocks.0.up", "blocks.0.down", "blocks.0", "blocks.1.up", "blocks.1.down",
                          "blocks.1", "attention", "by_name.a", "head"]),
        (always_wrap_policy, ["embed", "blocks.0.up", "blocks.0.down", "blocks.0", "blocks.1.up", "blocks.1.down",
                              "blocks.1", "attention", "by_name.a", "head"]),
        (fsdp1, ["blocks.0", "blocks.1", "attention"]),
        (functools.partial(size_based_auto_wrap_policy, min_num_params=70), ["blocks.0", "blocks.1"]),
        (functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={Block}), ["blocks.0", "blocks.1"]),
        (functools.partial(lambda_auto_wrap_policy, lambda_fn=is_block), ["blocks.0", "blocks.1"]),
        (ModuleWrapPolicy([Block]), ["blocks.0", "blocks.1"]),
        (CustomPolicy(lambda m: isinstance(m, Block)), ["blocks.0", "blocks.1"]),
        (None, ["blocks.0", "blocks.1"]),
    ],
)  # fmt: skip
def test_policies(policy: Any, expected: list[str]) -> None:
    """Not among them: containers, the projection in the attention, and what has no parameters."""
    assert names(Net(tied=False), policy) == expected


def test_blocks_of_the_default() -> None:
    assert names(Net(Mixture)) == ["blocks.0", "blocks.1"]  # a rank may call other experts than the others
    assert names(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))) == []
    assert names(nn.Sequential(Block(), Block(), nn.Linear(4, 1))) == ["0", "1"]
    assert names(nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 2)) == [
        "layers.0",
        "layers.1",
    ]
    assert names(nn.Sequential(nn.Sequential(Block(), Block()), nn.Sequential(Block()))) == ["0", "1"]


def test_tied_parameters_stay_in_one_group(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "treadle_fabric")
    assert names(Net(), {nn.Linear, nn.Embedding}) == [n for n in ALL if n not in ("embed", "head", "attention")]
    assert "'embed', 'head'" in caplog.text

    outer = nn.Sequential(Net(), nn.Linear(4, 4))
    assert names(outer, {nn.Embedding, Net}) == ["0"]  # which holds both places

    model = Net(tied=False)
    model.again = model.blocks[0].up  # a module in two places
    assert names(model, {Block, nn.Embedding}) == ["embed", "blocks.1"]
    model.again = model.blocks[0]  # a block that is called from two places is called
    assert names(model, {Block}) == ["blocks.0", "blocks.1"]
    model.mask = nn.Parameter(torch.ones(1))
    model.blocks[1].mask = model.mask
    assert names(model, {Block}) == ["blocks.0"]
    assert names(model, {Block}, {model.mask}) == ["blocks.0", "blocks.1"]  # nobody cuts it


def test_compiled_submodules_are_chosen_by_what_was_compiled() -> None:
    model = Net(tied=False)
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")  # type: ignore[assignment]
    for policy in (None, {Block}, lambda m: isinstance(m, Block)):
        found = modules_to_shard(torch.compile(model, backend="eager"), policy)  # type: ignore[arg-type]
        assert list(map(id, found)) == list(map(id, model.blocks))


def test_ignored_parameters() -> None:
    model = Net(tied=False)
    assert names(model, {nn.Embedding, Block}, {model.embed.weight}) == ["blocks.0", "blocks.1"]


@pytest.mark.parametrize(
    ("policy", "told"),
    [
        ({nn.Conv2d}, "policy={Conv2d}: Net has no module of this class"),
        ({type("Blok", (nn.Module,), {})}, "Did you mean 'Block'?"),
        ({nn.ModuleList}, "ModuleList is never called"),
        ({nn.Linear, nn.ModuleDict}, "ModuleDict is never called"),
        (set(), "no class in it"),
        ({"Block"}, "'Block' is no class of modules"),
        ({int}, "no class of modules"),
        (3, "policy=3 names no submodules"),
        ("Block", "policy='Block' names no submodules"),
        (lambda m: "yes", "must return True or False"),
        (CustomPolicy(lambda m: {"cpu_offload": True} if isinstance(m, Block) else False), "fully_shard"),
    ],
)
def test_refused(policy: Any, told: str) -> None:
    with pytest.raises(MisconfigurationException) as error:
        modules_to_shard(Net(), policy)
    assert told in str(error.value)
