"""Which weights the module has at each hook, and which go into a checkpoint, where weights are averaged."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from treadle.callbacks.averaging.weights import AveragedWeights
from treadle.callbacks.callback import Callback, fit_is_new
from treadle.stages import TrainerFn
from treadle_fabric import MisconfigurationException

if TYPE_CHECKING:
    from treadle.contracts import LightningModule, Trainer

__all__ = ["AveragingCallback", "as_device"]


class AveragingCallback(Callback):
    """Evaluate and save averaged weights while others are trained.

    From the first update of the average on::

        validation in fit     runs with the averaged weights
        a checkpoint          has the averaged weights under ``state_dict``, and those with which training goes on under
                              ``current_model_state``, whichever the module has when it is saved
        an error, Ctrl-C      leave the module with the weights of training
        the end of training   leaves the module with the averaged weights; a later fit of the trainer goes on with
                              those of training

    Args:
        weights: The average.
    """

    decides_weights: ClassVar[bool] = True

    def __init__(self, weights: AveragedWeights) -> None:
        super().__init__()
        self._weights = weights
        self._loaded: tuple[dict[str, Any], int] | None = None  # from a checkpoint, until the module is set up

    def prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do what has to be done before training begins; the optimizers exist. Default: nothing."""

    def finish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do what has to be done when training has ended, and the module has the averaged weights. Default: nothing."""

    def update_average(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the present weights into the average."""
        trainer.strategy.release_gathered()
        self._weights.update(pl_module)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a strategy under which the module has no weights to average."""
        if stage == "fit" and not trainer.strategy.averages_weights:
            kind, strategy = type(self).__name__, type(trainer.strategy).__name__
            raise MisconfigurationException(
                f"{kind} averages the parameters of the module, and under {strategy} in stage 3 the module has none"
                f" between its passes. Use stage 2, or FSDPStrategy; or leave out {kind}."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the average of a checkpoint, or give the module back what an earlier fit trained."""
        trainer.strategy.release_gathered()
        if self._loaded is not None:
            self._weights.load(pl_module, *self._loaded)
            self._loaded = None
        elif fit_is_new(trainer):  # the callback may have been in another trainer before
            self.load_state_dict({})
        elif self._weights.exchanged:
            if trainer.strategy.reduce_boolean_decision(self._weights.is_in(pl_module)):
                self._restore(trainer, pl_module)
                trainer.strategy.take_over_weights(pl_module)
            else:  # the program has given the module other weights since
                self._weights.keep_weights()
        self.prepare(trainer, pl_module)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate with the averaged weights."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._exchange(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on with the weights of training."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._restore(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the module with the weights of training."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._restore(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the module with the averaged weights."""
        self._exchange(trainer, pl_module)
        if self._weights.exchanged:
            self.finish(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same, where nothing was left to train."""
        self._exchange(trainer, pl_module)

    def _exchange(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._weights.count or self._weights.exchanged:
            return
        if trainer.world_size > 1:
            strategy = trainer.strategy
            for first in range(0, strategy.world_size, strategy.world_size // strategy.pipeline_stages):
                self._weights.share_buffers(pl_module, partial(strategy.broadcast, src=first))
        trainer.strategy.release_gathered()
        self._weights.exchange(pl_module)

    def _restore(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._weights.exchanged:
            trainer.strategy.release_gathered()
            self._weights.restore(pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the averaged weights and those of training; where weights only are saved, the averaged ones."""
        if not self._weights.count:
            return
        averaged, training = self._weights.saved(pl_module, checkpoint["state_dict"])
        checkpoint["state_dict"] = averaged
        if "optimizer_states" in checkpoint:
            checkpoint["current_model_state"] = training
            checkpoint["averaging_state"] = {"n_averaged": torch.tensor(self._weights.count)}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the average of a checkpoint from which training goes on."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self.load_state_dict({})
        self._loaded = None
        if "current_model_state" in checkpoint and "averaging_state" in checkpoint:
            self._loaded = checkpoint["state_dict"], int(checkpoint["averaging_state"]["n_averaged"])


def as_device(owner: str, device: Any) -> torch.device | None:
    """Read the argument ``device`` of a callback.

    Raises:
        MisconfigurationException: It names no device.
    """
    if device is None or isinstance(device, torch.device):
        return device
    try:
        return torch.device(device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise MisconfigurationException(
            f"{owner}(device={device!r}): it is a torch.device, a name such as 'cpu' or 'cuda:0', or None for the"
            f" device of the weights ({error})."
        ) from None
