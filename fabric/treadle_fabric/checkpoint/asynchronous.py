"""Checkpoints that a background thread writes while training goes on."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import pickle
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch.distributed as dist

from treadle_fabric import tensor_pickle
from treadle_fabric.checkpoint.archive import state_path_of
from treadle_fabric.checkpoint.host.arena import Arena
from treadle_fabric.checkpoint.io import CheckpointIO
from treadle_fabric.checkpoint.torch_io import TorchCheckpointIO
from treadle_fabric.coordination import HostGroup, group_apart
from treadle_fabric.errors import CheckpointError, MisconfigurationException
from treadle_fabric.rank_zero import rank_zero_warn
from treadle_fabric.types import PathLike

__all__ = ["AsyncCheckpointIO"]


class AsyncCheckpointIO(CheckpointIO):
    """Writes checkpoints in the background; a save returns as soon as the state is copied to host memory.

    Around :class:`DistributedCheckpointIO` each rank copies and writes its part. The ranks agree in the call who writes
    what, by one small message; later they talk through a process group of their own, beside which they train.

    Later changes of the weights do not reach the file. At most one write is in flight: a second save waits for the
    first before it copies, so that no more than one copy is in memory. The memory of the copy, pinned if the state is
    on a CUDA device, is kept for the next save until :meth:`teardown`. Removals and writes happen in the order in which
    they were asked for, and after a write that failed nothing is removed. An error in the background is raised by the
    next save or load, by :meth:`wait` or by :meth:`teardown`; if none of them is called, it is printed when the process
    ends, with exit status 1. The process does not end before everything is written.

    Args:
        checkpoint_io: Does the writing. Default: :class:`TorchCheckpointIO`.

    Raises:
        MisconfigurationException: ``checkpoint_io`` is no CheckpointIO, writes in the background itself, or has all
            ranks write, but no way to do so later.
    """

    def __init__(self, checkpoint_io: CheckpointIO | None = None) -> None:
        if checkpoint_io is not None and not isinstance(checkpoint_io, CheckpointIO):
            raise MisconfigurationException(
                f"AsyncCheckpointIO(checkpoint_io={checkpoint_io!r}): give a CheckpointIO, or nothing."
            )
        if checkpoint_io is not None and checkpoint_io.after_saves is not None:
            raise MisconfigurationException(
                f"AsyncCheckpointIO(checkpoint_io={type(checkpoint_io).__name__}): that one writes in the background "
                "already. Use it alone."
            )
        if checkpoint_io is not None and checkpoint_io.sharded and checkpoint_io.shared_saves is None:
            raise MisconfigurationException(
                f"AsyncCheckpointIO(checkpoint_io={type(checkpoint_io).__name__}): there all ranks write together with "
                "a save_checkpoint of its own, which a background thread cannot call while training uses the process "
                "group. Use it alone, or give it `shared_saves`, or use DistributedCheckpointIO."
            )
        self._checkpoint_io = checkpoint_io or TorchCheckpointIO()
        self._start_anew()

    def _start_anew(self) -> None:
        self._process = os.getpid()
        self._writer: ThreadPoolExecutor | None = None
        self._pending: list[Future[None]] = []
        self._error: BaseException | None = None
        self._arena = Arena()
        self._group: tuple[Any, HostGroup] | None = None  # of a default group, and what was made beside it

    def __getstate__(self) -> dict[str, Any]:
        """What goes to a spawned process."""
        return {"_checkpoint_io": self._checkpoint_io}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start_anew()

    @property
    def checkpoint_io(self) -> CheckpointIO:
        """What does the writing."""
        return self._checkpoint_io

    @property
    def sharded(self) -> bool:
        return self._checkpoint_io.sharded

    @property
    def path_is_all(self) -> bool:
        return self._checkpoint_io.path_is_all

    @property
    def after_saves(self) -> Callable[[Callable[[], None]], None]:
        return self._submit_unless_failed

    def save_checkpoint(self, checkpoint: dict[str, Any], path: PathLike, storage_options: Any | None = None) -> None:
        """Copy ``checkpoint`` to host memory, and have it written to ``path``.

        Args:
            checkpoint: Anything that ``torch.save`` takes.
            path: As for the wrapped CheckpointIO.
            storage_options: As for the wrapped CheckpointIO.

        Raises:
            CheckpointError: The state cannot be pickled, or an earlier save failed. This save was not begun then.
                Where every rank calls, all raise.
        """
        self._leave_to_parent()
        begin = self._checkpoint_io.shared_saves
        if begin is not None:
            save = begin(checkpoint, path, storage_options, before=self.wait, arena=self._arena)
            group = self._group_apart()
            self._submit(lambda: save.write(group))
            return
        self.wait()
        copied = [_copy(checkpoint, path, self._arena)]

        def write() -> None:
            state = copied.pop()()  # nothing refers to the copy when the write has ended
            self._checkpoint_io.save_checkpoint(state, path, storage_options)

        self._submit(write)

    def load_checkpoint(
        self, path: PathLike, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        self.wait()  # what was saved is there to be loaded
        return self._checkpoint_io.load_checkpoint(path, map_location, weights_only)

    def remove_checkpoint(self, path: PathLike) -> None:
        """Have the checkpoint at ``path`` deleted once all saves so far have ended well; if one fails, it stays.

        If it cannot be deleted, that is a warning: nothing is lost.
        """

        def remove() -> None:
            try:
                self._checkpoint_io.remove_checkpoint(path)
            except (CheckpointError, OSError) as e:
                rank_zero_warn(f"The checkpoint {str(path)!r} stays: {e}")

        self._submit_unless_failed(remove)

    def wait(self) -> None:
        if self._process == os.getpid():  # a forked process has no part in what its parent's thread does
            for job in self._pending:
                job.result()
        self._pending = []
        error, self._error = self._error, None
        _used.discard(self)
        if error is not None:
            raise error

    def teardown(self) -> None:
        try:
            self.wait()
        finally:
            if self._writer is not None:
                self._writer.shutdown()
                self._writer = None
            self._arena.close()
            self._group = None
            self._checkpoint_io.teardown()

    def _group_apart(self) -> HostGroup | None:
        """The group of the thread that writes; the first call with a process group makes it, on every rank."""
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return None
        default = dist.group.WORLD
        if self._group is None or self._group[0] is not default:
            self._group = default, group_apart()
        return self._group[1]

    def _submit_unless_failed(self, action: Callable[[], None]) -> None:
        self._submit(lambda: None if self._error is not None else action())

    def _submit(self, action: Callable[[], None]) -> None:
        self._leave_to_parent()
        if self._writer is None:
            # A thread that is no daemon: the interpreter waits for it, whatever ends the run
            self._writer = ThreadPoolExecutor(1, "treadle-checkpoint-writer")
        _used.add(self)
        self._pending = [job for job in self._pending if not job.done()]
        self._pending.append(self._writer.submit(self._work, action))

    def _leave_to_parent(self) -> None:
        """In a forked process: the thread, what it had to do, and the memory for that are the parent's."""
        if self._process != os.getpid():
            self._start_anew()

    def _work(self, action: Callable[[], None]) -> None:
        try:
            action()
        except BaseException as e:
            self._error = self._error or e


# --- the end of the process ---

_used: set[AsyncCheckpointIO] = set()
"""Stores whose errors, if any, were not raised yet. The references are strong: an error must outlive its store."""


def _report() -> None:
    """Runs at the end of the process, after the writers have ended and after the exit handlers registered later."""
    errors = [each._error for each in _used if each._error is not None and each._process == os.getpid()]
    if not errors:
        return
    with contextlib.suppress(OSError, ValueError):  # the streams may be closed
        for error in errors:
            traceback.print_exception(error)
        print("A checkpoint that was saved in the background was not written; see above.", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(1)  # an exception would not change the exit status any more


atexit.register(_report)


# --- the copy ---


def _copy(checkpoint: Any, path: PathLike, arena: Arena) -> Callable[[], Any]:
    """Copy ``checkpoint`` as ``torch.save`` would write it, and return a function that puts it together again.

    Everything but the bytes of tensors is pickled at once, so that nothing changes any more, tensors that share memory
    still do, and the caller learns what cannot be pickled.
    """
    try:
        stream, storages = tensor_pickle.dump(checkpoint)
    except (pickle.PicklingError, AttributeError, TypeError) as e:
        raise CheckpointError(
            f"The checkpoint {str(path)!r} was not written: {state_path_of(checkpoint)} cannot be pickled ({e}). Save "
            "its state_dict() or plain values, or leave it out."
        ) from e
    return functools.partial(tensor_pickle.load, stream, arena.copy(storages)[0])
