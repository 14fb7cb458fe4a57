"""The sizes of the dimensions of a mesh, from what was asked for."""

from __future__ import annotations

from typing import Literal

from treadle_fabric.checks import check_integer
from treadle_fabric.errors import MisconfigurationException

__all__ = ["Size", "resolve_sizes"]

Size = int | Literal["auto"]


def resolve_sizes(
    processes: int,
    num_nodes: int,
    *,
    data_parallel_size: Size,
    tensor_parallel_size: Size,
    data_replicate_size: int,
    data_shard_size: Size,
    sequence_parallel_size: int,
    pipeline_parallel_size: int,
) -> dict[str, int]:
    """Find the size of each dimension.

    Where neither the data nor the tensor size is given, the processes of a machine share each layer, and each machine
    has a share of the batch.

    Args:
        processes: The number of all processes.
        num_nodes: The number of machines.
        data_parallel_size: Shares of a batch: ``data_replicate_size`` times ``data_shard_size``.
        tensor_parallel_size: Processes that share each layer.
        data_replicate_size: Copies of the model.
        data_shard_size: Processes that share the parameters of one copy.
        sequence_parallel_size: Processes that share each sequence.
        pipeline_parallel_size: Parts of the model that come one after the other.

    Returns:
        The sizes by the names of the dimensions, the outermost first.

    Raises:
        MisconfigurationException: A size is no integer from 1, or their product is not the number of processes.
    """
    given: dict[str, Size] = {
        "pipeline_parallel": pipeline_parallel_size,
        "data_parallel": data_parallel_size,
        "data_replicate": data_replicate_size,
        "data_shard": data_shard_size,
        "sequence_parallel": sequence_parallel_size,
        "tensor_parallel": tensor_parallel_size,
    }
    sizes = {
        name: size if size == "auto" else check_integer(f"{name}_size", size, minimum=1) for name, size in given.items()
    }
    copies, parts, tensor = sizes["data_replicate"], sizes["data_shard"], sizes["tensor_parallel"]
    data = sizes["data_parallel"]
    fixed = _int(sizes["pipeline_parallel"]) * _int(sizes["sequence_parallel"])
    if parts != "auto":
        if data not in ("auto", _int(copies) * parts):
            raise MisconfigurationException(
                f"data_parallel_size={data} is not data_replicate_size={copies} times data_shard_size={parts}. Leave "
                "one of them out."
            )
        data = _int(copies) * parts
    if data == "auto" and tensor == "auto":
        data = num_nodes * _int(copies) if fixed == 1 else _int(copies)
    if data == "auto":
        data = processes // (fixed * _int(tensor))
    if tensor == "auto":
        tensor = processes // (fixed * data)
    if data % _int(copies):
        raise MisconfigurationException(f"data_parallel_size={data} is not divisible by data_replicate_size={copies}.")
    return {
        "pipeline_parallel": _int(sizes["pipeline_parallel"]),
        "data_replicate": _int(copies),
        "data_shard": data // _int(copies),
        "sequence_parallel": _int(sizes["sequence_parallel"]),
        "tensor_parallel": tensor,
    }


def _int(size: Size) -> int:
    assert size != "auto"
    return size
