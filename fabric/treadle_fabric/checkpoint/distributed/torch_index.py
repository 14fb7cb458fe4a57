"""The index by which torch's own tools read a checkpoint folder. It is a pickle, and is never read here.

Imported only where a folder with large tensors is written, because torch.distributed.checkpoint takes long to import.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

__all__ = ["index_of"]


def index_of(tensors: Mapping[str, Any]) -> Metadata:
    """Make the index from the entry ``tensors`` of a manifest."""
    entries: dict[str, Any] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for name, entry in tensors.items():
        properties = TensorProperties(dtype=getattr(torch, entry["dtype"]))
        chunks = [ChunkStorageMetadata(torch.Size(c["offsets"]), torch.Size(c["sizes"])) for c in entry["chunks"]]
        entries[name] = TensorStorageMetadata(properties, torch.Size(entry["shape"]), chunks)
        for place, chunk in enumerate(entry["chunks"]):
            index = MetadataIndex(name, chunk["offsets"], place)
            places[index] = _StorageInfo(chunk["file"], chunk["start"], chunk["length"])
    version = getattr(filesystem, "CURRENT_DCP_VERSION", None)  # older releases of torch have none
    return Metadata(entries, storage_data=places, storage_meta=StorageMeta(), version=version)
