"""How torch.distributed.checkpoint is used: it moves tensors, and never pickles or unpickles anything.

Imported only where a sharded checkpoint is written or read, because torch.distributed.checkpoint takes long to import.
"""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from treadle_fabric.checkpoint.folder.checksummed import checksummed_file, no_record_checksums
from treadle_fabric.errors import CheckpointUnsafeError

__all__ = ["RanksFailedError", "read_tensors", "write_tensors"]


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


def read_tensors(
    tensors: dict[str, Any], folder: str, manifest: Mapping[str, Any], process_group: Any | None, alone: bool
) -> None:
    """Fill tensors in place, on each rank the parts that it holds.

    Raises:
        RanksFailedError: On all ranks.
    """
    with _failing_together():
        load(
            tensors,
            storage_reader=_Reader(folder, {name: manifest["tensors"][name] for name in tensors}),
            planner=_Planner(flatten_state_dict=False, flatten_sharded_tensors=False),
            process_group=process_group,
            no_dist=alone,
        )


@contextlib.contextmanager
def _failing_together() -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # it is meant
            warnings.filterwarnings("ignore", message="Detected pickle protocol")  # a damaged tensor is an error anyway
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


class _Reader(FileSystemReader):
    """A reader that takes the index from the manifest; the index in the folder is a pickle, and is never opened."""

    def __init__(self, folder: str, tensors: Mapping[str, Any]) -> None:
        super().__init__(folder)
        self._index = _index(tensors)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._index


class _Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        raise CheckpointUnsafeError(f"{read_item.dest_index.fqn!r} is no tensor, and nothing else is loaded this way.")


def _index(tensors: Mapping[str, Any]) -> Metadata:
    entries: dict[str, Any] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for name, entry in tensors.items():
        dtype = getattr(torch, entry["dtype"])
        chunks = [ChunkStorageMetadata(torch.Size(c["offsets"]), torch.Size(c["sizes"])) for c in entry["chunks"]]
        entries[name] = TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(entry["shape"]), chunks)
        for place, chunk in enumerate(entry["chunks"]):
            index = MetadataIndex(name, chunk["offsets"], place)
            places[index] = _StorageInfo(chunk["file"], chunk["start"], chunk["length"])
    return Metadata(entries, storage_data=places, storage_meta=StorageMeta())
