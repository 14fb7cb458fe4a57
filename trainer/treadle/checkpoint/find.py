"""Which file or folder a run starts from: what ``ckpt_path`` means, and where the newest checkpoint lies."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any, Final

from treadle.callbacks.callback import Callback
from treadle_fabric import MisconfigurationException, newest_good, rank_zero_warn
from treadle_fabric.checkpoint import checkpoints_in, written_at
from treadle_fabric.loggers import Logger

__all__ = ["find_checkpoint", "find_newest"]
PREEMPTED: Final = "preempted.ckpt"
"""What a run saves when it is asked to terminate; "last" finds it beside the last checkpoint."""
_NEEDED: Final = ("state_dict", "optimizer_states")
"""Without these keys training cannot go on from a checkpoint."""


def preempted_path(callbacks: Sequence[Callback], root: str) -> str:
    """Where a run that is asked to terminate saves: beside its checkpoints."""
    folders = [folder for c in callbacks if (folder := getattr(c, "dirpath", None))]
    return str(Path(folders[0] if folders else root) / PREEMPTED)


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
                f"Several ModelCheckpoints have a best checkpoint; ckpt_path='best' means the first: {found[0]}."
            )
        return str(found[0])
    if ckpt_path == "last":
        known = [path for c in savers if (path := getattr(c, "last_model_path", "")) and os.path.exists(path)]
        times = [(written_at(path), path) for path in known]
        for saver in savers:
            folders = [saver.dirpath] if saver.dirpath else _default_runs(loggers, root) if fitting else []
            lasts = checkpoints_in(folders, recursive=not saver.dirpath, names=("*last*.ckpt", PREEMPTED))
            times += [(time, str(path)) for path, time in lasts]
        if times:
            return max(times, key=lambda entry: entry[0])[1]
        if fitting:
            return None
        raise MisconfigurationException("ckpt_path='last' found no checkpoint: pass a path.")
    if ckpt_path == "hpc":
        numbered = {
            int(m.group(1)): p
            for p in Path(root).glob("hpc_ckpt_*.ckpt")
            if (m := re.search(r"hpc_ckpt_(\d+)", p.name))
        }
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
    folders = [Path(folder) for c in callbacks if (folder := getattr(c, "dirpath", None)) and "://" not in str(folder)]
    found = []
    if root is not None:
        folders += [Path(runs) for logger in loggers if "://" not in (runs := _runs_of(logger, root))]
        folders.append(Path(root, "checkpoints"))
        found.append(newest_good(root, recursive=False, holds=_NEEDED))
    found.insert(0, newest_good(folders, holds=_NEEDED))
    paths = [path for path in found if path is not None]
    return str(max(paths, key=written_at)) if paths else None


def _default_runs(loggers: Sequence[Logger], root: str) -> list[str]:
    """Where the checkpoints of callbacks without a folder lie, those of earlier runs included."""
    folders = [_runs_of(logger, root) for logger in loggers] or [os.path.join(root, "checkpoints")]
    return [folder for folder in folders if "://" not in folder]


def _runs_of(logger: Logger, root: str) -> str:
    return logger.runs_dir or os.path.join(logger.save_dir or root, str(logger.name))
