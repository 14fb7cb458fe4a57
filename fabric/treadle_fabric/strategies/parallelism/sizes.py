"""The sizes of the dimensions of a mesh, from what was asked for."""

from __future__ import annotations

from typing import Any, Final, Literal

from treadle_fabric.checks import check_integer
from treadle_fabric.errors import MisconfigurationException

__all__ = ["Size", "check_sizes", "resolve_sizes"]

Size = int | Literal["auto"]
_MAY_BE_AUTO: Final = ("data_parallel_size", "data_shard_size", "tensor_parallel_size")


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
    """Find the size of each dimension, of sizes that :func:`check_sizes` returned.

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
        MisconfigurationException: The sizes contradict each other.
    """
    copies, parts = data_replicate_size, data_shard_size
    data: Any = data_parallel_size
    tensor: Any = tensor_parallel_size
    fixed = pipeline_parallel_size * sequence_parallel_size
    if parts != "auto":
        if data not in ("auto", copies * parts):
            raise MisconfigurationException(
                f"data_parallel_size={data} is not data_replicate_size={copies} times data_shard_size={parts}. Leave "
                "one of them out."
            )
        data = copies * parts
    if data == "auto" and tensor == "auto":
        data = num_nodes * copies if fixed == 1 else copies
    if data == "auto":
        data = max(1, processes // (fixed * tensor))
    if tensor == "auto":
        tensor = max(1, processes // (fixed * data))
    if data % copies:
        raise MisconfigurationException(
            f"There are {data} shares of a batch, which data_replicate_size={copies} does not divide. Give a"
            " data_replicate_size that divides data_parallel_size, or leave it out: one copy of the model."
        )
    return {
        "pipeline_parallel": pipeline_parallel_size,
        "data_replicate": copies,
        "data_shard": data // copies,
        "sequence_parallel": sequence_parallel_size,
        "tensor_parallel": tensor,
    }


def check_sizes(**sizes: Any) -> dict[str, Any]:
    """Return the sizes by the names of their arguments, as integers; of some, ``"auto"`` is allowed.

    Raises:
        MisconfigurationException: A size is no integer from 1.
    """
    return {
        name: size
        if name in _MAY_BE_AUTO and isinstance(size, str) and size == "auto"
        else check_integer(name, size, minimum=1, meaning="or 'auto'" if name in _MAY_BE_AUTO else "")
        for name, size in sizes.items()
    }
