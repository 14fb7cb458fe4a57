"""Checkpoints as single files, written by one process."""

from __future__ import annotations

from typing import Any

from treadle_fabric.checkpoint.io import CheckpointIO
from treadle_fabric.checkpoint.reading import load_any, remove_any
from treadle_fabric.checkpoint.torch_file import save_file
from treadle_fabric.types import PathLike

__all__ = ["TorchCheckpointIO"]


class TorchCheckpointIO(CheckpointIO):
    """Checkpoints as single ``torch.save`` files, on a local disk or on anything that fsspec reaches.

    A save goes to a temporary file in the same folder, is flushed to the disk, and is then renamed. If a full disk, a
    signal or a lost machine ends the save early, an earlier checkpoint of that name is left as it was.
    """

    @property
    def path_is_all(self) -> bool:
        return True

    def save_checkpoint(self, checkpoint: dict[str, Any], path: PathLike, storage_options: Any | None = None) -> None:
        """Write ``checkpoint`` to ``path``; missing parent folders are made.

        Args:
            checkpoint: Best made of tensors and plain containers only, so that it loads with ``weights_only=True``.
            path: A local path or an fsspec URL.
            storage_options: Arguments for the file system of a URL.

        Raises:
            CheckpointError: It could not be written. The temporary file is gone, an earlier checkpoint is untouched.
            MisconfigurationException: ``storage_options`` for a local path.
        """
        save_file(checkpoint, path, storage_options)

    def load_checkpoint(
        self, path: PathLike, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read the checkpoint at ``path``, after making sure that it is whole.

        Args:
            path: A local path or an fsspec URL. A folder that :class:`DistributedCheckpointIO` wrote is read whole.
            map_location: As in :func:`torch.load`. Default: everything comes to the CPU.
            weights_only: Only an explicit False lets the file run code of its own; None means True.

        Raises:
            CheckpointNotFoundError: Nothing lies at ``path``.
            CheckpointCorruptError: It is truncated, damaged, or no checkpoint.
            CheckpointUnsafeError: It holds other objects than tensors and plain containers.
            CheckpointError: It cannot be read or restored for another reason.
        """
        return load_any(path, map_location, weights_only)

    def remove_checkpoint(self, path: PathLike) -> None:
        """Delete the file, or the folder of a sharded checkpoint, at ``path``; nothing happens if there is none.

        Raises:
            CheckpointError: It is there and cannot be deleted, or it is a folder with more in it than a checkpoint.
        """
        remove_any(path)
