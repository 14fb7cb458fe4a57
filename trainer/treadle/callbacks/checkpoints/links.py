"""A second name for a checkpoint: a hard link or a symbolic link."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from treadle.callbacks.checkpoints.paths import is_local
from treadle_fabric import CheckpointError
from treadle_fabric.checkpoint import copy_to_disk, hidden_beside, link_folder, put_in_place

__all__ = ["link_checkpoint"]


def link_checkpoint(
    target: str, link: str, *, symbolic: bool, after_saves: Callable[[Callable[[], None]], None] | None = None
) -> bool:
    """Give a checkpoint a second name, which replaces what had that name before.

    Args:
        target: the path of the checkpoint.
        link: the path of the second name.
        symbolic: make a relative symbolic link. Otherwise make a hard link, which stays when ``target`` is removed; a
            checkpoint that is a folder becomes a second folder, with a hard link for each file.
        after_saves: takes a function and runs it once ``target`` is written, as :attr:`CheckpointIO.after_saves` does.
            None: ``target`` is written already.

    Returns:
        Whether there is, or will be, a second name. False for a remote path, where links cannot be made, and where
        nothing lies at ``target``, because a CheckpointIO of the user's keeps its checkpoints elsewhere.

    Raises:
        CheckpointError: the second name cannot be put in the place of the old file.
    """
    if not (is_local(target) and is_local(link)):
        return False
    fresh = Path(hidden_beside(link, "link"))
    try:
        fresh.parent.mkdir(parents=True, exist_ok=True)
        if after_saves is None:
            if not os.path.lexists(target):
                return False
            if os.path.isdir(target) and not symbolic:
                link_folder(target, link)
                return True
        if after_saves is None or symbolic:
            _link(target, fresh, symbolic)
        if after_saves is not None:
            fresh.unlink(missing_ok=True)  # links can be made; a write that fails is to leave none behind
    except OSError:  # a file system without links
        with suppress(OSError):
            fresh.unlink(missing_ok=True)
        return False
    if after_saves is None:
        with _in_place(fresh, link):
            put_in_place(str(fresh), link)
    else:  # the old file keeps the name until the new checkpoint is written
        after_saves(lambda: _link_written(target, fresh, link, symbolic))
    return True


def _link_written(target: str, fresh: Path, link: str, symbolic: bool) -> None:
    """Make the second name in the thread that wrote ``target``; where there are no hard links, a copy."""
    with _in_place(fresh, link):
        if os.path.isdir(target) and not symbolic:
            link_folder(target, link, or_copy=True)
            return
        try:
            _link(target, fresh, symbolic)
        except OSError:
            copy_to_disk(target, str(fresh))
        put_in_place(str(fresh), link)


def _link(target: str, fresh: Path, symbolic: bool) -> None:
    if symbolic:
        fresh.symlink_to(os.path.relpath(target, fresh.parent))
    else:
        os.link(target, fresh)


@contextmanager
def _in_place(fresh: Path, link: str) -> Generator[None]:
    """Give ``fresh`` the name ``link`` inside; nothing of it is left where that fails."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"The second name {link!r} of a checkpoint could not be put in place: {error}."
        ) from error
    finally:
        with suppress(OSError):
            fresh.unlink(missing_ok=True)
