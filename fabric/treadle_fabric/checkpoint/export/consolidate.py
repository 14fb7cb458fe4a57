"""One file out of a checkpoint folder."""

from __future__ import annotations

import contextlib
import os
import tempfile
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import Parameter

from treadle_fabric.checkpoint.export.safetensors_file import check_dtypes, write_safetensors
from treadle_fabric.checkpoint.export.weights import weights_in
from treadle_fabric.checkpoint.folder.names import hidden_beside
from treadle_fabric.checkpoint.folder.placing import put_in_place
from treadle_fabric.checkpoint.folder.source import FolderSource
from treadle_fabric.checkpoint.host.mapping import files_mapped
from treadle_fabric.checkpoint.reading import folder_at, read_folder
from treadle_fabric.checkpoint.stored.regions import fill
from treadle_fabric.checkpoint.stored.tensor import StoredTensor, tensors_on_demand
from treadle_fabric.checkpoint.torch_file import load_file, reason_of, save_file
from treadle_fabric.checkpoint.values.unpacking import merge_parts
from treadle_fabric.containers import map_leaves
from treadle_fabric.errors import CheckpointError, MisconfigurationException
from treadle_fabric.types import PathLike

__all__ = ["consolidate"]
_WEIGHTS: Final = ".safetensors"
_Choice = tuple[str | None, torch.dtype | None, str]
"""``key``, ``dtype`` and ``strip_prefix`` of :func:`consolidate`."""


def consolidate(
    path: PathLike,
    output: PathLike | None = None,
    *,
    key: str | None = None,
    dtype: torch.dtype | None = None,
    strip_prefix: str = "",
) -> tuple[str, list[str]]:
    """Make one file out of a checkpoint folder, with little memory.

    Args:
        path: The folder, on a disk or behind a URL. A single file is taken as well, for its weights.
        output: The local file to write, which must not be there. A name that ends in ``.safetensors`` gets the weights
            of the model only; any other gets all that the folder holds, as :class:`TorchCheckpointIO` writes it.
            Default: the name of the folder with ``.consolidated`` behind it.
        key: For weights: the entry that holds them; see :func:`weights_in`.
        dtype: For weights: what tensors of floating-point numbers become. Default: what they are.
        strip_prefix: For weights: what names lose where they begin with it.

    Returns:
        The path of the file, and what could not be taken over.

    Raises:
        CheckpointError: The folder cannot be read, or the file cannot be written.
        MisconfigurationException: The file is there already, or the arguments contradict each other.
    """
    where = f"{os.fspath(path).rstrip('/')}.consolidated" if output is None else os.fspath(output)
    weights = where.endswith(_WEIGHTS)
    if "://" in where:
        raise MisconfigurationException(f"{where!r} is a URL, and the file is written to a local path. Give one.")
    if os.path.lexists(where):
        raise MisconfigurationException(f"{where!r} is there already. Remove it, or give another output file.")
    if not weights and (key is not None or dtype is not None or strip_prefix):
        raise MisconfigurationException(
            f"key, dtype and strip_prefix are for weights alone, and {where!r} gets the whole checkpoint. Give an "
            f"output file whose name ends in {_WEIGHTS!r}, or leave them out."
        )
    source = folder_at(path)
    if source is None and not weights:
        load_file(path, map_location="meta")  # says it if nothing is there
        raise CheckpointError(
            f"{os.fspath(path)!r} is one file already, and no folder: load it as it is. For a file of the weights"
            f" alone, name an output that ends in {_WEIGHTS!r}."
        )
    try:
        with files_mapped(), tensors_on_demand():  # the content ends inside of the call
            return where, _write(path, source, where, (key, dtype, strip_prefix) if weights else None)
    except OSError as e:
        raise CheckpointError(f"{where!r} was not written: {reason_of(e)}.") from e


def _write(path: PathLike, source: FolderSource | None, where: str, weights: _Choice | None) -> list[str]:
    """Write the file; returns what could not be taken over."""
    content: Any = load_file(path) if source is None else read_folder(source, "cpu", packed=True)
    os.makedirs(os.path.dirname(os.path.abspath(where)), exist_ok=True)
    return _write_all(content, where) if weights is None else _write_weights(content, path, where, *weights)


def _write_weights(
    content: Any, path: PathLike, where: str, key: str | None, dtype: torch.dtype | None, strip_prefix: str
) -> list[str]:
    found = weights_in(content, os.fspath(path), key, strip_prefix)
    check_dtypes(found.tensors, dtype)
    temporary = hidden_beside(os.path.abspath(where), "tmp")
    try:
        with open(temporary, "xb") as file:
            write_safetensors(file, found.tensors, dtype, found.metadata)
            file.flush()
            os.fsync(file.fileno())
        put_in_place(temporary, os.path.abspath(where))
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)
    return found.left_out


def _write_all(content: Any, where: str) -> list[str]:
    whole, left_out = merge_parts(content)
    folder = os.path.dirname(os.path.abspath(where))
    with tempfile.TemporaryDirectory(prefix=".consolidating-", dir=folder) as spool:
        made: dict[int, Tensor] = {}

        def on_disk(value: Any) -> Any:
            if not isinstance(value, StoredTensor):
                return value
            if id(value) not in made:
                made[id(value)] = _spooled(value, spool)
            return made[id(value)]

        save_file(map_leaves(whole, on_disk), where)
    return left_out


def _spooled(stored: StoredTensor, folder: str) -> Tensor:
    """A stored tensor whose memory is a file, so that it takes none of the process's own."""
    descriptor, name = tempfile.mkstemp(dir=folder)
    os.close(descriptor)
    size = stored.numel() * stored.element_size()
    memory: Any = torch.UntypedStorage.from_file(name, shared=True, nbytes=size)
    os.remove(name)  # the map stays
    tensor = torch.empty(0, dtype=stored.dtype, device="cpu").set_(memory, 0, stored.shape)  # type: ignore[call-overload]
    fill(tensor, stored)
    return Parameter(tensor, stored.requires_grad) if isinstance(stored, Parameter) else tensor
