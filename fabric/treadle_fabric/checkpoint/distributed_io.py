"""Checkpoints as folders that all ranks write together."""

from __future__ import annotations

from typing import Any

from treadle_fabric.checkpoint.io import CheckpointIO, SharedSaves
from treadle_fabric.checkpoint.reading import load_any, remove_any
from treadle_fabric.types import PathLike

__all__ = ["DistributedCheckpointIO"]


class DistributedCheckpointIO(CheckpointIO):
    """Checkpoints as folders that all ranks write at the same time, each its part, with torch.distributed.checkpoint.

    The folder is as safe as a file of :class:`TorchCheckpointIO`: it appears under its name whole or not at all, every
    byte of it is checked when it is read, and reading it unpickles nothing but tensors and plain containers. It can be
    read by any number of processes, by every CheckpointIO of this library, and with any strategy. All processes must
    reach the path: on several machines it has to be on a file system that they share, or a URL. At a URL every rank
    uploads its files as it makes them, below a name of their own, and the manifest that is written last puts all of
    them in the place of the checkpoint before.
    """

    @property
    def sharded(self) -> bool:
        return True

    @property
    def path_is_all(self) -> bool:
        return True

    @property
    def shared_saves(self) -> SharedSaves | None:
        from treadle_fabric.checkpoint.distributed.saving import ShardedSave  # most programs write files

        own = type(self).save_checkpoint is DistributedCheckpointIO.save_checkpoint  # else it does what we do not know
        return ShardedSave if own else None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: PathLike, storage_options: Any | None = None) -> None:
        """Write ``checkpoint`` to the folder ``path``; every rank calls this.

        Args:
            checkpoint: Best made of tensors and plain containers only, so that it loads with ``weights_only=True``.
            path: A local path or an fsspec URL. A checkpoint there is replaced, a folder with other things in it is
                not.
            storage_options: Arguments for the file system of a URL.

        Raises:
            CheckpointError: A rank could not write, and all ranks raise. An earlier checkpoint is untouched.
            MisconfigurationException: ``storage_options`` for a local path.
        """
        from treadle_fabric.checkpoint.distributed.saving import save_sharded  # most programs write files

        save_sharded(checkpoint, path, storage_options=storage_options)

    def load_checkpoint(
        self, path: PathLike, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read the checkpoint at ``path``, a folder or a file; the arguments are those of :class:`TorchCheckpointIO`.

        A process that calls this reads all of it; no other process takes part.
        """
        return load_any(path, map_location, weights_only)

    def remove_checkpoint(self, path: PathLike) -> None:
        remove_any(path)
