"""The paths of checkpoints: what lies there, and whether it may be removed."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from treadle_fabric import CheckpointError, CheckpointIO, Logger, rank_zero_warn
from treadle_fabric.checkpoint import lies_at

__all__ = [
    "absolute",
    "default_folder",
    "is_kept_elsewhere",
    "is_local",
    "path_exists",
    "remove_replaced",
    "run_folder",
    "warn_if_in_use",
]


def is_local(path: str) -> bool:
    """Tell whether a path belongs to a file system of this machine, and is not an fsspec URL."""
    return "://" not in path


def absolute(path: str) -> str:
    """Return a local path as an absolute one that goes through no link; a URL comes back unchanged."""
    return os.path.realpath(os.path.expanduser(path)) if is_local(path) else path


def path_exists(path: str) -> bool:
    """Tell whether anything lies at a local or remote path; a dangling link counts."""
    return lies_at(path)


def default_folder(loggers: Sequence[Logger], root: str) -> str:
    """Return the folder ``checkpoints`` beside the files of the first logger, or in ``root`` without a logger."""
    return absolute(os.path.join(run_folder(loggers, root), "checkpoints"))


def run_folder(loggers: Sequence[Logger], root: str) -> str:
    """Return the folder that the first logger's run has for files of others; ``root`` without a logger."""
    if not loggers:
        return root
    logger = loggers[0]
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return os.path.join(logger.save_dir or root, str(logger.name), version)


def is_kept_elsewhere(path: str) -> bool:
    """Tell whether a checkpoint that was just read lies somewhere else, where a CheckpointIO of the user's has it."""
    try:
        return not lies_at(path)
    except (OSError, ValueError, ImportError):  # a path of a kind that only the CheckpointIO knows
        return True


def warn_if_in_use(folder: str, resumed: str) -> None:
    """Warn of a folder that holds files, unless the run goes on from a checkpoint in that folder."""
    if not is_local(folder) or not os.path.isdir(folder) or not os.listdir(folder):
        return
    if not (resumed and Path(folder) in Path(absolute(resumed)).parents):
        rank_zero_warn(
            f"Checkpoint directory {folder} exists and is not empty: files of another run may lie there. Give each run"
            " a `dirpath` of its own, or leave it out."
        )


def remove_replaced(path: str, folder: str, resumed: str, checkpoint_io: CheckpointIO) -> None:
    """Remove a checkpoint that another one replaced, and the folders between it and ``folder`` that are empty then.

    A checkpoint of another folder stays, and so does the one that the run was resumed from (``resumed``). A failure is
    a warning: a file too many is no reason to stop training. What lies at the path is for the CheckpointIO to say: one
    of the user's may keep a checkpoint elsewhere, or under a longer name.
    """
    parent, name = os.path.split(resumed)
    resumed_from = os.path.join(absolute(parent or os.curdir), name)  # not absolute(resumed): a link is the link
    if not path.startswith(os.path.join(folder, "")) or path == resumed_from:
        return
    tidy = partial(_told, path, partial(_remove_link_and_empty_folders, path, folder))
    if not os.path.islink(path):
        _told(path, partial(checkpoint_io.remove_checkpoint, path))
    checkpoint_io.after_saves(tidy) if checkpoint_io.after_saves is not None else tidy()


def _told(path: str, remove: Callable[[], None]) -> None:
    """Call a function that removes something of a checkpoint; a failure is a warning, in whatever thread."""
    try:
        remove()
    except (OSError, CheckpointError) as error:
        rank_zero_warn(f"ModelCheckpoint could not remove {path!r}: {error}")


def _remove_link_and_empty_folders(path: str, root: str) -> None:
    """Remove the link at ``path``, and the folders that a metric name with a slash made for its file."""
    if not is_local(path):
        return
    if os.path.islink(path):
        os.unlink(path)
    for folder in Path(path).parents:
        if folder == Path(root) or not folder.is_dir() or any(folder.iterdir()):
            return
        folder.rmdir()
