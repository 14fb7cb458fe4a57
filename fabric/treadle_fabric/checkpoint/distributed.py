"""One checkpoint, one folder that all processes write, each its part.

Large tensors are written by torch.distributed.checkpoint, one file a process. Tensors that every rank has alike are
shared out between the ranks; of a DTensor or ShardedTensor each writes what it holds. All else, and the structure, is
rank 0's and goes into ``meta.pt``, with a tensor of one stored value in the place of each large one. How many
processes read is free.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from treadle_fabric.checkpoint.folder import (
    PLAIN,
    bring_back,
    checksum,
    lock_folder,
    make_temporary,
    put_in_place,
    read_manifest,
    refuse_foreign,
    unmixed,
    verify,
    write_manifest,
)
from treadle_fabric.checkpoint.io import CheckpointIO
from treadle_fabric.checkpoint.torch_file import TorchCheckpointIO, neighbours, reason_of, why_not_written, write_file
from treadle_fabric.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    CheckpointUnsafeError,
    MisconfigurationException,
    near_names,
)
from treadle_fabric.types import PathLike

__all__ = ["DistributedCheckpointIO", "load_sharded_into", "save_sharded"]

T = TypeVar("T")
_LARGE = 32 * 1024  # bytes; to write a smaller tensor by itself takes longer than to write its bytes


class DistributedCheckpointIO(CheckpointIO):
    """Checkpoints as folders that all ranks write at the same time, each its part, with torch.distributed.checkpoint.

    The folder is as safe as a file of :class:`TorchCheckpointIO`: it appears under its name whole or not at all, every
    byte of it is checked when it is read, and reading it unpickles nothing but tensors and plain containers. It can be
    read by any number of processes, by every CheckpointIO of this library, and with any strategy. All processes must
    reach the path: on several machines it has to be on a file system that they share.
    """

    sharded: ClassVar[bool] = True

    def save_checkpoint(self, checkpoint: dict[str, Any], path: PathLike, storage_options: Any | None = None) -> None:
        """Write ``checkpoint`` to the folder ``path``; every rank calls this.

        Args:
            checkpoint: Best made of tensors and plain containers only, so that it loads with ``weights_only=True``.
            path: A local path. A checkpoint there is replaced, a folder with other things in it is not.
            storage_options: None; remote paths are refused.

        Raises:
            CheckpointError: A rank could not write, and all raise. An earlier checkpoint of that name stands.
            MisconfigurationException: ``path`` is remote, or ``storage_options`` are given.
        """
        if storage_options:
            raise MisconfigurationException(
                f"storage_options={storage_options!r} are for remote paths, and sharded checkpoints are written to "
                "local ones only. Leave them out."
            )
        save_sharded(checkpoint, path)

    def load_checkpoint(
        self, path: PathLike, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read the checkpoint at ``path``, a folder or a file; the arguments are those of :class:`TorchCheckpointIO`.

        No other process takes part: each that calls this gets all of it.
        """
        return TorchCheckpointIO().load_checkpoint(path, map_location, weights_only)

    def remove_checkpoint(self, path: PathLike) -> None:
        TorchCheckpointIO().remove_checkpoint(path)


# --- saving ---


def save_sharded(state: dict[str, Any], path: PathLike, process_group: Any | None = None) -> None:
    """Write a state to the folder ``path``; every rank of the group calls this.

    :class:`DistributedCheckpointIO` is this with all ranks; a strategy that shards can name the group that does.

    Args:
        state: Tensors, DTensors and ShardedTensors, and plain values, in dicts, lists and tuples nested as you like.
            Its structure, and what is no tensor, is rank 0's.
        path: Local. Rank 0's counts.
        process_group: Whose ranks write. Default: all; without a process group there is only this process.

    Raises:
        CheckpointError: A rank could not write its part. All raise, and what lay at ``path`` before is still there.
    """
    ranks = _Ranks(process_group, f"The checkpoint {str(path)!r} was not written", state)
    where = _local(path)
    temporary, lock = "", None
    files: dict[str, tuple[int, int]] = {}
    places: dict[str, Any] = {}

    def begin() -> tuple[str, dict[str, Any], bool]:
        nonlocal temporary, lock
        split = _Split(state)
        ranks.state = split.structure
        if ranks.rank == 0:
            refuse_foreign(where)
            temporary = make_temporary(where)
            lock = lock_folder(temporary)
        parts.append(split)
        alone = ranks.size == 1
        summary = {n: (t.nbytes, "" if alone else _fingerprint(t)) for n, t in split.replicated.items()}
        return temporary, summary, bool(split.sharded)

    def finish() -> tuple[dict[str, tuple[int, int]], dict[str, Any]]:
        if ranks.rank == 0:
            file = os.path.join(folder, PLAIN)
            write_file(parts[0].content(), file)
            files[PLAIN] = checksum(file)
        return files, places

    def publish() -> None:
        if ranks.rank == 0:
            every = {name: sums for each, _ in results for name, sums in each.items()}
            _check_seen(folder, every)
            write_manifest(folder, ranks.size, every, places)
            put_in_place(folder, where)

    parts: list[_Split] = []
    try:
        begun = ranks.together(begin)
        folder = begun[0][0]
        if begun[0][1] or any(sharded for _, _, sharded in begun):
            files, places = _write(ranks, parts[0], [summary for _, summary, _ in begun], folder)
        results = ranks.together(finish)
        ranks.together(publish)
    finally:
        if temporary and os.path.isdir(temporary):
            shutil.rmtree(temporary, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _write(
    ranks: _Ranks, split: _Split, summaries: list[dict[str, Any]], folder: str
) -> tuple[dict[str, tuple[int, int]], dict[str, Any]]:
    mine = {**split.sharded, **{n: split.replicated[n] for n, r in _share_out(summaries).items() if r == ranks.rank}}
    from treadle_fabric.checkpoint.dcp import RanksFailedError, write_tensors

    try:
        return write_tensors(mine, folder, ranks.group, ranks.size == 1)
    except RanksFailedError as e:
        raise ranks.error({rank: ranks.told(error) for rank, error in e.failures.items()}) from e


def _share_out(summaries: list[dict[str, Any]]) -> dict[str, int]:
    """Which rank writes which tensor: the one with the least so far if all have it alike, else rank 0."""
    load = [0] * len(summaries)
    owners: dict[str, int] = {}
    for name, summary in summaries[0].items():
        alike = all(other.get(name) == summary for other in summaries)
        owners[name] = load.index(min(load)) if alike else 0
        load[owners[name]] += summary[0]
    return owners


def _fingerprint(tensor: Tensor) -> str:
    """A hash of the bytes of a tensor, computed on its device: sums modulo 2**64, with a random weight for each place.

    Only what all ranks have alike may be shared out: the buffers of a module, say, need not be. Two tensors that
    differ have the same fingerprint with a probability of 2**-33 at most, were the weights drawn for them.
    """
    values = tensor.detach().contiguous().flatten()
    if values.is_complex():
        values = torch.view_as_real(values).flatten()
    # no value of eight bytes: where only their highest bits differ, half of the weights would make no difference
    values = values.view({1: torch.uint8, 2: torch.int16}.get(values.element_size(), torch.int32))
    weights = _weights().to(values.device)
    width = len(weights)
    rows = 16 if values.device.type == "cpu" else 2048  # the products, eight bytes a value, fit into its cache
    sums: list[Tensor] = []
    for part in torch.split(values, width * rows):
        whole = len(part) // width * width
        sums += (part[:whole].view(-1, width) * weights).sum(1), part[whole:].to(torch.int64)
    told = f"{tensor.dtype} {tuple(tensor.shape)} {torch.cat(sums).tolist()}"
    return hashlib.blake2b(told.encode(), digest_size=16).hexdigest()  # hash() differs from process to process


@functools.cache
def _weights() -> Tensor:
    """The same in every process."""
    return torch.randint(-(2**63), 2**63 - 1, (2048,), generator=torch.Generator().manual_seed(0), device="cpu")


def _check_seen(folder: str, files: Mapping[str, tuple[int, int]]) -> None:
    for name, (size, _) in files.items():
        file = os.path.join(folder, name)
        if not os.path.isfile(file) or os.path.getsize(file) != size:
            raise CheckpointError(
                f"another rank wrote {name!r}, and here it is not to be seen. Save to a file system that all machines "
                "share."
            )


class _Ranks:
    """The processes that act together, and fail together."""

    def __init__(self, group: Any | None, failure: str, state: Any = None) -> None:
        self.group = group
        self.state = state
        self._failure = failure
        several = dist.is_available() and dist.is_initialized()
        self.rank, self.size = (dist.get_rank(group), dist.get_world_size(group)) if several else (0, 1)

    def together(self, action: Callable[[], T]) -> list[T]:
        """Every rank acts, and gets what all got; if one failed, all raise."""
        result: Any = None
        error: BaseException | None = None
        try:
            result = action()
        except Exception as e:
            error = e
        outcome = (result, None if error is None else self.told(error))
        outcomes: list[Any] = [None] * self.size
        if self.size == 1:
            outcomes = [outcome]
        else:
            dist.all_gather_object(outcomes, outcome, group=self.group)
        failed = {rank: reason for rank, (_, reason) in enumerate(outcomes) if reason is not None}
        if failed:
            raise self.error(failed) from error
        return [each for each, _ in outcomes]

    def error(self, reasons: Mapping[int, str]) -> CheckpointError:
        """What all ranks raise."""
        told = " ".join(f"rank {rank}: {reason}" if self.size > 1 else reason for rank, reason in reasons.items())
        return CheckpointError(f"{self._failure}: {told}")

    def told(self, error: BaseException) -> str:
        """What went wrong, in sentences."""
        if isinstance(error, CheckpointError):
            return str(error)
        return f"{reason_of(error)}." if self.state is None else why_not_written(error, self.state)


def _local(path: PathLike) -> str:
    text = os.fspath(path)
    if "://" in text:
        raise MisconfigurationException(
            f"{text!r} is a URL, and sharded checkpoints are written to local paths only. Give a path that all "
            "machines see, or use TorchCheckpointIO."
        )
    return os.path.abspath(text)


# --- what is large, and what stands in its place ---


class _Split:
    """A state taken apart: the large tensors by name, and the structure with stand-ins for them."""

    def __init__(self, state: Any) -> None:
        self.replicated: dict[str, Tensor] = {}
        self.sharded: dict[str, Any] = {}
        self._stand_ins: dict[str, Tensor] = {}
        self._known: dict[Any, Tensor] = {}
        self.structure = _mapped(state, self._replace, "")

    def content(self) -> dict[str, Any]:
        """What goes into ``meta.pt``; the names of the stand-ins survive there, because each is one object."""
        return {"state": self.structure, "tensors": self._stand_ins}

    def _replace(self, value: Any, name: str) -> Any:
        sharded = _is_sharded_tensor(value)
        if not sharded and not _is_large(value):
            return value
        # tied weights are several tensors with the same memory
        memory = () if sharded else (value.data_ptr(), value.dtype, value.shape, value.stride(), value.device)
        key = id(value) if sharded else (type(value), *memory)
        if key in self._known:
            return self._known[key]
        while name in self._stand_ins:  # the keys "a.b" and "a", "b"
            name += "'"
        stand_in = torch.zeros((), dtype=value.dtype, device=value.device).expand(value.shape)
        if isinstance(value, Parameter):
            stand_in = Parameter(stand_in, requires_grad=value.requires_grad)
        self._known[key] = self._stand_ins[name] = stand_in
        (self.sharded if sharded else self.replicated)[name] = value
        return stand_in


def _is_large(value: Any) -> bool:
    return (
        type(value) in (Tensor, Parameter)
        and value.layout == torch.strided
        and not value.is_quantized
        and not value.is_meta
        and not value.is_conj()
        and not value.is_neg()
        and value.nbytes >= _LARGE
    )


def _is_sharded_tensor(value: Any) -> bool:
    homes = (("torch.distributed.tensor", "DTensor"), ("torch.distributed._shard.sharded_tensor", "ShardedTensor"))
    for home, name in homes:
        module = sys.modules.get(home)  # where nobody imported it there is none
        if module is not None and isinstance(value, getattr(module, name)):
            return True
    return False


def _mapped(value: Any, change: Callable[[Any, str], Any], path: str) -> Any:
    """``value`` with every leaf changed, given its path; containers are copied, with what they have as attributes."""
    inner = f"{path}." if path else ""
    if isinstance(value, dict):
        new = copy.copy(value)
        for key, each in value.items():
            new[key] = _mapped(each, change, f"{inner}{key}")
        if attributes := getattr(value, "__dict__", None):  # a state dict has the versions of its modules there
            vars(new).update(attributes)
        return new
    if type(value) in (list, tuple):
        return type(value)(_mapped(each, change, f"{inner}{i}") for i, each in enumerate(value))
    return change(value, path)


# --- loading ---


def load_sharded(
    where: str, path: PathLike, map_location: Any | None = None, weights_only: bool | None = None
) -> dict[str, Any]:
    """Read all of a folder, in this process alone; arguments and errors as in :class:`TorchCheckpointIO`."""

    def read() -> dict[str, Any]:
        if os.path.isdir(where):
            return _load_all(where, path, map_location, weights_only)
        return TorchCheckpointIO().load_checkpoint(path, map_location, weights_only)  # a file took its place

    return unmixed(where, str(path), read)


def _load_all(where: str, path: PathLike, map_location: Any | None, weights_only: bool | None) -> dict[str, Any]:
    manifest = read_manifest(where, str(path))
    verify(where, str(path), manifest)
    content = _read_plain(where, path, manifest, map_location, weights_only)
    stand_ins = content["tensors"]
    tensors = {name: torch.empty(t.shape, dtype=t.dtype, device=t.device) for name, t in stand_ins.items()}
    if any(not tensor.is_meta for tensor in tensors.values()):
        _read(tensors, where, path, manifest)
    found: dict[int, Tensor] = {
        id(t): Parameter(tensors[name], t.requires_grad) if isinstance(t, Parameter) else tensors[name]
        for name, t in stand_ins.items()
    }
    state: dict[str, Any] = _mapped(content["state"], lambda value, _: found.get(id(value), value), "")
    return state


def load_sharded_into(state: dict[str, Any], path: PathLike, process_group: Any | None = None) -> None:
    """Read a folder into ``state``: tensors in place, each rank what it holds of them; other values are replaced.

    Every rank of the group calls this, with the same keys. How many ranks wrote, and what each held, does not matter.
    It is for strategies that shard, whose ranks have no room for all of a checkpoint.

    Args:
        state: As for :func:`save_sharded`. What the folder has beyond it is left out.
        path: Local.
        process_group: Whose ranks read, sharing out the check of the files. Default: all.

    Raises:
        CheckpointNotFoundError: Nothing lies at ``path``.
        CheckpointMismatchError: The folder has no such entry, or one of another shape. Nothing was changed.
        CheckpointError: It is a file, or not whole, or it would have to unpickle other things than plain ones.
    """
    ranks = _Ranks(process_group, f"The checkpoint {str(path)!r} was not loaded")
    where = _local(path)
    ranks.together(lambda: bring_back(os.path.dirname(where)) if ranks.rank == 0 else None)  # before any rank looks

    def changed(here: bool) -> bool:
        return any(ranks.together(lambda: here))

    later = unmixed(where, str(path), lambda: _read_into(state, where, path, ranks), changed)

    def finish() -> None:
        for action in later:
            action()

    _raising_alike(ranks, finish)


def _read_into(state: dict[str, Any], where: str, path: PathLike, ranks: _Ranks) -> list[Callable[[], Any]]:
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


def _raising_alike(ranks: _Ranks, action: Callable[[], None]) -> None:
    """As ``together``, but the ranks on which it failed raise their own error."""
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
                later.append(functools.partial(_fill, mine, theirs))
            elif name not in large:
                large[name] = mine
            elif large[name] is not mine:  # tied where it was saved
                later.append(functools.partial(_fill, mine, large[name]))
        elif isinstance(mine, Tensor):
            raise CheckpointMismatchError(f"{at!r} of {path!r} is a {type(theirs).__name__}, and state has a tensor.")
        elif isinstance(mine, dict | list | tuple) and isinstance(theirs, dict | list | tuple) and _has_tensor(mine):
            _pair(mine, theirs, at, path, names, large, later)
        elif _has_stand_in(theirs, names):
            raise CheckpointMismatchError(f"{at!r} of {path!r} holds tensors, and state has none there to fill.")
        elif not isinstance(state, tuple):
            later.append(functools.partial(state.__setitem__, key, theirs))


def _fill(target: Tensor, source: Tensor) -> None:
    with torch.no_grad():
        if _is_sharded_tensor(target) and not _is_sharded_tensor(source):
            from torch.distributed.tensor import DTensor, distribute_tensor

            assert isinstance(target, DTensor)
            source = source.to(target.device)  # every rank has all of it: nothing is sent
            source = distribute_tensor(source, target.device_mesh, target.placements, src_data_rank=None)
        target.copy_(source)


def _has_tensor(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_has_tensor(each) for each in value.values())
    return any(map(_has_tensor, value)) if isinstance(value, list | tuple) else isinstance(value, Tensor)


def _has_stand_in(value: Any, names: Mapping[int, str]) -> bool:
    if isinstance(value, dict):
        return any(_has_stand_in(each, names) for each in value.values())
    return any(_has_stand_in(v, names) for v in value) if isinstance(value, list | tuple) else id(value) in names


def _read_plain(
    where: str, path: PathLike, manifest: Mapping[str, Any], map_location: Any, weights_only: bool | None
) -> dict[str, Any]:
    content: Any = TorchCheckpointIO().load_checkpoint(os.path.join(where, PLAIN), map_location, weights_only)
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
    return dict(content)


def _read(
    tensors: dict[str, Any], where: str, path: PathLike, manifest: Mapping[str, Any], ranks: _Ranks | None = None
) -> None:
    if not tensors:
        return
    from treadle_fabric.checkpoint.dcp import RanksFailedError, read_tensors

    group, alone = (None, True) if ranks is None or ranks.size == 1 else (ranks.group, False)
    try:
        read_tensors(tensors, where, manifest, group, alone)
    except RanksFailedError as e:
        refused = any(isinstance(f, CheckpointUnsafeError | pickle.UnpicklingError) for f in e.failures.values())
        told = "; ".join(f"rank {rank}: {reason_of(error)}" for rank, error in e.failures.items())
        raise (CheckpointUnsafeError if refused else CheckpointError)(
            f"The checkpoint {str(path)!r} could not be restored: {told}."
        ) from e
