"""What a run does with a loss before it is differentiated, and with the gradients before the optimizer steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from treadle_fabric import local_gradients

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["LossPolicy"]


class LossPolicy(Protocol):
    """How the losses of an accumulation become the gradients of one optimizer step; chosen when the run starts.

    The policies are in :mod:`treadle.numbers`: losses without weights, losses with weights, losses that an engine
    averages, and each of these watched for values that are not finite.
    """

    def observe(self, training_step: Callable[..., Any], *, wants_iterator: bool) -> Callable[..., Any]:
        """Return the ``training_step`` that the loop calls.

        Args:
            training_step: the module's.
            wants_iterator: whether it draws its batches itself, from ``dataloader_iter``.
        """

    def scale(self, loss: Tensor | None, weight: Any, window: float, first: bool, /) -> Tensor | None:
        """Return the loss to differentiate.

        Args:
            loss: the mean over a micro-batch; None where there is none.
            weight: of the micro-batch; None where ``training_step`` gave none.
            window: the number of batches of the accumulation.
            first: whether the accumulation begins with this micro-batch.

        Returns:
            The scaled loss; None where there is nothing to learn: no loss, or a weight of 0.

        Raises:
            MisconfigurationException: the weight is not a number of at least 0, or only some losses have one.
        """

    def prepare(self, optimizers: Sequence[Optimizer], window: float, done: float, /) -> bool:
        """Make the gradients those of one mean over the accumulation; every rank calls it before a step.

        Args:
            optimizers: about to step, all of them together; empty in a fit without optimizers.
            window: the number of batches that the losses were divided by.
            done: the number of batches in the accumulation; fewer where an epoch of unknown length ended.

        Returns:
            Whether the optimizers may step: all of them, or none.
        """

    def forget(self) -> None:
        """Drop what was noted of an accumulation that does not come to its step."""

    def report(self) -> None:
        """Say at the end of fit what happened to the losses."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint in the middle of an accumulation keeps; empty where losses have no weights."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned."""


def gradients_of(optimizers: Sequence[Optimizer]) -> list[Tensor]:
    """The gradients of the parameters of optimizers, those that have one: of each what this rank holds."""
    groups = (group for optimizer in optimizers for group in optimizer.param_groups)
    return local_gradients(p for group in groups for p in group["params"])
