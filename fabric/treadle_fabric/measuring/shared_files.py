"""Find out whether all ranks see the same folder."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from treadle_fabric.coordination import on_rank_zero
from treadle_fabric.strategies import Strategy
from treadle_fabric.types import PathLike

__all__ = ["is_shared_filesystem"]


def is_shared_filesystem(strategy: Strategy, path: PathLike | None = None, timeout: int = 3) -> bool:
    """Return whether a file that rank 0 makes in a folder is seen there by every rank, the same answer on all of them.

    Every rank calls this, after the processes have been launched.

    Args:
        strategy: The strategy: ``fabric.strategy`` or ``trainer.strategy``.
        path: The folder, or a file in it; a URL such as ``s3://...`` is shared. Default: the working directory.
        timeout: Seconds after which a file that is not seen is taken to be never seen.

    Raises:
        FileNotFoundError: On some rank the path does not exist.
        TreadleError: Rank 0 cannot write there.
    """
    if (path is not None and "://" in str(path) and not str(path).startswith("file://")) or strategy.world_size == 1:
        return True
    folder = Path.cwd() if path is None else Path(str(path).removeprefix("file://"))
    folder = folder.parent if folder.is_file() else folder
    if not strategy.reduce_boolean_decision(folder.is_dir()):
        raise FileNotFoundError(f"{folder} does not exist on every rank: give a folder that does.")
    name = strategy.broadcast(f".treadle_shared_{uuid4().hex}")
    on_rank_zero(strategy, (folder / name).touch, f"could not write into {folder}")
    until = time.monotonic() + timeout
    while not (seen := name in os.listdir(folder)) and time.monotonic() < until:
        time.sleep(0.02)
    everywhere = strategy.reduce_boolean_decision(seen)
    if strategy.is_global_zero:
        with suppress(OSError):
            (folder / name).unlink()
    strategy.barrier("is_shared_filesystem")  # no rank goes on with the file in the folder
    return everywhere
