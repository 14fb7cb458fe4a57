"""Checkpoints as folders that all ranks write together."""

from __future__ import annotations

from typing import Any, ClassVar

from treadle_fabric.checkpoint.distributed.saving import save_sharded
from treadle_fabric.checkpoint.io import CheckpointIO
from treadle_fabric.checkpoint.reading import load_any, remove_any
from treadle_fabric.errors import MisconfigurationException
from treadle_fabric.types import PathLike

__all__ = ["DistributedCheckpointIO"]


class DistributedCheckpointIO(CheckpointIO):
    """Checkpoints as folders that all ranks write at the same time, each its part, with torch.distributed.checkpoint.

    The folder is as safe as a file of :class:`TorchCheckpointIO`: it appears under its name whole or not at all, every
    byte of it is checked when it is read, and reading it unpickles nothing but tensors and plain containers. It can be
    read by any number of processes, by every CheckpointIO of this library, and with any strategy. All processes must
    reach the path: on several machines it has to be on a file system that they share.
    """

    sharded: ClassVar[bool] = True

    def save_checkpoint(self, checkpoint: dict[str, Any], path: PathLike, storage_options: Any | None = None) -> None:
        """Write ``checkpoint`` to the folder ``path``; every rank calls this.

        Args:
            checkpoint: Best made of tensors and plain containers only, so that it loads with ``weights_only=True``.
            path: A local path. A checkpoint there is replaced, a folder with other things in it is not.
            storage_options: None; remote paths are refused.

        Raises:
            CheckpointError: A rank could not write, and all ranks raise. An earlier checkpoint is untouched.
            MisconfigurationException: ``path`` is remote, or ``storage_options`` are given.
        """
        if storage_options:
            raise MisconfigurationException(
                f"storage_options={storage_options!r} are for remote paths, and sharded checkpoints are written to "
                "local ones only. Leave them out."
            )
        save_sharded(checkpoint, path)

    def load_checkpoint(
        self, path: PathLike, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read the checkpoint at ``path``, a folder or a file; the arguments are those of :class:`TorchCheckpointIO`.

        A process that calls this reads all of it; no other process takes part.
        """
        return load_any(path, map_location, weights_only)

    def remove_checkpoint(self, path: PathLike) -> None:
        remove_any(path)
