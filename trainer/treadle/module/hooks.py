"""The hook vocabulary, and the loop they hang on.

Callbacks run before the module, in the order of the list. A hook that is not overridden costs one truth test.

Fit::

    module.configure_callbacks()
    datamodule.prepare_data(); module.prepare_data()                     # once a node
    datamodule.setup("fit"); callback.setup(); module.setup("fit")
    module.configure_model()
    if resuming:
        module.on_load_checkpoint(); weights; datamodule.load_state_dict()
        callback.on_load_checkpoint(); callback.load_state_dict()
    module.configure_optimizers()
    on_fit_start(); hyper-parameters are logged; the rest of the state is restored
    on_sanity_check_start(); validate(); on_sanity_check_end()           # num_sanity_val_steps batches, not logged
    train_dataloader()
    on_train_start()
    while not done:
        on_train_epoch_start()
        for batch_idx, batch in enumerate(train_dataloader):
            on_before_batch_transfer(); transfer_batch_to_device(); on_after_batch_transfer()
            on_train_batch_start()                                       # -1 skips the rest of the epoch
            optimizer_step:                                              # only its inside while accumulating
                loss = training_step(batch, batch_idx)
                on_before_zero_grad(); optimizer_zero_grad()             # at the first batch of an accumulation
                on_before_backward(loss); backward(loss); on_after_backward()
                on_before_optimizer_step(optimizer)                      # gradients are unscaled here
                configure_gradient_clipping(); clip_gradients()
                optimizer.step()
            lr_scheduler_step()                                          # not plateau; "epoch" at the last batch
            on_train_batch_end()
            loggers                                                      # every log_every_n_steps
            if due: validate()
            lr_scheduler_step()                                          # plateau, interval "step"
        on_train_epoch_end()                                             # callbacks, module, monitoring callbacks
        lr_scheduler_step()                                              # plateau, interval "epoch"
        loggers
    on_train_end()
    on_fit_end()
    teardown: datamodule, callbacks, module

validate (in fit, and by itself; test is the same under its own names)::

    on_validation_model_zero_grad()                                      # in fit only
    on_validation_model_eval()
    on_validation_start(); on_validation_epoch_start()
    for batch_idx, batch in enumerate(loader), for every loader:
        transfer hooks
        on_validation_batch_start(); validation_step(); on_validation_batch_end()
    on_validation_epoch_end(); loggers; on_validation_end()
    on_validation_model_train()                                          # in fit only

predict::

    on_predict_model_eval(); on_predict_start(); on_predict_epoch_start()
    for a batch: transfer hooks; on_predict_batch_start(); predict_step(); on_predict_batch_end()
    on_predict_epoch_end(); on_predict_end()

On an error: callback.on_exception, datamodule.on_exception, logger.finalize("failed"); the error is raised unchanged.
Saving: callback.state_dict, datamodule.state_dict, callback.on_save_checkpoint, module.on_save_checkpoint.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from torch import nn

from treadle_fabric import move_data_to_device

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.optim import Optimizer

__all__ = ["MODULE_HOOKS", "DataHooks", "ModuleHooks", "hook_arguments"]

_STAGE_HOOKS: Final = ("setup", "teardown")


class DataHooks:
    """Where batches come from and how they reach the device; a module and a data module share these."""

    def prepare_data(self) -> None:
        """Download and preprocess to disk, in one process (of each node): the others do not see what it assigns."""

    def setup(self, stage: str) -> None:
        """A fit, validate, test or predict begins, in every process; ``stage`` is its name."""

    def teardown(self, stage: str) -> None:
        """It has ended."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Change a batch while it is still where the loader made it; returns the batch."""
        return batch

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move a batch to ``device``; returns the batch. Override it for types of your own: tensors in lists, tuples
        and dictionaries are moved.
        """
        return move_data_to_device(batch, device)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Change a batch on the device, for example augment it on the GPU; returns the batch."""
        return batch


class ModuleHooks(DataHooks, nn.Module):
    """The hooks of a :class:`~treadle.LightningModule`, in the order of a run."""

    def on_fit_start(self) -> None:
        """Fit begins; optimizers exist."""

    def on_fit_end(self) -> None:
        """Fit has ended."""

    def on_train_start(self) -> None:
        """Training begins, after the sanity check."""

    def on_train_end(self) -> None:
        """Training has ended."""

    def on_train_epoch_start(self) -> None:
        """A training epoch begins."""

    def on_train_epoch_end(self) -> None:
        """A training epoch has ended, its validation included."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """A training batch begins. Return -1 to skip the rest of the epoch."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """A training batch has ended; ``outputs`` is what ``training_step`` returned, detached."""

    def on_before_zero_grad(self, optimizer: Optimizer) -> None:
        """Gradients are about to be zeroed."""

    def on_before_backward(self, loss: Tensor) -> None:
        """Backward is about to run on ``loss``, divided by the accumulation, or times weight over a power of two."""

    def on_after_backward(self) -> None:
        """Gradients are there (still scaled under 16-mixed)."""

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """The optimizer is about to step; gradients are unscaled, not yet clipped."""

    def on_validation_model_zero_grad(self) -> None:
        """Free gradients before a validation in fit; not called while an accumulation is under way."""
        self.zero_grad(set_to_none=True)

    def on_validation_model_eval(self) -> None:
        """Put the model into evaluation mode."""
        self.eval()

    def on_validation_model_train(self) -> None:
        """Put the model back into training mode. Left alone, every submodule gets back the mode it had."""
        self.train()

    def on_validation_start(self) -> None:
        """Validation begins."""

    def on_validation_end(self) -> None:
        """Validation has ended."""

    def on_validation_epoch_start(self) -> None:
        """A validation epoch begins."""

    def on_validation_epoch_end(self) -> None:
        """A validation epoch has ended."""

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """A validation batch begins."""

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """A validation batch has ended."""

    def on_test_model_eval(self) -> None:
        """Put the model into evaluation mode."""
        self.eval()

    def on_test_model_train(self) -> None:
        """Put the model back into training mode. Left alone, every submodule gets back the mode it had."""
        self.train()

    def on_test_start(self) -> None:
        """Testing begins."""

    def on_test_end(self) -> None:
        """Testing has ended."""

    def on_test_epoch_start(self) -> None:
        """A test epoch begins."""

    def on_test_epoch_end(self) -> None:
        """A test epoch has ended."""

    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """A test batch begins."""

    def on_test_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """A test batch has ended."""

    def on_predict_model_eval(self) -> None:
        """Put the model into evaluation mode."""
        self.eval()

    def on_predict_start(self) -> None:
        """Prediction begins."""

    def on_predict_end(self) -> None:
        """Prediction has ended."""

    def on_predict_epoch_start(self) -> None:
        """A prediction epoch begins."""

    def on_predict_epoch_end(self) -> None:
        """A prediction epoch has ended."""

    def on_predict_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """A prediction batch begins."""

    def on_predict_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """A prediction batch has ended."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A checkpoint is about to be written; add to it or change it in place."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A checkpoint was read, before weights are restored."""


def hook_arguments(declared_by: type, passed_before: int) -> dict[str, tuple[str, ...]]:
    """The hooks that a class declares, and the names of the arguments that the loops pass to each.

    Args:
        declared_by: the class.
        passed_before: the number of arguments that every hook gets before: ``self``, or ``self, trainer, pl_module``.
    """
    return {
        name: code.co_varnames[passed_before : code.co_argcount]
        for name, method in vars(declared_by).items()
        if (name.startswith("on_") or name in _STAGE_HOOKS) and (code := method.__code__)
    }


MODULE_HOOKS: Final = hook_arguments(ModuleHooks, 1) | dict.fromkeys(_STAGE_HOOKS, ("stage",))
