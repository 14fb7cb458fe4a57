"""The hooks of a run, in the order in which they are called.

Callbacks come before the module, in the order of the list. A hook that is not overridden costs one truth test.

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
            optimizer_step:                                              # while accumulating, only what is inside
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
    on_validation_model_train()                                          # if overridden; else modes are put back

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

__all__ = ["MODULE_HOOKS", "CheckpointHooks", "DataHooks", "ModuleHooks", "hook_arguments"]

_STAGE_HOOKS: Final = ("setup", "teardown")


class DataHooks:
    """Hooks for where batches come from and how they reach the device, shared by modules and data modules."""

    def prepare_data(self) -> None:
        """Download and preprocess data to disk. One process (of each node) runs this: do not assign attributes here."""

    def setup(self, stage: str) -> None:
        """Called in every process when a run begins; ``stage`` is "fit", "validate", "test" or "predict"."""

    def teardown(self, stage: str) -> None:
        """Called in every process when a run has ended; ``stage`` is the one of :meth:`setup`."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Change a batch before it moves to the device, and return it."""
        return batch

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move a batch to ``device``, and return it.

        Tensors in lists, tuples and dictionaries are moved. Override this for types of your own.
        """
        return move_data_to_device(batch, device)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Change a batch on the device, for example augment it on the GPU, and return it."""
        return batch


class CheckpointHooks:
    """The hooks of a checkpoint, which modules have."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Called before a checkpoint is written; add to it or change it in place.

        Values of any kind may be added. Modules, functions and other objects that need a pickle come back only from a
        load with ``weights_only=False``, and the first save says so.
        """

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Called after a checkpoint was read, before weights are restored."""


class ModuleHooks(DataHooks, CheckpointHooks, nn.Module):
    """The hooks of a :class:`~treadle.LightningModule`, in the order of a run."""

    def on_fit_start(self) -> None:
        """Called when fit begins; the optimizers exist."""

    def on_fit_end(self) -> None:
        """Called when fit has ended."""

    def on_train_start(self) -> None:
        """Called when training begins, after the sanity check."""

    def on_train_end(self) -> None:
        """Called when training has ended."""

    def on_train_epoch_start(self) -> None:
        """Called when a training epoch begins, and again when a run goes on within one.

        What it does to parameter groups is then undone: they are in the checkpoint.
        """

    def on_train_epoch_end(self) -> None:
        """Called when a training epoch has ended, its validation included."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Called when a training batch begins. Return -1 to skip the rest of the epoch."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Called when a training batch has ended; ``outputs`` is what ``training_step`` returned, detached."""

    def on_before_zero_grad(self, optimizer: Optimizer) -> None:
        """Called before gradients are zeroed."""

    def on_before_backward(self, loss: Tensor) -> None:
        """Called before backward runs on ``loss``.

        The loss is divided by the number of batches of the accumulation. A loss with a weight is instead multiplied by
        its weight over a power of two, the same in the whole run.
        """

    def on_after_backward(self) -> None:
        """Called after backward; gradients are still scaled under 16-mixed."""

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Called before the optimizer steps; gradients are unscaled, and not clipped yet."""

    def on_validation_model_zero_grad(self) -> None:
        """Free gradients before a validation in fit; not called while an accumulation is under way."""
        self.zero_grad(set_to_none=True)

    def on_validation_model_eval(self) -> None:
        """Put the model into evaluation mode."""
        self.eval()

    def on_validation_model_train(self) -> None:
        """Put the model back into training mode. If not overridden, every submodule gets back the mode it had."""
        self.train()

    def on_validation_start(self) -> None:
        """Called when validation begins."""

    def on_validation_end(self) -> None:
        """Called when validation has ended."""

    def on_validation_epoch_start(self) -> None:
        """Called when a validation epoch begins."""

    def on_validation_epoch_end(self) -> None:
        """Called when a validation epoch has ended."""

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Called when a validation batch begins."""

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Called when a validation batch has ended; ``outputs`` is what ``validation_step`` returned."""

    def on_test_model_eval(self) -> None:
        """Put the model into evaluation mode."""
        self.eval()

    def on_test_model_train(self) -> None:
        """Put the model back into training mode. If not overridden, every submodule gets back the mode it had."""
        self.train()

    def on_test_start(self) -> None:
        """Called when testing begins."""

    def on_test_end(self) -> None:
        """Called when testing has ended."""

    def on_test_epoch_start(self) -> None:
        """Called when a test epoch begins."""

    def on_test_epoch_end(self) -> None:
        """Called when a test epoch has ended."""

    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Called when a test batch begins."""

    def on_test_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Called when a test batch has ended; ``outputs`` is what ``test_step`` returned."""

    def on_predict_model_eval(self) -> None:
        """Put the model into evaluation mode."""
        self.eval()

    def on_predict_start(self) -> None:
        """Called when prediction begins."""

    def on_predict_end(self) -> None:
        """Called when prediction has ended."""

    def on_predict_epoch_start(self) -> None:
        """Called when a prediction epoch begins."""

    def on_predict_epoch_end(self) -> None:
        """Called when a prediction epoch has ended."""

    def on_predict_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Called when a prediction batch begins."""

    def on_predict_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Called when a prediction batch has ended; ``outputs`` is what ``predict_step`` returned."""


def hook_arguments(declared_by: type, passed_before: int) -> dict[str, tuple[str, ...]]:
    """Collect the hooks that a class declares, and the names of the arguments that the loops pass to each.

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
