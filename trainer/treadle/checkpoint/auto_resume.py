"""Where a run that is started again finds the newest checkpoint of the one before."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from treadle.callbacks.callback import Callback
from treadle_fabric import newest_good
from treadle_fabric.checkpoint import representative
from treadle_fabric.loggers import Logger

__all__ = ["find_newest"]


def find_newest(callbacks: Sequence[Callback], loggers: Sequence[Logger], root: str) -> str | None:
    """The newest checkpoint, of this run or of earlier ones, that is whole and that training can go on from.

    Args:
        callbacks: In whose folders it is looked for.
        loggers: In the folders of whose runs it is looked for, all versions included.
        root: ``default_root_dir``: itself, with what it has for requeued jobs, and its ``checkpoints``.

    Returns:
        Its path; None where there is none. Damaged ones are named in warnings.
    """
    folders = [Path(folder) for c in callbacks if (folder := getattr(c, "dirpath", None)) and "://" not in str(folder)]
    folders += [Path(logger.save_dir or root, str(logger.name)) for logger in loggers]
    folders.append(Path(root, "checkpoints"))
    found = [newest_good(folders, holds=_NEEDED), newest_good(root, recursive=False, holds=_NEEDED)]
    paths = [path for path in found if path is not None]
    return str(max(paths, key=lambda p: os.path.getmtime(representative(p)))) if paths else None


_NEEDED = ("state_dict", "optimizer_states")
