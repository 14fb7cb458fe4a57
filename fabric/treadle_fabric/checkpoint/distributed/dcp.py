"""How torch.distributed.checkpoint is used: it moves tensors, and never pickles or unpickles anything.

Imported only where a sharded checkpoint is written, because torch.distributed.checkpoint takes long to import.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_saver import save

from treadle_fabric.checkpoint.folder.checksummed import checksummed_file, no_record_checksums

__all__ = ["RanksFailedError", "write_tensors"]


class RanksFailedError(Exception):
    """What all ranks raise where some of them failed; ``failures`` has the errors by rank."""

    def __init__(self, failures: Mapping[int, BaseException]) -> None:
        super().__init__(str(failures))
        self.failures = dict(failures)


def write_tensors(
    tensors: dict[str, Any], folder: str, process_group: Any | None, alone: bool
) -> tuple[dict[str, tuple[int, int]], dict[str, Any]]:
    """Write the tensors of this rank; every rank calls this.

    Returns:
        Size and CRC-32 of the files that this rank wrote; and for rank 0 where in the files of all ranks the tensors
        lie, as the manifest has it.

    Raises:
        RanksFailedError: On all ranks.
    """
    writer = _Writer(folder)
    with _failing_together():
        save(
            tensors,
            storage_writer=writer,
            planner=DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            process_group=process_group,
            no_dist=alone,
        )
    return writer.files.checksums, writer.places


@contextlib.contextmanager
def _failing_together() -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # it is meant
            yield
    except CheckpointException as e:  # no Exception, so that nothing else would catch it
        failures = {rank: wrapped[0] for rank, wrapped in e.failures.items()}
        for failure in failures.values():
            if isinstance(failure, KeyboardInterrupt | SystemExit | MemoryError):
                raise failure from e
        raise RanksFailedError(failures) from e


class _Writer(FileSystemWriter):
    """A writer that also keeps the checksums of the files and the places of the tensors in them."""

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        self.fs = self.files = _Files()
        self.places: dict[str, Any] = {}

    def write_data(self, plan: Any, planner: Any) -> Any:
        with no_record_checksums():
            return super().write_data(plan, planner)

    def storage_meta(self) -> StorageMeta | None:
        return StorageMeta(save_id=self.save_id)  # not the path, which is temporary

    def finish(self, metadata: Metadata, results: Any) -> None:
        super().finish(metadata, results)
        places: Mapping[MetadataIndex, _StorageInfo] = metadata.storage_data
        found = {(index.fqn, tuple(index.offset or ())): info for index, info in places.items()}
        for name, entry in metadata.state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata)
            self.places[name] = {
                "dtype": str(entry.properties.dtype).removeprefix("torch."),
                "shape": list(entry.size),
                "chunks": [
                    {
                        "offsets": list(chunk.offsets),
                        "sizes": list(chunk.sizes),
                        "file": (info := found[name, tuple(chunk.offsets)]).relative_path,
                        "start": info.offset,
                        "length": info.length,
                    }
                    for chunk in entry.chunks
                ],
            }


class _Files(FileSystem):
    """Local files whose checksums are computed while they are written."""

    def __init__(self) -> None:
        super().__init__()
        self.checksums: dict[str, tuple[int, int]] = {}

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        with checksummed_file(path, mode) as stream:
            yield stream
        name = os.path.basename(path).removesuffix(".tmp")  # it renames `.metadata.tmp`
        self.checksums[name] = stream.size, stream.crc
