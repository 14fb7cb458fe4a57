"""GradientAccumulationScheduler: accumulates over a number of batches that depends on the epoch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from treadle.callbacks.callback import Callback
from treadle_fabric import MisconfigurationException, check_integer

if TYPE_CHECKING:
    from treadle.contracts import LightningModule, Trainer

__all__ = ["GradientAccumulationScheduler"]


class GradientAccumulationScheduler(Callback):
    """Set ``trainer.accumulate_grad_batches`` at the start of each epoch.

    Args:
        scheduling: the number of batches to accumulate gradients over, by the epoch (counted from 0) that it begins
            with; ``{4: 2}`` accumulates over 2 batches from the fifth epoch on, and not at all before.

    Raises:
        MisconfigurationException: ``scheduling`` is anything else; and when fit begins, the module has manual
            optimization, or the trainer was given ``accumulate_grad_batches``.
    """

    def __init__(self, scheduling: Mapping[int, int]) -> None:
        super().__init__()
        if not isinstance(scheduling, Mapping) or not scheduling:
            raise MisconfigurationException(
                f"GradientAccumulationScheduler({scheduling!r}): it takes a dictionary of epochs and numbers of "
                "batches, such as {0: 1, 4: 2}."
            )
        self.scheduling = {0: 1}
        for key, batches in scheduling.items():
            epoch = check_integer("GradientAccumulationScheduler: epoch", key, minimum=0)
            self.scheduling[epoch] = check_integer(
                f"GradientAccumulationScheduler: scheduling[{epoch}]", batches, minimum=1
            )
        self.epochs = sorted(self.scheduling)
        self._in_charge = False

    def going_to_accumulate_grad_batches(self) -> bool:
        """Tell whether any epoch accumulates over several batches."""
        return any(factor > 1 for factor in self.scheduling.values())

    def get_accumulate_grad_batches(self, epoch: int) -> int:
        """Return the number of batches that an epoch accumulates over."""
        return self.scheduling[max(begin for begin in self.epochs if begin <= epoch)]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a module or a trainer that decides about the number of batches as well."""
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

    def on_train_epoch_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Set the number of batches of the epoch."""
        self._in_charge = True
        trainer.accumulate_grad_batches = self.get_accumulate_grad_batches(trainer.current_epoch)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the trainer's number of batches back to 1, for the next fit."""
        self._give_back(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Set the trainer's number of batches back to 1 where an exception ends training."""
        self._give_back(trainer)

    def _give_back(self, trainer: Trainer) -> None:
        if self._in_charge:
            self._in_charge = False
            trainer.accumulate_grad_batches = 1
