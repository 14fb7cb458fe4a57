"""The table of layouts: how processes share a model and its batches. Each engine is a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.equality.model import Block
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from treadle_fabric.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy

__all__ = ["LAYOUTS", "Layout"]


@dataclass(frozen=True)
class Layout:
    """A strategy on a number of processes.

    Args:
        name: Its name.
        processes: The number of processes.
        strategy: Makes it.
        passes: Forward passes of a batch: the micro-batches of a pipeline.
    """

    name: str
    processes: int
    strategy: Callable[[], Any]
    passes: int = 1


def share_blocks_out(model: nn.Module, mesh: Any) -> nn.Module:
    """Let the processes of the tensor dimension share the wide layers."""
    for block in [m for m in model.modules() if isinstance(m, Block)]:
        parallelize_module(block, mesh["tensor_parallel"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return model


def tensor_parallel(**sizes: Any) -> Callable[[], Any]:
    return lambda: ModelParallelStrategy(share_blocks_out, tensor_parallel_size=2, **sizes)


def sequence(**sizes: Any) -> Callable[[], Any]:
    sizes = {"data_parallel_size": 1, "tensor_parallel_size": 1, **sizes}
    return lambda: ModelParallelStrategy(sequence_parallel_size=2, **sizes)


def pipeline(**arguments: Any) -> Callable[[], Any]:
    arguments = {"data_parallel_size": 1, "tensor_parallel_size": 1, "pipeline_microbatches": PARTS, **arguments}
    return lambda: ModelParallelStrategy(pipeline_parallel_size=2, **arguments)


def fsdp(**arguments: Any) -> Callable[[], Any]:
    return lambda: FSDPStrategy(**arguments)


PARTS = 2
HYBRID = {"sharding_strategy": "HYBRID_SHARD", "device_mesh": (2, 2)}
LAYOUTS = [
    Layout("single", 1, lambda: "auto"),
    Layout("fsdp1", 1, fsdp()),
    Layout("ddp2", 2, lambda: "ddp"),
    Layout("ddp2_static", 2, lambda: DDPStrategy(static_graph=True, gradient_as_bucket_view=True)),
    Layout("fsdp2", 2, fsdp()),
    Layout("fsdp2_policy", 2, fsdp(policy={Block})),
    Layout("fsdp2_root_only", 2, fsdp(policy=lambda module: False)),
    Layout("fsdp2_grad_op", 2, fsdp(policy={Block}, sharding_strategy="SHARD_GRAD_OP")),
    Layout("fsdp2_recompute", 2, fsdp(policy={Block}, activation_checkpointing=Block)),
    Layout("fsdp2_offload", 2, lambda: "fsdp_cpu_offload"),
    Layout("fsdp2_full", 2, fsdp(state_dict_type="full")),
    Layout("tensor2", 2, tensor_parallel(data_parallel_size=1)),
    Layout("sequence2", 2, sequence()),
    Layout("pipeline2", 2, pipeline(), PARTS),
    Layout(
        "pipeline2_interleaved", 2, pipeline(pipeline_schedule="interleaved", save_distributed_checkpoint=False), PARTS
    ),
    Layout("ddp4", 4, lambda: "ddp"),
    Layout("fsdp4", 4, fsdp()),
    Layout("hybrid4", 4, fsdp(policy={Block}, **HYBRID)),
    Layout("tensor2_fsdp2", 4, tensor_parallel(data_parallel_size=2, policy={Block})),
    Layout("tensor2_replicate2", 4, tensor_parallel(data_replicate_size=2)),
    Layout("sequence2_fsdp2", 4, sequence(data_parallel_size=2, policy={Block})),
    Layout("sequence2_tensor2", 4, tensor_parallel(data_parallel_size=1, sequence_parallel_size=2)),
    Layout("pipeline2_fsdp2", 4, pipeline(data_parallel_size=2), PARTS),
    Layout("fsdp3", 3, fsdp()),
]
