"""Write a state to one folder, each rank its part."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Mapping
from typing import Any

from treadle_fabric.checkpoint.distributed.ranks import Ranks, local_path
from treadle_fabric.checkpoint.distributed.split import Split
from treadle_fabric.checkpoint.fingerprint import fingerprint
from treadle_fabric.checkpoint.folder.checksummed import save_checksummed
from treadle_fabric.checkpoint.folder.layout import PLAIN, rank_file, refuse_foreign
from treadle_fabric.checkpoint.folder.manifest import write_manifest
from treadle_fabric.checkpoint.folder.names import check_name
from treadle_fabric.checkpoint.folder.placing import lock_folder, make_temporary, put_in_place
from treadle_fabric.errors import CheckpointError
from treadle_fabric.types import PathLike

__all__ = ["save_sharded"]


# --- saving ---


Summary = dict[str, tuple[int, str]]
"""Of each tensor that every rank has whole: its bytes, and its fingerprint."""


def save_sharded(state: dict[str, Any], path: PathLike, process_group: Any | None = None) -> None:
    """Write a state to the folder ``path``; every rank of the group calls this.

    :class:`DistributedCheckpointIO` calls it for all ranks; a strategy that shards over a group can name that group.

    Args:
        state: Tensors, DTensors and ShardedTensors, and plain values, in dicts, lists and tuples nested as you like.
            Its structure, and what is no tensor, is taken from rank 0, except for values of :class:`PerRank`.
        path: A local path; that of rank 0 counts.
        process_group: The ranks that write. Default: all; without a process group there is only this process.

    Raises:
        CheckpointError: A rank could not write its part. All ranks raise, and what was at ``path`` is still there.
    """
    ranks = Ranks(process_group, f"The checkpoint {str(path)!r} was not written", state)
    where = local_path(path)
    temporary, lock = "", None
    files: dict[str, tuple[int, int]] = {}
    places: dict[str, Any] = {}

    def begin() -> tuple[str, dict[str, Any], bool, list[str], list[str]]:
        nonlocal temporary, lock
        split = Split(state)
        ranks.state = split.structure
        if ranks.rank == 0:
            check_name(where)
            refuse_foreign(where)
            temporary = make_temporary(where)
            lock = lock_folder(temporary)
        parts.append(split)
        alone = ranks.size == 1
        summary.update({n: (t.nbytes, "" if alone else fingerprint(t)) for n, t in split.replicated.items()})
        sent = summary if ranks.rank == 0 else {}  # no rank needs those of all
        return temporary, sent, bool(split.sharded), list(split.elsewhere) if ranks.rank == 0 else [], list(split.own)

    def finish() -> tuple[dict[str, tuple[int, int]], dict[str, Any]]:
        split = parts[0]
        if ranks.rank == 0:
            files[PLAIN] = save_checksummed(split.content(), os.path.join(folder, PLAIN))
        if split.own:
            ranks.state, name = split.own, rank_file(ranks.rank)
            files[name] = save_checksummed(split.own, os.path.join(folder, name))
        return files, places

    def publish() -> None:
        if ranks.rank == 0:
            every = {name: sums for each, _ in results for name, sums in each.items()}
            _check_seen(folder, every)
            write_manifest(folder, ranks.size, every, places)
            put_in_place(folder, where)

    parts: list[Split] = []
    summary: Summary = {}
    try:
        begun = ranks.together(begin)
        folder = begun[0][0]
        if differ := {rank: f"has {own} per rank." for rank, (*_, own) in enumerate(begun) if own != begun[0][-1]}:
            raise ranks.error({0: f"has {begun[0][-1]} per rank.", **differ})
        first, elsewhere = begun[0][1], begun[0][3]
        found = _find(ranks, parts[0], elsewhere) if elsewhere else {}
        if first or found or any(sharded for _, _, sharded, *_ in begun):
            differ_here = [name for name, seen in first.items() if summary.get(name) != seen]
            unlike = {name for names in ranks.together(lambda: differ_here) for name in names}
            files, places = _write(ranks, parts[0], first, unlike, found, folder)
        results = ranks.together(finish)
        ranks.together(publish)
    finally:
        if temporary and os.path.isdir(temporary):
            shutil.rmtree(temporary, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _find(ranks: Ranks, split: Split, names: list[str]) -> dict[str, int]:
    """Find the first rank that has each of the tensors that rank 0 has not."""

    def here() -> list[str]:
        return [name for name in names if name in split.tensors and not split.tensors[name].is_meta]

    found: dict[str, int] = {}
    for rank, theirs in enumerate(ranks.together(here)):
        found |= {name: rank for name in theirs if name not in found}
    if ranks.rank == 0:
        split.nowhere([name for name in names if name not in found])
    return found


def _write(
    ranks: Ranks, split: Split, summary: Summary, unlike: Collection[str], found: Mapping[str, int], folder: str
) -> tuple[dict[str, tuple[int, int]], dict[str, Any]]:
    owners = _share_out(summary, unlike, ranks.size)
    mine = {**split.sharded, **{name: split.replicated[name] for name, rank in owners.items() if rank == ranks.rank}}
    mine |= {name: split.tensors[name] for name, rank in found.items() if rank == ranks.rank}
    from treadle_fabric.checkpoint.distributed.dcp import RanksFailedError, write_tensors  # heavy

    try:
        return write_tensors(mine, folder, ranks.group, ranks.size == 1)
    except RanksFailedError as e:
        raise ranks.error({rank: ranks.told(error) for rank, error in e.failures.items()}) from e


def _share_out(summary: Summary, unlike: Collection[str], size: int) -> dict[str, int]:
    """The rank that writes each tensor: the one with the fewest bytes so far, or rank 0 if not all have the same."""
    load = [0] * size
    owners: dict[str, int] = {}
    for name, (nbytes, _) in summary.items():
        owners[name] = 0 if name in unlike else load.index(min(load))
        load[owners[name]] += nbytes
    return owners


def _check_seen(folder: str, files: Mapping[str, tuple[int, int]]) -> None:
    for name, (size, _) in files.items():
        file = os.path.join(folder, name)
        if not os.path.isfile(file) or os.path.getsize(file) != size:
            raise CheckpointError(
                f"another rank wrote {name!r}, and here it is not to be seen. Save to a file system that all machines "
                "share."
            )
