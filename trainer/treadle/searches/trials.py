"""What a search asks of the trainer that runs its trials."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer

from treadle.module import LightningDataModule, LightningModule

__all__ = ["Trials"]


class Trials(Protocol):
    """Runs a few batches of a stage; after each trial everything is as it was before, also where an error ended it."""

    @property
    def module(self) -> LightningModule:
        """The module that runs."""

    @property
    def datamodule(self) -> LightningDataModule | None:
        """The data module, or None."""

    @property
    def optimizers(self) -> list[Optimizer]:
        """The optimizers that train in a trial; none outside of fit."""

    @property
    def shows_progress(self) -> bool:
        """Whether the search may use the last line of the terminal."""

    @property
    def given_loaders(self) -> Any:
        """The loaders that were passed by the user, and that no attribute changes; None where a method makes them."""

    def configured_groups(self) -> list[dict[str, Any]]:
        """The parameter groups, without their parameters, of what ``configure_optimizers`` returns now."""

    def train(self, before: Callable[[], None], after: Callable[[Tensor | None, bool], bool]) -> None:
        """Train until ``after`` returns True; an epoch that ends is followed by the next one.

        Args:
            before: Called before each batch.
            after: Called after each batch with its part of the mean loss of the accumulation, None where there is none,
                and with whether the batch ends an accumulation.
        """

    def fits(self, steps: int) -> bool:
        """Run ``steps`` batches, or one epoch if that has fewer; returns whether all ranks had memory for them."""

    @property
    def loader_batch_size(self) -> int | None:
        """The batch size of the first loader in the last trial; None where it is not known."""

    @property
    def samples(self) -> int | None:
        """The samples that a rank has in the last trial, of its largest dataset; None where it is not known."""

    def mean(self, value: Tensor | None) -> float | None:
        """The mean of a value over the ranks that have one; None where none has. Every rank calls it."""
