"""Have a DeepSpeed engine write its files into a checkpoint folder of ours."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import torch
from torch import Tensor

from treadle_fabric.checkpoint.folder.checksummed import no_record_checksums
from treadle_fabric.checkpoint.folder.destination import Destination
from treadle_fabric.checkpoint.folder.layout import ENGINE_TAG, LATEST

__all__ = ["ZeroWriter"]

Files = dict[str, tuple[int, int]]


class ZeroWriter:
    """Writes the files of one engine.

    Args:
        engine: The ``DeepSpeedEngine``.
        without_frozen: Whether frozen parameters are left out.
    """

    def __init__(self, engine: Any, without_frozen: bool = False) -> None:
        self.engine, self._without_frozen = engine, without_frozen

    def write(self, destination: Destination) -> Files:
        """Write the files of this rank; every rank calls this."""
        engine, keeper = self.engine, _Keeper(destination)
        before, engine.checkpoint_engine = engine.checkpoint_engine, keeper
        try:
            with tempfile.TemporaryDirectory() as elsewhere:  # for scripts that DeepSpeed adds, which are not kept
                engine.save_checkpoint(
                    elsewhere, tag=ENGINE_TAG, save_latest=False, exclude_frozen_parameters=self._without_frozen
                )
        finally:
            engine.checkpoint_engine = before
        if keeper.error is not None:
            raise keeper.error
        if engine.global_rank == 0:
            with destination.file(LATEST) as stream:
                stream.write(ENGINE_TAG.encode())
            keeper.files[LATEST] = stream.size, stream.crc
        return keeper.files


class _Keeper:
    """What DeepSpeed calls to store a file: each goes into the folder that is being made, and its checksum is noted.

    An error is kept until all ranks have passed the barriers of DeepSpeed's save, which would wait for a rank that had
    left it.
    """

    name = "treadle"

    def __init__(self, destination: Destination) -> None:
        self._destination = destination
        self.files: Files = {}
        self.error: Exception | None = None

    def create(self, info: Any) -> None:
        """Called before the files. Nothing to do."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Called for each folder. The destination makes its own."""

    def save(self, state_dict: Any, path: str) -> None:
        """Write a file."""
        name = f"{ENGINE_TAG}/{os.path.basename(path)}"
        try:
            with self._destination.file(name) as stream, no_record_checksums():
                torch.save(_plain(state_dict), stream)
            self.files[name] = stream.size, stream.crc
        except Exception as error:
            self.error = self.error or error

    def load(self, path: str, map_location: Any = None) -> Any:
        """Never called: this object is in its place for one save."""
        raise NotImplementedError("Files are read by load_checkpoint of the strategy.")

    def commit(self, info: Any) -> bool:
        """Called after the files, which take their name only when all ranks have written theirs."""
        return True

    def is_data_parallel_writer(self, dp_rank: int) -> bool:
        """Whether this rank writes what all have."""
        return dp_rank == 0

    def is_decoupled(self) -> bool:
        """Whether files are written in the background: no."""
        return False

    def preserves_storage_sharing(self) -> bool:
        """Whether a view is written with all of the memory that it is a part of: so that DeepSpeed copies it before."""
        return True

    def cleanup(self) -> None:
        """Called at the end. Nothing to do."""


def _plain(state: Any) -> Any:
    """The same with plain dicts in the place of DeepSpeed's own, and tensors on the host."""
    if isinstance(state, Tensor):
        return state.detach().cpu() if state.device.type != "cpu" else state.detach()
    if type(state) is dict:
        return {key: _plain(value) for key, value in state.items()}
    return state
