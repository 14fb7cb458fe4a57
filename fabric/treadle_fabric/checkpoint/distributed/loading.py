"""Read a checkpoint folder, whole in one process or each rank its part."""

from __future__ import annotations

import functools
import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from treadle_fabric.checkpoint.distributed.ranks import Ranks, local_path
from treadle_fabric.checkpoint.distributed.split import is_sharded_tensor, map_leaves
from treadle_fabric.checkpoint.folder.layout import PLAIN, identity, rank_file, unmixed
from treadle_fabric.checkpoint.folder.manifest import read_manifest, verify
from treadle_fabric.checkpoint.folder.placing import bring_back
from treadle_fabric.checkpoint.host.checked import is_checked, set_checked
from treadle_fabric.checkpoint.per_rank import RankParts, on_demand
from treadle_fabric.checkpoint.torch_file import load_file, neighbours, reason_of
from treadle_fabric.checkpoint.values.unpacking import unpack_alone
from treadle_fabric.containers import leaves
from treadle_fabric.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    CheckpointUnsafeError,
    near_names,
)
from treadle_fabric.types import PathLike

__all__ = ["fill", "load_sharded_into", "placed_like"]


# --- loading ---


def load_sharded(
    where: str, path: PathLike, map_location: Any | None = None, weights_only: bool | None = None
) -> dict[str, Any]:
    """Read all of a folder, in this process alone; arguments and errors as in :class:`TorchCheckpointIO`."""

    def read() -> dict[str, Any]:
        if os.path.isdir(where):
            return _load_all(where, path, map_location, weights_only)
        return load_file(path, map_location, weights_only)  # a file took its place

    return unmixed(where, str(path), read)


def _load_all(where: str, path: PathLike, map_location: Any | None, weights_only: bool | None) -> dict[str, Any]:
    present = identity(where)
    manifest = read_manifest(where, str(path))
    names = [name for name in manifest["files"] if not (on_demand() and name.startswith("rank_"))]  # these: when read
    if not is_checked(present):
        verify(where, str(path), manifest, names)
    if identity(where) == present:
        set_checked(present)
    content = _read_plain(where, path, manifest, map_location, weights_only)
    stand_ins = content["tensors"]
    tensors = {name: torch.empty(t.shape, dtype=t.dtype, device=t.device) for name, t in stand_ins.items()}
    if any(not tensor.is_meta for tensor in tensors.values()):
        _read(tensors, where, path, manifest)
    found: dict[int, Tensor] = {
        id(t): Parameter(tensors[name], t.requires_grad) if isinstance(t, Parameter) else tensors[name]
        for name, t in stand_ins.items()
    }
    state: dict[str, Any] = map_leaves(content["state"], lambda value, _: found.get(id(value), value), "")
    return state


def load_sharded_into(state: dict[str, Any], path: PathLike, process_group: Any | None = None) -> None:
    """Read a folder into ``state``. Tensors are filled in place, on each rank the part it holds; other values replaced.

    Every rank of the group calls this, with the same keys. How many ranks wrote, and what each held, does not matter.
    This is for strategies that shard, where no rank has room for all of a checkpoint.

    Args:
        state: As for :func:`save_sharded`. What else the folder holds is not read.
        path: A local path.
        process_group: The ranks that read; each checks some of the files. Default: all.

    Raises:
        CheckpointNotFoundError: Nothing lies at ``path``.
        CheckpointMismatchError: The folder has no such entry, or one of another shape. Nothing was changed.
        CheckpointError: It is a file, or not whole, or it would have to unpickle other things than plain ones.
    """
    ranks = Ranks(process_group, f"The checkpoint {str(path)!r} was not loaded")
    where = local_path(path)
    ranks.together(lambda: bring_back(os.path.dirname(where)) if ranks.rank == 0 else None)  # before any rank looks

    def changed(here: bool) -> bool:
        return any(ranks.together(lambda: here))

    later = unmixed(where, str(path), lambda: _read_into(state, where, path, ranks), changed)

    def finish() -> None:
        for action in later:
            action()

    _raising_alike(ranks, finish)


def _read_into(state: dict[str, Any], where: str, path: PathLike, ranks: Ranks) -> list[Callable[[], Any]]:
    """Fill the large tensors; what remains to be done, when it is sure that all was of one checkpoint, is returned."""
    manifest: dict[str, Any] = {}
    content: dict[str, Any] = {}

    def check() -> None:
        if not os.path.isdir(where):
            if os.path.lexists(where):
                raise CheckpointError(f"{str(path)!r} is a file, and a folder is read here: use load_checkpoint.")
            raise CheckpointNotFoundError(f"There is no checkpoint at {str(path)!r}. {neighbours(None, where)}")
        manifest.update(read_manifest(where, str(path)))
        names = [name for place, name in enumerate(manifest["files"]) if place % ranks.size == ranks.rank]
        verify(where, str(path), manifest, {*names, PLAIN})

    _raising_alike(ranks, check)
    _raising_alike(ranks, lambda: content.update(_read_plain(where, path, manifest, None, None)))
    names = {id(stand_in): name for name, stand_in in content["tensors"].items()}
    large: dict[str, Any] = {}
    later: list[Callable[[], Any]] = []
    _raising_alike(ranks, lambda: _pair(state, content["state"], "", str(path), names, large, later))
    _read(large, where, path, manifest, ranks)
    return later


def _raising_alike(ranks: Ranks, action: Callable[[], None]) -> None:
    """Act as ``together`` does, but the ranks on which the action failed raise their own error."""
    error: list[CheckpointError] = []

    def noted() -> None:
        try:
            action()
        except CheckpointError as e:
            error.append(e)
            raise

    try:
        ranks.together(noted)
    except CheckpointError:
        if error:
            raise error[0] from None
        raise


def _pair(
    state: Any,
    saved: Any,
    place: str,
    path: str,
    names: Mapping[int, str],
    large: dict[str, Any],
    later: list[Callable[[], Any]],
) -> None:
    """Find for each entry of ``state`` what was saved: ``large`` ones are still to be read, ``later`` sets the rest."""
    keys = state if isinstance(state, dict) else range(len(state))
    for key in keys:
        at = f"{place}.{key}" if place else str(key)
        if not (key in saved if isinstance(saved, dict) else isinstance(saved, list | tuple) and key < len(saved)):
            known = saved if isinstance(saved, dict) else []
            raise CheckpointMismatchError(f"{path!r} has no {at!r}. {near_names(str(key), known)}")
        mine, theirs = state[key], saved[key]
        if isinstance(mine, Tensor) and isinstance(theirs, Tensor):
            if mine.shape != theirs.shape:
                raise CheckpointMismatchError(
                    f"{at!r} of {path!r} has the shape {list(theirs.shape)}, and state has {list(mine.shape)} there."
                )
            name = names.get(id(theirs))
            if name is None:
                later.append(functools.partial(fill, mine, theirs))
            elif name not in large:
                large[name] = mine
            elif large[name] is not mine:  # tied where it was saved
                later.append(functools.partial(fill, mine, large[name]))
        elif isinstance(mine, Tensor):
            raise CheckpointMismatchError(f"{at!r} of {path!r} is a {type(theirs).__name__}, and state has a tensor.")
        elif (
            isinstance(mine, dict | list | tuple)
            and isinstance(theirs, dict | list | tuple)
            and any(isinstance(leaf, Tensor) for leaf in leaves(mine))
        ):
            _pair(mine, theirs, at, path, names, large, later)
        elif any(id(leaf) in names for leaf in leaves(theirs)):
            raise CheckpointMismatchError(f"{at!r} of {path!r} holds tensors, and state has none there to fill.")
        elif not isinstance(state, tuple):
            later.append(functools.partial(state.__setitem__, key, theirs))


def fill(target: Tensor, source: Tensor) -> None:
    """Copy ``source`` into ``target``, sharded as that is."""
    with torch.no_grad():
        target.copy_(placed_like(source, target))


def placed_like(source: Tensor, target: Tensor) -> Tensor:
    """Return ``source`` on the device of ``target``, and sharded as ``target`` is; nothing is sent between ranks.

    Args:
        source: Whole on every rank, or sharded already.
        target: A tensor or a DTensor of the same shape.
    """
    if is_sharded_tensor(target) and not is_sharded_tensor(source):
        from torch.distributed.tensor import DTensor, distribute_tensor  # heavy

        assert isinstance(target, DTensor)
        return distribute_tensor(source.to(target.device), target.device_mesh, target.placements, src_data_rank=None)
    return source.to(target.device)


def _read_plain(
    where: str, path: PathLike, manifest: Mapping[str, Any], map_location: Any, weights_only: bool | None
) -> dict[str, Any]:
    content: Any = load_file(os.path.join(where, PLAIN), map_location, weights_only)
    tensors = content.get("tensors") if isinstance(content, dict) else None
    if not isinstance(tensors, dict) or "state" not in content:
        raise CheckpointCorruptError(f"{PLAIN!r} of {str(path)!r} is a checkpoint of its own, and no part of one.")
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
    parts = _rank_parts(where, str(path), manifest, list(stand_ins), map_location, weights_only)
    own = {id(stand_in): parts[name] for name, stand_in in stand_ins.items()}
    return {**content, "state": map_leaves(content["state"], lambda value, _: own.get(id(value), value), "")}


def _rank_parts(
    where: str, path: str, manifest: Mapping[str, Any], names: list[str], map_location: Any, weights_only: bool | None
) -> dict[str, Sequence[Any]]:
    """What each rank had of its own, by name; read now, or when it is asked for."""
    size, before = manifest["world_size"], identity(where)

    def read(rank: int) -> dict[str, Any]:
        file = rank_file(rank)
        known = file in manifest["files"]
        part: Any = load_file(os.path.join(where, file), map_location, weights_only) if known else None
        if not isinstance(part, dict) or list(part) != names:
            raise CheckpointCorruptError(f"{path!r} contradicts itself: {PLAIN!r} and {file!r} differ.")
        return {
            name: unpack_alone(value, path, weights_only=weights_only, map_location=map_location)
            for name, value in part.items()
        }

    def read_later(name: str, rank: int) -> Any:
        try:
            verify(where, path, manifest, {rank_file(rank)})
            return read(rank)[name]
        finally:
            if identity(where) != before:
                raise CheckpointError(f"{path!r} was removed or replaced after it was loaded. Load it again.")

    if on_demand():
        return {name: RankParts(size, functools.partial(read_later, name)) for name in names}
    parts = [read(rank) for rank in range(size)] if names else []
    return {name: [part[name] for part in parts] for name in names}


def _read(
    tensors: dict[str, Any], where: str, path: PathLike, manifest: Mapping[str, Any], ranks: Ranks | None = None
) -> None:
    if not tensors:
        return
    from treadle_fabric.checkpoint.distributed.dcp import RanksFailedError, read_tensors  # heavy

    group, alone = (None, True) if ranks is None or ranks.size == 1 else (ranks.group, False)
    try:
        read_tensors(tensors, where, manifest, group, alone)
    except RanksFailedError as e:
        refused = any(isinstance(f, CheckpointUnsafeError | pickle.UnpicklingError) for f in e.failures.values())
        told = "; ".join(f"rank {rank}: {reason_of(error)}" for rank, error in e.failures.items())
        raise (CheckpointUnsafeError if refused else CheckpointError)(
            f"The checkpoint {str(path)!r} could not be restored: {told}."
        ) from e
