"""How torch.distributed.checkpoint is used to read: it moves tensors, and never unpickles anything.

Imported only where a sharded checkpoint is read, because torch.distributed.checkpoint takes long to import.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_loader import load

from treadle_fabric.checkpoint.distributed.torch_index import index_of
from treadle_fabric.errors import CheckpointUnsafeError

__all__ = ["RanksFailedError", "read_tensors"]


class RanksFailedError(Exception):
    """What all ranks raise where some of them failed; ``failures`` has the errors by rank."""

    def __init__(self, failures: Mapping[int, BaseException]) -> None:
        super().__init__(str(failures))
        self.failures = dict(failures)


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


class _Reader(FileSystemReader):
    """A reader that takes the index from the manifest; the index in the folder is a pickle, and is never opened."""

    def __init__(self, folder: str, tensors: Mapping[str, Any]) -> None:
        super().__init__(folder)
        self._index = index_of(tensors)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._index


class _Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        raise CheckpointUnsafeError(f"{read_item.dest_index.fqn!r} is no tensor, and nothing else is loaded this way.")
