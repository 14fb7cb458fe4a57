"""Meshes: the named dimensions along which processes work together."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from treadle_fabric.errors import MisconfigurationException

__all__ = ["check_mesh_size", "make_mesh"]


def make_mesh(device_type: str, sizes: Mapping[str, int]) -> Any:
    """Make the mesh of all processes.

    Args:
        device_type: Such as ``"cuda"``.
        sizes: The size of each dimension by name, the outermost first. Their product is the number of processes.

    Returns:
        A ``torch.distributed.device_mesh.DeviceMesh``.
    """
    from torch.distributed.device_mesh import init_device_mesh  # heavy

    return init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def check_mesh_size(sizes: Mapping[str, int], processes: int, remedy: str) -> None:
    """Refuse a mesh that has not the number of the processes.

    Raises:
        MisconfigurationException: The product of the sizes is another number.
    """
    if prod(sizes.values()) != processes:
        told = " x ".join(f"{name}={size}" for name, size in sizes.items())
        raise MisconfigurationException(
            f"{told} makes {prod(sizes.values())}, and there are {processes} processes. {remedy}"
        )
