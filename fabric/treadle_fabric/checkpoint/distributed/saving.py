"""Write a state to one folder, each rank its part."""

from __future__ import annotations

import hashlib
import math
import os
import pickle
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch

from treadle_fabric import tensor_pickle
from treadle_fabric.checkpoint.distributed.pieces import Piece, on_host, pieces_held
from treadle_fabric.checkpoint.distributed.ranks import Outcome, Ranks
from treadle_fabric.checkpoint.distributed.split import Split, is_sharded_tensor
from treadle_fabric.checkpoint.fingerprint import fingerprint
from treadle_fabric.checkpoint.folder.checksummed import no_record_checksums
from treadle_fabric.checkpoint.folder.destination import Destination, LocalFolder
from treadle_fabric.checkpoint.folder.layout import INDEX, PLAIN, rank_file
from treadle_fabric.checkpoint.folder.manifest import manifest_of
from treadle_fabric.checkpoint.folder.remote import RemoteFolder
from treadle_fabric.checkpoint.host.arena import Arena
from treadle_fabric.checkpoint.torch_file import file_system
from treadle_fabric.errors import CheckpointError
from treadle_fabric.types import PathLike

__all__ = ["ShardedSave", "save_sharded"]


Summary = dict[str, tuple[int, str]]
"""Of each tensor that every rank has whole: its bytes, and its fingerprint."""


def save_sharded(
    state: dict[str, Any], path: PathLike, process_group: Any | None = None, storage_options: Any | None = None
) -> None:
    """Write a state to the folder ``path``; every rank of the group calls this.

    :class:`DistributedCheckpointIO` calls it for all ranks; a strategy that shards over a group can name that group.

    Args:
        state: Tensors, DTensors and ShardedTensors, and plain values, in dicts, lists and tuples nested as you like.
            Its structure, and what is no tensor, is taken from rank 0, except for values of :class:`PerRank`.
        path: A local path or an fsspec URL.
        process_group: The ranks that write. Default: all; without a process group there is only this process.
        storage_options: Arguments for the file system of a URL.

    Raises:
        CheckpointError: A rank could not write its part. All ranks raise, and what was at ``path`` is still there.
    """
    ShardedSave(state, path, storage_options, process_group=process_group).write()


class _Plain(NamedTuple):
    """What a rank writes beside pieces of large tensors."""

    content: dict[str, Any] | None
    """The content of ``meta.pt``, which rank 0 writes."""
    own: dict[str, Any]
    """The values of ``PerRank``, by name."""


class ShardedSave:
    """One save of all ranks. It is made in the call, where the ranks agree who writes what, and written there or later.

    Every rank makes one with the same arguments but for ``state``, and then writes it.

    Args:
        state: As for :func:`save_sharded`.
        path: The same.
        storage_options: The same.
        process_group: The same.
        before: What comes first, on every rank; where it fails, all ranks raise that.
        arena: Memory of the host, to which this rank's part is copied, so that the state may change. What cannot be
            pickled is then said now. Default: nothing is copied.

    Raises:
        CheckpointError: A rank failed, and all raise.
        MisconfigurationException: ``storage_options`` for a local path.
    """

    def __init__(
        self,
        state: dict[str, Any],
        path: PathLike,
        storage_options: Any | None = None,
        *,
        process_group: Any | None = None,
        before: Callable[[], None] | None = None,
        arena: Arena | None = None,
    ) -> None:
        self._destination = _destination(path, storage_options)
        self._failure = f"The checkpoint {str(path)!r} was not written"
        ranks = self._ranks = Ranks(process_group, self._failure, state)
        stream: bytes = b""
        storages: list[torch.UntypedStorage] = []

        def keep(split: Split) -> None:
            nonlocal stream, storages
            self._plain = _Plain(split.content() if ranks.rank == 0 else None, split.own)
            self._writers = split.writers
            if arena is not None:
                if split.writers:
                    raise CheckpointError(
                        "an engine writes files of its own into the folder, which cannot be done in the background. "
                        "Leave AsyncCheckpointIO out, or give it a TorchCheckpointIO, which gathers the tensors."
                    )
                stream, storages = tensor_pickle.dump(self._plain)

        def begin() -> tuple[Split, Summary]:
            if before is not None:
                before()
            split = Split(state)
            ranks.state = split.structure
            if not split.elsewhere:  # else it is not known yet what is in the structure
                keep(split)
            alone = ranks.size == 1
            return split, {n: (t.nbytes, "" if alone else fingerprint(t)) for n, t in split.replicated.items()}

        (split, summary), alike = ranks.compared(begin, lambda found: _digest(found[1], found[0]))
        owners = _share_out(summary, (), ranks.size) if alike else _owners(ranks, summary, list(split.own))
        found = [] if alike and not split.elsewhere else _found_here(ranks, split)
        mine = [(name, split.replicated[name]) for name, rank in owners.items() if rank == ranks.rank]
        whole = [Piece.whole(name, tensor) for name, tensor in (*mine, *found)]
        self._error: BaseException | None = None
        self._writers = split.writers
        self._pieces: list[Piece] = []
        try:
            if split.elsewhere:
                keep(split)
            self._pieces = [*pieces_held(split.sharded), *whole]
            if arena is not None:
                self._copy(stream, storages, arena)
        except Exception as e:  # the other ranks have gone on, and learn of it when they write
            self._error = e

    def _copy(self, stream: bytes, storages: list[torch.UntypedStorage], arena: Arena) -> None:
        copies, values = arena.copy(storages, [piece.values for piece in self._pieces])
        self._plain = tensor_pickle.load(stream, copies)
        self._pieces = [piece._replace(values=copy) for piece, copy in zip(self._pieces, values, strict=True)]
        self._ranks.state = {}  # nothing in it can fail to be pickled any more

    def write(self, group: Any | None = None) -> None:
        """Write the part of this rank, and give all parts their name; every rank calls this, once.

        Args:
            group: The group through which the ranks talk meanwhile. Default: that of the call.

        Raises:
            CheckpointError: A rank failed, and all raise. What was at the path before is still there.
        """
        ranks = self._ranks if group is None else Ranks(group, self._failure, self._ranks.state)
        destination = self._destination
        try:
            destination.follow(ranks.of_first(destination.begin))
            outcomes = ranks.to_first(lambda: self._write_files(ranks))
            ranks.of_first(lambda: self._end(ranks, outcomes))
        finally:
            self._plain, self._pieces = _Plain(None, {}), []  # nothing refers to the copy any more
            if ranks.rank == 0:
                destination.end()

    def _write_files(self, ranks: Ranks) -> tuple[dict[str, tuple[int, int]], dict[str, Any]]:
        """Write the files of this rank: their sizes and checksums, and what the manifest says of tensors in them."""
        if self._error is not None:
            raise self._error
        files: dict[str, tuple[int, int]] = {}
        entries: dict[str, Any] = {}
        if self._pieces:
            name = f"__{ranks.rank}_0.distcp"
            with self._destination.file(name) as stream, no_record_checksums():
                for piece in self._pieces:
                    start = stream.tell()
                    torch.save(on_host(piece.values), stream)
                    _add(entries, piece, {"file": name, "start": start, "length": stream.tell() - start})
            files[name] = stream.size, stream.crc
        for writer in self._writers:
            files.update(writer.write(self._destination))
        plain = {PLAIN: self._plain.content, rank_file(ranks.rank): self._plain.own or None}
        for name, content in plain.items():
            if content is not None:
                if name != PLAIN:
                    ranks.state = content
                with self._destination.file(name) as stream, no_record_checksums():
                    torch.save(content, stream)
                files[name] = stream.size, stream.crc
        return files, entries

    def _end(self, ranks: Ranks, outcomes: list[Outcome]) -> None:
        try:
            self._publish(ranks, outcomes)
        finally:
            self._destination.end()  # before the other ranks learn of it, which may look at the folder then

    def _publish(self, ranks: Ranks, outcomes: list[Outcome]) -> None:
        files: dict[str, tuple[int, int]] = {}
        tensors: dict[str, Any] = {}
        for written, entries in ranks.results_of(outcomes):
            files.update(written)
            for name, entry in entries.items():
                tensors.setdefault(name, {**entry, "chunks": []})["chunks"] += entry["chunks"]
        _check_whole(tensors)
        if tensors:
            from treadle_fabric.checkpoint.distributed.torch_index import index_of  # heavy

            with self._destination.file(INDEX) as stream:
                stream.write(pickle.dumps(index_of(tensors)))
            files[INDEX] = stream.size, stream.crc
        manifest = manifest_of(ranks.size, files, tensors, self._destination.prefix)
        self._destination.publish(manifest, {name: size for name, (size, _) in files.items()})


def _destination(path: PathLike, storage_options: Any | None) -> Destination:
    fs, where = file_system(path, storage_options)
    return LocalFolder(os.path.abspath(where)) if fs is None else RemoteFolder(fs, where, os.fspath(path))


def _add(entries: dict[str, Any], piece: Piece, place: dict[str, Any]) -> None:
    entry = {"dtype": str(piece.values.dtype).removeprefix("torch."), "shape": list(piece.shape), "chunks": []}
    chunk = {"offsets": list(piece.offsets), "sizes": list(piece.values.shape), **place}
    entries.setdefault(piece.name, entry)["chunks"].append(chunk)


def _check_whole(tensors: Mapping[str, Any]) -> None:
    for name, entry in tensors.items():
        written, whole = sum(math.prod(chunk["sizes"]) for chunk in entry["chunks"]), math.prod(entry["shape"])
        if written != whole:
            raise CheckpointError(
                f"the ranks wrote {written} of the {whole} values of {name!r}: they do not hold it as its placements "
                "say. Have all ranks save the same tensors, in the same order."
            )


def _digest(summary: Summary, split: Split) -> int:
    """A number of 63 bits for what the ranks have to have alike."""
    alike = list(summary.items()), list(split.own), list(split.elsewhere)
    hashed = hashlib.blake2b(repr(alike).encode(), digest_size=8)
    return int.from_bytes(hashed.digest(), "little") >> 1


def _found_here(ranks: Ranks, split: Split) -> list[tuple[str, torch.Tensor]]:
    """The tensors that rank 0 has not, and that this rank is the first one to have; every rank calls this.

    What no rank has stays on the meta device in the structure.
    """
    names: list[str] = ranks.of_first(lambda: list(split.elsewhere))
    firsts = ranks.first_with([name in split.tensors and not split.tensors[name].is_meta for name in names])
    if ranks.rank == 0:
        split.nowhere([name for name, first in zip(names, firsts, strict=True) if first is None])
    here = [name for name, first in zip(names, firsts, strict=True) if first == ranks.rank]
    return [(name, split.tensors[name]) for name in here if not is_sharded_tensor(split.tensors[name])]


def _owners(ranks: Ranks, summary: Summary, own: list[str]) -> dict[str, int]:
    """The rank that writes each tensor, where the ranks do not have the same; every rank calls this."""
    first, first_own = ranks.of_first(lambda: (summary, own))

    def check() -> None:
        if own != first_own:
            raise CheckpointError(
                f"has {own} per rank, and rank 0 has {first_own}. Mark the same values on every rank."
            )

    ranks.together(check)
    unlike = ranks.any([summary.get(name) != found for name, found in first.items()])
    return _share_out(first, {name for name, differs in zip(first, unlike, strict=True) if differs}, ranks.size)


def _share_out(summary: Summary, unlike: Collection[str], size: int) -> dict[str, int]:
    """The rank that writes each tensor: the one with the fewest bytes so far, or rank 0 if not all have the same."""
    load = [0] * size
    owners: dict[str, int] = {}
    for name, (nbytes, _) in summary.items():
        owners[name] = 0 if name in unlike else load.index(min(load))
        load[owners[name]] += nbytes
    return owners
