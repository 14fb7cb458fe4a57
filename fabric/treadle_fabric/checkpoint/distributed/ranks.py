"""Ranks that act together and fail together."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch.distributed as dist

from treadle_fabric.checkpoint.torch_file import reason_of, why_not_written
from treadle_fabric.coordination import host_group
from treadle_fabric.errors import CheckpointError, MisconfigurationException
from treadle_fabric.types import PathLike

__all__ = []

T = TypeVar("T")


class Ranks:
    """The ranks of a process group, which act together and fail together.

    Args:
        group: The process group. None: all ranks, or this process alone where there is no process group.
        failure: The first words of the error that all raise: "The checkpoint 'a.ckpt' was not written".
        state: What is being saved, to name in it what cannot be pickled. None: nothing is saved.
    """

    def __init__(self, group: Any | None, failure: str, state: Any = None) -> None:
        self.state = state
        self._failure = failure
        several = dist.is_available() and dist.is_initialized()
        self.rank, self.size = (dist.get_rank(group), dist.get_world_size(group)) if several else (0, 1)
        self.group = host_group().group if group is None and self.size > 1 else group

    def together(self, action: Callable[[], T]) -> list[T]:
        """Act on every rank, and return the results of all ranks; if one rank fails, all raise."""
        result: Any = None
        error: BaseException | None = None
        try:
            result = action()
        except Exception as e:
            error = e
        outcome = (result, None if error is None else self.told(error))
        outcomes: list[Any] = [None] * self.size
        if self.size == 1:
            outcomes = [outcome]
        else:
            dist.all_gather_object(outcomes, outcome, group=self.group)
        failed = {rank: reason for rank, (_, reason) in enumerate(outcomes) if reason is not None}
        if failed:
            raise self.error(failed) from error
        return [each for each, _ in outcomes]

    def error(self, reasons: Mapping[int, str]) -> CheckpointError:
        """What all ranks raise."""
        told = " ".join(f"rank {rank}: {reason}" if self.size > 1 else reason for rank, reason in reasons.items())
        return CheckpointError(f"{self._failure}: {told}")

    def told(self, error: BaseException) -> str:
        """What went wrong, in sentences."""
        if isinstance(error, CheckpointError):
            return str(error)
        return f"{reason_of(error)}." if self.state is None else why_not_written(error, self.state)


def local_path(path: PathLike) -> str:
    """The absolute path, if it is a local one.

    Raises:
        MisconfigurationException: It is a URL.
    """
    text = os.fspath(path)
    if "://" in text:
        raise MisconfigurationException(
            f"{text!r} is a URL, and sharded checkpoints are written to local paths only. Give a path that all "
            "machines see, or use TorchCheckpointIO."
        )
    return os.path.abspath(text)
