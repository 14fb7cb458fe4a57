"""Checkpoints of what lies on devices of XLA, which are read without them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from treadle_fabric.checkpoint.distributed.split import map_leaves
from treadle_fabric.checkpoint.io import CheckpointIO
from treadle_fabric.checkpoint.torch_io import TorchCheckpointIO
from treadle_fabric.checks import require_package
from treadle_fabric.types import PathLike

__all__ = ["XLACheckpointIO", "on_host"]


class XLACheckpointIO(CheckpointIO):
    """Single files as :class:`TorchCheckpointIO` writes; tensors on devices of XLA come to the host first.

    The strategies for XLA bring tensors to the host for every checkpoint IO. This class is for those who call its
    methods themselves.

    Raises:
        MissingPackageError: torch-xla is not installed.
    """

    def __init__(self) -> None:
        require_package("torch_xla", "XLACheckpointIO", "xla", "Its last release, 2.9, goes with torch 2.9.")
        self._files = TorchCheckpointIO()

    @property
    def path_is_all(self) -> bool:
        return True

    def save_checkpoint(self, checkpoint: dict[str, Any], path: PathLike, storage_options: Any | None = None) -> None:
        """Write ``checkpoint`` to ``path``, with its tensors on the CPU."""
        self._files.save_checkpoint(on_host(checkpoint), path, storage_options)

    def load_checkpoint(
        self, path: PathLike, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read the checkpoint at ``path``; by default everything comes to the CPU."""
        return self._files.load_checkpoint(path, map_location, weights_only)

    def remove_checkpoint(self, path: PathLike) -> None:
        """Delete the checkpoint at ``path``; nothing happens if there is none."""
        self._files.remove_checkpoint(path)


def on_host(data: Any) -> Any:
    """Return the same containers, with copies on the CPU of what is on devices of XLA, in one transfer.

    A file with such copies is read by any process, with torch-xla or without.
    """
    found: dict[int, Tensor] = {}

    def note(value: Any, path: str) -> Any:
        if isinstance(value, Tensor) and value.device.type == "xla":
            found[id(value)] = value
        return value

    map_leaves(data, note, "")
    if not found:
        return data
    import torch_xla  # an extra

    # Everything that is recorded: run for some tensors alone, an operation in place would take the memory of others.
    # Not `sync()`, which moves the random state on: a resumed run would draw other numbers than this one
    torch_xla._XLAC._xla_sync_live_tensors("xla:0", [], True)
    tensors = [tensor.detach() for tensor in found.values()]
    torch_xla._XLAC._xla_sync_multi(tensors, devices=[], wait=True, sync_xla_data=True)
    copies = dict(zip(found, torch_xla._XLAC._xla_get_cpu_tensors(tensors), strict=True))
    return map_leaves(data, lambda value, path: copies.get(id(value), value), "")
