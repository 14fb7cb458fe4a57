"""The base of callbacks: it declares every hook, and none does anything."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Final

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from treadle.contracts import LightningModule, Trainer

from treadle.module.hooks import hook_arguments

__all__ = ["CALLBACK_HOOKS", "Callback", "epoch_is_over", "fit_is_new"]


class Callback:
    """Code that runs at the hooks of a run. Override what you need; a hook that is not overridden costs nothing.

    The order of the hooks is written out in ``module/hooks.py``. Callbacks run before the module, in the order of the
    list, with tuner callbacks first and checkpoint callbacks last; in three hooks, callbacks with :attr:`monitors` run
    after the module.
    """

    monitors: ClassVar[bool] = False
    """Whether the callback decides by a metric. At ``on_train_batch_end``, ``on_validation_end`` and
    ``on_train_epoch_end`` such a callback runs after the module, so that it sees what the module logs."""
    decides_weights: ClassVar[bool] = False
    """Whether the callback decides which weights a checkpoint holds. Its ``on_save_checkpoint`` is then called where
    weights only are saved, too, and a run can have one such callback. Where other weights than the module's are to be
    found under ``state_dict``, those with which training goes on are under ``current_model_state``."""
    call_order: ClassVar[int] = 0
    """0 for ordinary callbacks, -1 to run before all of these, 1 to run after all of these."""

    raised_after_fit: BaseException | None = None
    """What ``fit`` raises once it has ended in order, with its loggers closed; None: ``fit`` returns. A callback that
    sets it also sets ``trainer.should_stop``, on every rank."""

    @property
    def state_key(self) -> str:
        """The name of this callback's state in a checkpoint; two callbacks of one class need different names."""
        return type(self).__qualname__

    def _generate_state_key(self, **kwargs: Any) -> str:
        """Return the class name with the arguments that tell two instances apart."""
        return f"{type(self).__qualname__}{kwargs!r}"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """A fit, validate, test or predict begins; ``stage`` names which."""

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The fit, validate, test or predict has ended; ``stage`` names which."""

    def confirm_stop(self) -> bool:
        """Return whether this callback ended the run from which a fit goes on, and would end it again.

        Asked once where that run was stopped before its time, when the callback has its state.
        """
        return False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fit begins; optimizers exist."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fit has ended."""

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The validation sanity check begins."""

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The validation sanity check has ended."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Training begins."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Training has ended."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A training epoch begins."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A training epoch has ended, its validation included."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """A training batch begins. (The module's hook of this name may return -1 to skip the rest of the epoch.)"""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A training batch has ended; ``outputs`` is what ``training_step`` returned, detached."""

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Gradients are about to be zeroed."""

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """``loss.backward()`` is about to run."""

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The gradients are computed, or added to those of earlier batches."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """The optimizer is about to step; the gradients are unscaled, and not yet clipped."""

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation begins."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation has ended."""

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A validation epoch begins."""

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A validation epoch has ended."""

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """A validation batch begins."""

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """A validation batch has ended."""

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Testing begins."""

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Testing has ended."""

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A test epoch begins."""

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A test epoch has ended."""

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """A test batch begins."""

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """A test batch has ended."""

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prediction begins."""

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prediction has ended."""

    def on_predict_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A prediction epoch begins."""

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A prediction epoch has ended."""

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """A prediction batch begins."""

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """A prediction batch has ended."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The run is ending with an exception, KeyboardInterrupt included."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of this callback, best without what needs a pickle. Default: nothing."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """A checkpoint is about to be written; ``checkpoint`` may be changed in place."""

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """A checkpoint was read; the states in it are not yet restored."""


CALLBACK_HOOKS: Final = hook_arguments(Callback, 3)


def epoch_is_over(trainer: Trainer) -> bool:
    """Whether the hooks of an epoch's end run because the epoch is over, and not because training stops within it."""
    stops = trainer.should_stop or -1 < trainer.max_steps <= trainer.global_step
    return trainer.is_last_batch or not stops


def fit_is_new(trainer: Trainer) -> bool:
    """Whether a fit begins anew: neither a checkpoint nor an earlier fit of the trainer says where to go on."""
    return trainer.ckpt_path is None and not trainer.fit_progress.batches
