"""Which file or folder ``ckpt_path`` means."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any, Final

from treadle.callbacks.callback import Callback
from treadle_fabric import MisconfigurationException, rank_zero_warn
from treadle_fabric.checkpoint import bring_back, representative

__all__ = ["find_checkpoint"]
PREEMPTED: Final = "preempted.ckpt"
"""What a run saves when it is asked to terminate; "last" finds it beside the last checkpoint."""


def preempted_path(callbacks: Sequence[Callback], root: str) -> str:
    """Where a run that is asked to terminate saves: beside its checkpoints."""
    folders = [folder for c in callbacks if (folder := getattr(c, "dirpath", None))]
    return str(Path(folders[0] if folders else root) / PREEMPTED)


def find_checkpoint(ckpt_path: Any, callbacks: Sequence[Callback], root: str, *, fitting: bool) -> str | None:
    """The file that ``ckpt_path`` means.

    Args:
        ckpt_path: a path, "best", "last", "hpc" or None.
        callbacks: whose checkpoints "best" and "last" mean.
        root: ``default_root_dir``, where "hpc" is looked for.
        fitting: in fit, "last" without a file starts from the beginning.

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
        paths = [Path(c.last_model_path) for c in savers if getattr(c, "last_model_path", "")]
        for saver in savers:
            folder = Path(saver.dirpath) if saver.dirpath else None
            if folder is not None and folder.is_dir():
                bring_back(folder)
                paths += [*folder.glob("*last*.ckpt"), folder / PREEMPTED]
        paths = [p for p in paths if p.exists()]
        if paths:
            return str(max(paths, key=lambda p: os.stat(representative(p)).st_mtime))
        if fitting:
            rank_zero_warn("ckpt_path='last' found no checkpoint: training starts from the beginning.")
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
