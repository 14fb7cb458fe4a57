"""A second name for a checkpoint: a hard link or a symbolic link."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from treadle.callbacks.checkpoints.paths import is_local
from treadle_fabric import CheckpointError
from treadle_fabric.checkpoint import hidden_beside, link_folder, put_in_place

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
        Whether there is, or will be, a second name. False for a remote path, and where links cannot be made.

    Raises:
        CheckpointError: the second name cannot be put in the place of the old file.
    """
    if not (is_local(target) and is_local(link)):
        return False
    fresh = Path(hidden_beside(link, "link"))
    try:
        fresh.parent.mkdir(parents=True, exist_ok=True)
        fresh.unlink(missing_ok=True)
        if symbolic:
            fresh.symlink_to(os.path.relpath(target, fresh.parent))
        elif after_saves is not None:
            pass  # it is not there yet
        elif os.path.isdir(target):
            link_folder(target, link)
            return True
        else:
            os.link(target, fresh)
    except OSError:  # a file system without links
        with suppress(OSError):
            fresh.unlink(missing_ok=True)
        return False
    if after_saves is None:
        _put_in_place(fresh, link)
    else:  # the old file keeps the name until the new checkpoint is written
        after_saves(lambda: _put_in_place(fresh, link, None if symbolic else target))
    return True


def _put_in_place(fresh: Path, link: str, target: str | None = None) -> None:
    """Give ``fresh`` the name ``link``; with ``target``, make ``fresh`` a second name or else a copy of it before."""
    try:
        if target is not None and os.path.isdir(target):
            link_folder(target, link, or_copy=True)
            return
        if target is not None:
            try:
                os.link(target, fresh)
            except OSError:
                shutil.copyfile(target, fresh)
        put_in_place(str(fresh), link)
    except OSError as error:
        raise CheckpointError(
            f"The second name {link!r} of a checkpoint could not be put in place: {error}."
        ) from error
    finally:
        with suppress(OSError):
            fresh.unlink(missing_ok=True)
