"""Ranks that act together and fail together, without a list of all ranks anywhere but on rank 0."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout

from treadle_fabric.checkpoint.torch_file import reason_of, why_not_written
from treadle_fabric.coordination import HostGroup, host_group
from treadle_fabric.errors import CheckpointError

__all__ = []

T = TypeVar("T")


class Outcome(NamedTuple):
    """What an action of a rank came to."""

    result: Any
    reason: str | None = None
    """Why it failed; None: it did not."""
    complete: bool = False
    """Whether the reason is what all ranks are to raise, word for word."""


class Ranks:
    """The ranks of a process group, which act together and fail together.

    What a rank learns does not grow with the number of ranks, except for rank 0. All waits are patient: another rank
    may be writing, be it for hours.

    Args:
        group: The process group, or a group of hosts. None: all ranks, or this process alone without a process group.
        failure: The first words of the error that all raise: "The checkpoint 'a.ckpt' was not written".
        state: What is being saved, to name in it what cannot be pickled. None: nothing is saved.
    """

    def __init__(self, group: Any | None, failure: str, state: Any = None) -> None:
        self.state = state
        self._failure = failure
        self._error: Exception | None = None
        if group is None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            group = host_group()
        if group is not None and not isinstance(group, HostGroup):
            group = HostGroup(group, default_pg_timeout)
        self._host: HostGroup | None = group
        self.rank: int = 0 if group is None else group.group.rank()
        self.size: int = 1 if group is None else group.group.size()

    @property
    def group(self) -> Any | None:
        """The process group; None where there is only this process."""
        return None if self._host is None else self._host.group

    def together(self, action: Callable[[], T]) -> T:
        """Act on every rank; if one rank fails, all raise. In the good case it takes one small message."""
        return self.compared(action, lambda _: 0)[0]

    def compared(self, action: Callable[[], T], number: Callable[[T], int]) -> tuple[T, bool]:
        """Act on every rank, and tell whether a number that each makes of its result is the same on all of them.

        Args:
            action: If it fails on one rank, all raise.
            number: Of 63 bits.

        Returns:
            The result of this rank, and whether the numbers are the same.
        """
        result: Any = None
        error: Exception | None = None
        mine = 0
        try:
            result = action()
            mine = number(result)
        except Exception as e:
            error = e
        failed, highest, lowest = self._largest([int(error is not None), mine, -mine])
        if failed:
            self._raise_all(error)
        return result, highest == -lowest

    def any(self, flags: list[bool]) -> list[bool]:
        """Of each of some flags whether it is set on any rank; all have the same number of flags."""
        return [bool(value) for value in self._largest([int(flag) for flag in flags])]

    def first_with(self, flags: list[bool]) -> list[int | None]:
        """Of each of some flags the first rank on which it is set; all have the same number of flags."""
        found = self._largest([self.size - self.rank if flag else 0 for flag in flags])
        return [self.size - value if value else None for value in found]

    def of_first(self, action: Callable[[], T]) -> T:
        """Act on rank 0 alone, and give the result to all; if it fails, all raise."""
        outcome, error = Outcome(None), None
        if self.rank == 0:
            try:
                outcome = Outcome(action())
            except Exception as e:
                error, outcome = e, Outcome(None, str(e if _is_complete(e) else self.error({0: self.told(e)})))
        if self._host is not None:
            self._host.barrier("a checkpoint", patient=True)
            outcome = Outcome(*pickle.loads(self._host.bytes_of(0, pickle.dumps(tuple(outcome)))))
        if outcome.reason is not None:
            raise _completed(CheckpointError(outcome.reason)) from error
        return outcome.result  # type: ignore[no-any-return]

    def to_first(self, action: Callable[[], Any]) -> list[Outcome]:
        """Act on every rank, and bring what came of it to rank 0, which is to tell the others with :meth:`of_first`.

        Returns:
            On rank 0 the outcomes of all ranks, in their order; elsewhere that of this rank.
        """
        try:
            outcome, self._error = Outcome(action()), None
        except Exception as e:
            self._error, outcome = e, Outcome(None, self.told(e))
        return self._gathered(outcome)

    def results_of(self, outcomes: list[Outcome]) -> list[Any]:
        """The results of all ranks; if one failed, this raises what all ranks are to be told."""
        failed = {rank: each.reason for rank, each in enumerate(outcomes) if each.reason is not None}
        if failed:
            complete = [each.reason for each in outcomes if each.complete and each.reason is not None]
            raise _completed(CheckpointError(complete[0]) if complete else self.error(failed)) from self._error
        return [each.result for each in outcomes]

    def error(self, reasons: Mapping[int, str]) -> CheckpointError:
        """What all ranks raise."""
        told = " ".join(f"rank {rank}: {reason}" if self.size > 1 else reason for rank, reason in reasons.items())
        return CheckpointError(f"{self._failure}: {told}")

    def told(self, error: BaseException) -> str:
        """What went wrong, in sentences."""
        if isinstance(error, CheckpointError):
            return str(error)
        return f"{reason_of(error)}." if self.state is None else why_not_written(error, self.state)

    def _gathered(self, outcome: Outcome) -> list[Outcome]:
        if self._host is None:
            return [outcome]
        self._host.barrier("a checkpoint", patient=True)
        sent = self._host.gather_bytes(pickle.dumps(tuple(outcome)))
        return [outcome] if sent is None else [Outcome(*pickle.loads(each)) for each in sent]

    def _largest(self, values: list[int]) -> list[int]:
        return values if self._host is None or not values else self._host.largest(values, patient=True)

    def _raise_all(self, error: Exception | None) -> None:
        """Raise on all ranks, because the action of some failed."""
        self._error = error
        mine = Outcome(None) if error is None else Outcome(None, self.told(error), _is_complete(error))
        outcomes = self._gathered(mine)
        self.of_first(lambda: self.results_of(outcomes))


def _completed(error: CheckpointError) -> CheckpointError:
    """Mark an error as one that all ranks raise with the same text, which needs no more words."""
    error._treadle_complete = True  # type: ignore[attr-defined]
    return error


def _is_complete(error: BaseException) -> bool:
    return getattr(error, "_treadle_complete", False)


def raise_together(action: Callable[[], T], failure: str) -> T:
    """Act on every rank; if one fails, all raise: those that failed their own error. Every rank calls this.

    Args:
        action: What each rank does.
        failure: The first words of the error of the other ranks: "A checkpoint was not written".
    """
    errors: list[Exception] = []

    def noted() -> T:
        try:
            return action()
        except Exception as e:
            errors.append(e)
            raise

    try:
        return Ranks(None, failure).together(noted)
    except CheckpointError:
        if errors:
            raise errors[0] from None
        raise
