"""GradientAccumulationScheduler: accumulates over a number of batches that depends on the epoch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from treadle.callbacks.callback import Callback
from treadle_fabric.errors import MisconfigurationException

if TYPE_CHECKING:
    from treadle.contracts import LightningModule, Trainer

__all__ = ["GradientAccumulationScheduler"]


class GradientAccumulationScheduler(Callback):
    """Set ``trainer.accumulate_grad_batches`` at the start of an epoch.

    Args:
        scheduling: epoch (from 0) -> number of batches from that epoch on; ``{4: 2}`` accumulates over 2 from the
            fifth epoch, and not at all before.

    Raises:
        MisconfigurationException: for anything else, for a module with manual optimization, and for a trainer that
            has ``accumulate_grad_batches`` of its own.
    """

    def __init__(self, scheduling: dict[int, int]) -> None:
        super().__init__()
        if not isinstance(scheduling, dict) or not scheduling:
            raise MisconfigurationException(
                f"GradientAccumulationScheduler({scheduling!r}): it takes a dictionary of epochs and numbers of "
                "batches, such as {0: 1, 4: 2}."
            )
        for epoch, factor in scheduling.items():
            if not _is_int(epoch, 0) or not _is_int(factor, 1):
                raise MisconfigurationException(
                    f"GradientAccumulationScheduler got {epoch!r}: {factor!r}; an epoch is an int of 0 or more, a "
                    "number of batches an int of 1 or more."
                )
        self.scheduling = {0: 1, **scheduling}
        self.epochs = sorted(self.scheduling)
        self._in_charge = False

    def going_to_accumulate_grad_batches(self) -> bool:
        """Whether any epoch accumulates."""
        return any(factor > 1 for factor in self.scheduling.values())

    def get_accumulate_grad_batches(self, epoch: int) -> int:
        """The number of batches in an epoch."""
        return self.scheduling[max(begin for begin in self.epochs if begin <= epoch)]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what would set the number as well."""
        if stage != "fit":
            return
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                "GradientAccumulationScheduler needs automatic optimization: with `automatic_optimization = False` it "
                "is the training step that decides when to step."
            )
        if trainer.accumulate_grad_batches != 1:
            raise MisconfigurationException(
                f"Trainer(accumulate_grad_batches={trainer.accumulate_grad_batches}) and GradientAccumulationScheduler "
                "both set the number of batches: keep one of them."
            )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the epoch's number of batches."""
        self._in_charge = True
        trainer.accumulate_grad_batches = self.get_accumulate_grad_batches(trainer.current_epoch)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the trainer back as it was, for the next fit."""
        self._give_back(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The same where training ends early."""
        self._give_back(trainer)

    def _give_back(self, trainer: Trainer) -> None:
        if self._in_charge:
            self._in_charge = False
            trainer.accumulate_grad_batches = 1


def _is_int(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
