"""Read a checkpoint folder: everything at once, or its tensors when they are used."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from treadle_fabric.checkpoint.distributed.split import map_leaves
from treadle_fabric.checkpoint.folder.layout import PLAIN, rank_file, unmixed
from treadle_fabric.checkpoint.folder.manifest import read_manifest, verify
from treadle_fabric.checkpoint.folder.source import FolderSource
from treadle_fabric.checkpoint.host.checked import is_checked, set_checked
from treadle_fabric.checkpoint.per_rank import RankParts, on_demand
from treadle_fabric.checkpoint.stored.tensor import Content, StoredTensor, stored_tensors
from treadle_fabric.checkpoint.torch_file import load_file
from treadle_fabric.checkpoint.values.unpacking import unpack_alone
from treadle_fabric.errors import CheckpointCorruptError, CheckpointError

__all__ = ["files_at_once", "load_folder"]


def load_folder(
    source: FolderSource, map_location: Any | None = None, weights_only: bool | None = None, *, packed: bool = False
) -> dict[str, Any]:
    """Read all of a folder, in this process alone; arguments and errors as in :class:`TorchCheckpointIO`.

    With ``packed``, what ranks had of their own is left as ``pack`` made it, for another file.
    Inside of ``tensors_on_demand()`` its large tensors on the CPU are read later, and inside of ``parts_on_demand()``
    what each rank had of its own.
    """
    return unmixed(source.identity, source.name, lambda: _load(source, map_location, weights_only, packed))


def _load(source: FolderSource, map_location: Any | None, weights_only: bool | None, packed: bool) -> dict[str, Any]:
    present = source.identity()
    manifest = read_manifest(source)
    if not is_checked(present):
        verify(source, manifest, files_at_once(manifest))
    if source.identity() == present:
        set_checked(present)
    content = _load_plain(source, present, manifest, map_location, weights_only, packed)
    found = {id(s): _tensor(source, present, manifest["tensors"][n], s) for n, s in content["tensors"].items()}
    if kept := content.get("engine"):
        from treadle_fabric.checkpoint.zero.ours import engine_tensors  # few folders have DeepSpeed's files

        found.update(engine_tensors(source, manifest["files"], kept))
    state: dict[str, Any] = map_leaves(content["state"], lambda value, _: found.get(id(value), value), "")
    return state


def files_at_once(manifest: Mapping[str, Any]) -> list[str]:
    """The files that are checked when a folder is opened; inside of ``parts_on_demand()`` not those of single ranks."""
    return [name for name in manifest["files"] if not (on_demand() and name.startswith("rank_"))]


def _tensor(
    source: FolderSource, present: tuple[int, ...] | None, entry: Mapping[str, Any], stand_in: Tensor
) -> Tensor:
    """What takes the place of a stand-in: its content, on its device, or what reads the content later."""
    content = Content(source, entry, stand_in.dtype, present)
    found: Tensor
    if stand_in.device.type == "cpu" and stored_tensors():
        found = StoredTensor(content)
    else:
        found = torch.empty(stand_in.shape, dtype=stand_in.dtype, device=stand_in.device)
        if not found.is_meta:
            content.fill(found, [0] * found.dim())
    return Parameter(found, stand_in.requires_grad) if isinstance(stand_in, Parameter) else found


def _load_plain(
    source: FolderSource,
    present: tuple[int, ...] | None,
    manifest: Mapping[str, Any],
    map_location: Any,
    weights_only: bool | None,
    packed: bool,
) -> dict[str, Any]:
    """The content of the file of plain values, with stand-ins in the place of the large tensors."""
    path = source.name
    content: Any = load_file(source.path_of(PLAIN), map_location, weights_only)
    tensors = content.get("tensors") if isinstance(content, dict) else None
    if not isinstance(tensors, dict) or "state" not in content:
        raise CheckpointCorruptError(f"{PLAIN!r} of {path!r} is a checkpoint of its own, and no part of one.")
    for name, tensor in tensors.items():
        entry = manifest["tensors"].get(name)
        if (
            not isinstance(tensor, Tensor)
            or entry is None
            or entry["shape"] != list(tensor.shape)
            or f"torch.{entry['dtype']}" != str(tensor.dtype)
        ):
            raise CheckpointCorruptError(f"{path!r} contradicts itself: {PLAIN!r} and the manifest differ on {name!r}.")
    stand_ins = content.get("per_rank", {})  # none in folders of version 1
    parts = _rank_parts(source, present, manifest, list(stand_ins), map_location, weights_only, packed)
    own = {id(stand_in): parts[name] for name, stand_in in stand_ins.items()}
    return {**content, "state": map_leaves(content["state"], lambda value, _: own.get(id(value), value), "")}


def _rank_parts(
    source: FolderSource,
    present: tuple[int, ...] | None,
    manifest: Mapping[str, Any],
    names: list[str],
    map_location: Any,
    weights_only: bool | None,
    packed: bool,
) -> dict[str, Sequence[Any]]:
    """What each rank had of its own, by name; read now, or when it is asked for."""
    size, path = manifest["world_size"], source.name

    def read(rank: int) -> dict[str, Any]:
        file = rank_file(rank)
        known = file in manifest["files"]
        part: Any = load_file(source.path_of(file), map_location, weights_only) if known else None
        if not isinstance(part, dict) or list(part) != names:
            raise CheckpointCorruptError(f"{path!r} contradicts itself: {PLAIN!r} and {file!r} differ.")
        if packed:
            return part
        return {
            name: unpack_alone(value, path, weights_only=weights_only, map_location=map_location)
            for name, value in part.items()
        }

    def read_later(name: str, rank: int) -> Any:
        try:
            verify(source, manifest, {rank_file(rank)})
            return read(rank)[name]
        finally:
            if source.identity() != present:
                raise CheckpointError(f"{path!r} was removed or replaced after it was loaded. Load it again.")

    if on_demand():
        return {name: RankParts(size, functools.partial(read_later, name)) for name in names}
    parts = [read(rank) for rank in range(size)] if names else []
    return {name: [part[name] for part in parts] for name in names}
