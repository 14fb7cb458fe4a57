"""The arguments of FSDPStrategy, as a table.

Tests of ``treadle_fabric.strategies.sharding.arguments``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import (
    BackwardPrefetch,
    CPUOffload,
    CPUOffloadPolicy,
    MixedPrecision,
    MixedPrecisionPolicy,
    OffloadPolicy,
    ShardingStrategy,
)

from treadle_fabric import MisconfigurationException
from treadle_fabric.errors import UnknownArgumentError
from treadle_fabric.strategies.sharding.arguments import Dtypes, ShardingOptions, dtypes_for, parse_arguments

half, single = torch.bfloat16, torch.float32
layer = nn.Linear(2, 2)
MM = torch.ops.aten.mm.default


def decide(module: nn.Module) -> bool:
    return False


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {}),
        ({"policy": {nn.Linear}}, {"policy": {nn.Linear}}),
        ({"auto_wrap_policy": decide}, {"policy": decide}),
        ({"cpu_offload": True}, {"offload": True}),
        ({"cpu_offload": False}, {}),
        ({"cpu_offload": CPUOffload(offload_params=True)}, {"offload": True}),
        ({"cpu_offload": CPUOffload(offload_params=False)}, {}),
        ({"cpu_offload": CPUOffloadPolicy(pin_memory=False)}, {"offload": True, "pin_memory": False}),
        ({"cpu_offload": OffloadPolicy()}, {}),
        ({"mixed_precision": MixedPrecisionPolicy(half, single)}, {"dtypes": Dtypes(half, single, None, True)}),
        (
            {"mixed_precision": MixedPrecision(half, single, half)},
            {"dtypes": Dtypes(half, single, None, True, half)},
        ),
        (
            {"mixed_precision": MixedPrecision(half, cast_root_forward_inputs=False)},
            {"dtypes": Dtypes(half, None, None, False, None)},
        ),
        ({"sharding_strategy": "full_shard"}, {}),
        ({"sharding_strategy": "SHARD_GRAD_OP"}, {"reshard_after_forward": False}),
        ({"sharding_strategy": "SHARD_GRAD_OP", "reshard_after_forward": False}, {"reshard_after_forward": False}),
        ({"sharding_strategy": ShardingStrategy.SHARD_GRAD_OP}, {"reshard_after_forward": False}),
        ({"sharding_strategy": "HYBRID_SHARD"}, {"hybrid": True}),
        ({"sharding_strategy": "HYBRID_SHARD", "device_mesh": [2, 4]}, {"hybrid": True, "mesh": (2, 4)}),
        (
            {"sharding_strategy": ShardingStrategy._HYBRID_SHARD_ZERO2, "device_mesh": (2, 4)},
            {"hybrid": True, "mesh": (2, 4), "reshard_after_forward": False},
        ),
        ({"device_mesh": (4,)}, {"mesh": (4,)}),
        ({"reshard_after_forward": 2}, {"reshard_after_forward": 2}),
        ({"state_dict_type": "full"}, {"state_dict_type": "full"}),
        ({"activation_checkpointing": nn.Linear}, {"recomputes": True, "recompute_policy": nn.Linear}),
        ({"activation_checkpointing": [nn.Linear]}, {"recomputes": True, "recompute_policy": [nn.Linear]}),
        ({"activation_checkpointing": True}, {"recomputes": True}),
        ({"activation_checkpointing": False}, {}),
        ({"activation_checkpointing_policy": decide}, {"recomputes": True, "recompute_policy": decide}),
        ({"activation_checkpointing_saves": [MM]}, {"recomputes": True, "recompute_saved": (MM,)}),
        ({"use_orig_params": True, "limit_all_gathers": True, "sync_module_states": True}, {}),
        ({"backward_prefetch": BackwardPrefetch.BACKWARD_PRE, "forward_prefetch": False}, {}),
        ({"param_init_fn": None, "process_group": None, "device_id": None, "ignored_states": None}, {}),
        ({"ignored_parameters": [layer.weight]}, {"ignored": (layer.weight,)}),
        ({"ignored_modules": layer}, {"ignored": (layer,)}),
        ({"ignored_params": {layer.bias}}, {"ignored": (layer.bias,)}),
        ({"ignored_states": [layer]}, {"ignored": (layer,)}),
    ],
)
def test_options(given: dict[str, Any], expected: dict[str, Any]) -> None:
    assert parse_arguments(**given) == ShardingOptions(**expected)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"sharding_strategy": "NO_SHARD"}, "strategy='ddp'"),
        ({"sharding_strategy": ShardingStrategy.NO_SHARD}, "strategy='ddp'"),
        ({"sharding_strategy": "FULLSHARD"}, "Did you mean 'FULL_SHARD'"),
        ({"sharding_strategy": 3}, "FULL_SHARD"),
        ({"sharding_strategy": "SHARD_GRAD_OP", "reshard_after_forward": True}, "leave one of the two out"),
        ({"reshard_after_forward": "yes"}, "True, False, or the number of ranks"),
        ({"reshard_after_forward": 0}, "True, False, or the number of ranks"),
        ({"state_dict_type": "local"}, "'sharded'"),
        ({"device_mesh": (2, 4)}, "sharding_strategy='HYBRID_SHARD'"),
        ({"sharding_strategy": "HYBRID_SHARD", "device_mesh": (4,)}, "(replicate, shard)"),
        ({"device_mesh": (0,)}, "sizes of its dimensions"),
        ({"device_mesh": (True,)}, "sizes of its dimensions"),
        ({"device_mesh": ()}, "sizes of its dimensions"),
        ({"device_mesh": 4}, "sizes of its dimensions"),
        ({"auto_wrap_policy": {nn.Linear}, "policy": {nn.Linear}}, "give one"),
        ({"activation_checkpointing": nn.Linear, "activation_checkpointing_policy": decide}, "give one"),
        ({"cpu_offload": "yes"}, "CPUOffloadPolicy()"),
        ({"mixed_precision": half}, "MixedPrecisionPolicy(...)"),
        ({"mixed_precision": MixedPrecision(keep_low_precision_grads=True)}, "precision='bf16-true'"),
        ({"use_orig_params": False}, "leave the argument out"),
        ({"limit_all_gathers": False}, "leave the argument out"),
        ({"sync_module_states": False}, "weights of rank 0"),
        ({"forward_prefetch": True}, "set_modules_to_forward_prefetch"),
        ({"backward_prefetch": BackwardPrefetch.BACKWARD_POST}, "set_modules_to_backward_prefetch"),
        ({"param_init_fn": print}, "reset_parameters()"),
        ({"process_group": object()}, "device_mesh"),
        ({"device_id": 0}, "devices="),
        ({"ignored_modules": ["head"]}, "must be parameters or modules"),
    ],
)
def test_refused(given: dict[str, Any], told: str) -> None:
    with pytest.raises(MisconfigurationException) as error:
        parse_arguments(**given)
    assert told in str(error.value)


def test_unknown() -> None:
    with pytest.raises(UnknownArgumentError, match="Did you mean 'cpu_offload'"):
        parse_arguments(cpu_ofload=True)


@pytest.mark.parametrize(
    ("precision", "given", "expected"),
    [
        ("32-true", None, Dtypes()),
        ("64-true", None, Dtypes()),
        ("bf16-mixed", None, Dtypes()),  # autocast finds weights in single precision, as under DDP
        ("16-mixed", None, Dtypes()),
        ("bf16-true", None, Dtypes(reduce_dtype=single)),
        ("16-true", None, Dtypes(reduce_dtype=single)),
        ("32-true", Dtypes(half, single), Dtypes(half, single)),
    ],
)
def test_dtypes(precision: str, given: Dtypes | None, expected: Dtypes) -> None:
    found = dtypes_for(precision, given)
    assert found == expected
    assert found.policy() == MixedPrecisionPolicy(
        found.param_dtype, found.reduce_dtype, found.output_dtype, found.cast_forward_inputs
    )


def test_offload_policy() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert type(ShardingOptions().offload_policy(cuda)) is OffloadPolicy
    assert not ShardingOptions(offload=True).offload_policy(cpu).pin_memory
    assert ShardingOptions(offload=True).offload_policy(cuda).pin_memory
    assert not ShardingOptions(offload=True, pin_memory=False).offload_policy(cuda).pin_memory
    assert ShardingOptions(ignored=(layer, layer.weight)).ignored_parameters() == {layer.weight, layer.bias}
