"""Which file or folder a run starts from: what ``ckpt_path`` means, and where the newest checkpoint lies."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import PurePath
from typing import Any, Final

from treadle.callbacks.callback import Callback
from treadle.callbacks.checkpoints.names import pattern_of
from treadle.callbacks.checkpoints.paths import is_local, path_exists
from treadle_fabric import CheckpointError, MisconfigurationException, newest_good, rank_zero_info, rank_zero_warn
from treadle_fabric.checkpoint import checkpoints_in, read_outline, read_quickly, remote_checkpoints_in, written_at
from treadle_fabric.loggers import Logger

__all__ = [
    "claim_requeue_path",
    "find_checkpoint",
    "find_newest",
    "find_own",
    "newer",
    "preempted_path",
    "release_requeue_path",
]
PREEMPTED: Final = "preempted.ckpt"
"""What a run saves when it is asked to terminate; "last" finds it beside the last checkpoint."""
_ENDING: Final = ".ckpt"
_NEEDED: Final = ("state_dict", "optimizer_states")
"""Without these keys training cannot go on from a checkpoint."""


def preempted_path(callbacks: Sequence[Callback], root: str) -> str:
    """Where a run that is asked to terminate saves: beside its checkpoints."""
    folders = [folder for c in callbacks if (folder := getattr(c, "dirpath", None))]
    return os.path.join(str(folders[0] if folders else root), PREEMPTED)  # a URL stays one


def find_checkpoint(
    ckpt_path: Any, callbacks: Sequence[Callback], loggers: Sequence[Logger], root: str, *, fitting: bool
) -> str | None:
    """The file that ``ckpt_path`` means.

    Args:
        ckpt_path: a path, "best", "last", "hpc" or None.
        callbacks: whose checkpoints "best" and "last" mean.
        loggers: in fit, "last" means those of earlier runs too, where a callback saves beside the files of a logger.
        root: ``default_root_dir``, where "hpc" is looked for.
        fitting: in fit, None comes back for "last" without a file.

    Raises:
        MisconfigurationException: nothing is meant by it.
    """
    if ckpt_path is None:
        return None
    savers: list[Any] = [c for c in callbacks if hasattr(c, "best_model_path")]
    if ckpt_path == "best":
        found = [c.best_model_path for c in savers if c.best_model_path]
        if not found:
            raise MisconfigurationException(
                "ckpt_path='best' needs a ModelCheckpoint that saved: give the Trainer one with a `monitor` and fit"
                " first, or pass a path."
            )
        if len(found) > 1:
            rank_zero_warn(
                "ckpt_path='best' with a Trainer configured with multiple `ModelCheckpoint` callbacks means the best"
                f" checkpoint of the first: {found[0]}. Pass the path of another, if that is meant."
            )
        return str(found[0])
    if ckpt_path == "last":
        known = [path for c in savers if (path := getattr(c, "last_model_path", "")) and path_exists(path)]
        times = [(written_at(path), path) for path in known]
        for saver in savers:
            own = pattern_of(getattr(saver, "CHECKPOINT_NAME_LAST", "last"))
            names = ("*last*.ckpt", PREEMPTED, *(own + ending for ending in _endings([saver])))
            times += _saved_beside(saver, loggers, root, fitting=fitting, names=names)
        if times:
            return max(times, key=lambda entry: entry[0])[1]
        if fitting:
            return None
        raise MisconfigurationException("ckpt_path='last' found no checkpoint: pass a path.")
    if ckpt_path == "hpc":
        numbered = _requeue_checkpoints(root)
        if not numbered:
            raise MisconfigurationException(f"ckpt_path='hpc' found no hpc_ckpt_N.ckpt in {root}: pass a path.")
        return str(numbered[max(numbered)])
    path = str(ckpt_path)
    if not path:
        raise MisconfigurationException("ckpt_path is empty: pass a path, 'best' or 'last', or leave it out.")
    near = difflib.get_close_matches(path.lower(), ("best", "last", "hpc"), n=1) if path == PurePath(path).stem else []
    if near and not os.path.exists(path):
        raise MisconfigurationException(
            f"ckpt_path={path!r} is no file, and none of the words 'best', 'last' and 'hpc'. Did you mean {near[0]!r}?"
        )
    return path


def find_newest(callbacks: Sequence[Callback], loggers: Sequence[Logger], root: str | None) -> str | None:
    """The newest checkpoint, of this run or of earlier ones, that is whole and that training can go on from.

    Args:
        callbacks: their folders are searched.
        loggers: the folders of their runs are searched: all versions, or the one that the user has named.
        root: ``default_root_dir``: searched are the folder itself, where requeued jobs save, and its ``checkpoints``.
            None: nothing but the folders of the callbacks.

    Returns:
        Its path; None where there is none. Damaged ones are named in warnings.
    """
    folders = [str(folder) for c in callbacks if (folder := getattr(c, "dirpath", None))]
    if root is not None:
        folders += [*(_runs_of(logger, root) for logger in loggers), os.path.join(root, "checkpoints")]
    endings = _endings(callbacks)
    found = [newest_good([folder for folder in folders if is_local(folder)], holds=_NEEDED, endings=endings)]
    if root is not None and is_local(root):
        found.append(newest_good(root, recursive=False, holds=_NEEDED))
    times = [(written_at(path), str(path)) for path in found if path is not None]
    places = [folder for folder in dict.fromkeys(folders) if not is_local(folder)]
    remote = [entry for folder in places for entry in _checkpoints_in(folder, endings=endings)]
    times += filter(None, [_newest_remote(remote)])
    return max(times, key=lambda entry: entry[0])[1] if times else None


def newer(path: str, other: str | None) -> bool:
    """Whether a checkpoint was written later than another one, or there is no other."""
    return other is None or written_at(path) > written_at(other)


def find_own(job: Mapping[str, Any], callbacks: Sequence[Callback], loggers: Sequence[Logger], root: str) -> str | None:
    """The newest checkpoint that this job has written when it was asked to end, before it was queued again.

    Args:
        job: The job and the fit of it, as checkpoints name them.
        callbacks: beside whose checkpoints ``preempted.ckpt`` is looked for.
        loggers: likewise, where a callback saves beside the files of a logger.
        root: where ``hpc_ckpt_N.ckpt`` is looked for.

    Returns:
        Its path; None where there is none. A damaged one is named in a warning, and one of another fit is told of.
    """
    others: list[str] = []
    times = [(written_at(path), path) for path in _requeue_checkpoints(root).values()]
    for saver in [c for c in callbacks if hasattr(c, "best_model_path")]:
        times += _saved_beside(saver, loggers, root, fitting=True, names=(PREEMPTED,))
    for _, path in sorted(times, reverse=True):
        own = read_quickly(path).get("treadle", {}).get("cluster_job")
        if own == job:
            try:
                read_outline(path)
            except CheckpointError as error:
                rank_zero_warn(f"{error} The job goes on from an earlier checkpoint of its own, if there is one.")
                continue
            return path
        if isinstance(own, Mapping) and own.get("name") == job["name"]:
            others.append(f"{path} is of the fit with number {own.get('fit')}")
    if others:
        rank_zero_info(
            f"This job was queued again, and this is the fit with number {job['fit']} of the script: it begins as "
            f"ckpt_path says, because {others[0]}. If it is the same fit, pass ckpt_path='hpc'."
        )
    return None


def claim_requeue_path(root: str) -> str:
    """The path for the next ``hpc_ckpt_N.ckpt``, which no other job gets until :func:`release_requeue_path`."""
    number = max(_requeue_checkpoints(root), default=0) + 1
    while is_local(root):
        path = os.path.join(root, f"hpc_ckpt_{number}.ckpt")
        os.makedirs(root, exist_ok=True)
        try:
            os.close(os.open(_claim(path), os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            pass
        else:
            if not os.path.exists(path):  # a job that shares the folder may have written it just now
                return path
            os.unlink(_claim(path))
        number += 1
    return os.path.join(root, f"hpc_ckpt_{number}.ckpt")


def release_requeue_path(path: str) -> None:
    """End a claim, after the save."""
    with suppress(OSError):
        os.unlink(_claim(path))


def _claim(path: str) -> str:
    return os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.claim")


def _requeue_checkpoints(root: str) -> dict[int, str]:
    """The checkpoints of jobs that were to be queued again, by their numbers."""
    return {
        int(m.group(1)): path
        for _, path in _checkpoints_in(root, recursive=False, names=("hpc_ckpt_*.ckpt",))
        if (m := re.search(r"hpc_ckpt_(\d+)", os.path.basename(path)))
    }


def _saved_beside(
    saver: Any, loggers: Sequence[Logger], root: str, *, fitting: bool, names: Sequence[str]
) -> list[tuple[int, str]]:
    """The checkpoints in the folder of a callback; in fit, in those of earlier runs where it has none yet."""
    folders = [saver.dirpath] if saver.dirpath else _default_runs(loggers, root) if fitting else []
    look = partial(_checkpoints_in, recursive=not saver.dirpath, names=names, endings=_endings([saver]))
    return [entry for folder in folders for entry in look(folder)]


def _newest_remote(found: list[tuple[int, str]]) -> tuple[int, str] | None:
    for time, path in sorted(found, reverse=True):
        try:
            outline = read_outline(path)
        except CheckpointError as error:
            rank_zero_warn(f"{error} The newest good checkpoint before it is used.")
            continue
        if all(key in outline for key in _NEEDED):
            return time, path
    return None


def _checkpoints_in(
    folder: str, *, recursive: bool = True, names: Sequence[str] = ("*",), endings: Collection[str] = (_ENDING,)
) -> list[tuple[int, str]]:
    """The checkpoints in a local or remote folder, with the times at which they were written."""
    look = checkpoints_in if is_local(folder) else remote_checkpoints_in
    return [(time, str(path)) for path, time in look(folder, recursive=recursive, names=names, endings=endings)]


def _endings(savers: Sequence[Any]) -> set[str]:
    """How the names of checkpoints end: what a run saves by itself, and what the callbacks save."""
    return {_ENDING, *(getattr(saver, "FILE_EXTENSION", _ENDING) for saver in savers)}


def _default_runs(loggers: Sequence[Logger], root: str) -> list[str]:
    """Where the checkpoints of callbacks without a folder lie, those of earlier runs included."""
    return [_runs_of(logger, root) for logger in loggers] or [os.path.join(root, "checkpoints")]


def _runs_of(logger: Logger, root: str) -> str:
    return logger.runs_dir or os.path.join(logger.save_dir or root, str(logger.name))
