"""DeviceStatsMonitor: logs memory and load of the device."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from treadle.callbacks.callback import Callback
from treadle.callbacks.monitoring.intervals import is_multiple
from treadle.stages import TrainerFn
from treadle_fabric import CPUAccelerator, MisconfigurationException, check_flag, require_package

if TYPE_CHECKING:
    from treadle.contracts import LightningModule, Trainer

__all__ = ["DeviceStatsMonitor"]


class DeviceStatsMonitor(Callback):
    """Log what the accelerator tells of its device, before and after batches, to all loggers.

    The names are ``DeviceStatsMonitor.on_train_batch_start/`` and the name that the accelerator gives, and the same for
    the other hooks: the end of a training batch, and both of a batch of validation and test. On CUDA the
    numbers are those of ``torch.cuda.memory_stats``, for which the device is not waited for. Nothing is asked of the
    device except at the batches at which step values are logged, every ``log_every_n_steps``.

    Args:
        cpu_stats: Log the load and used memory of the CPU, in per cent, too. Default: None, where the CPU is the
            accelerator. Needs psutil.

    Raises:
        MisconfigurationException: When a fit begins, the trainer has no logger.
        MissingPackageError: When a run begins, psutil is needed and not installed.
    """

    def __init__(self, cpu_stats: bool | None = None) -> None:
        check_flag("DeviceStatsMonitor: cpu_stats", cpu_stats, optional=True)
        self._cpu_stats = cpu_stats

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a fit without loggers, and a missing psutil."""
        if stage == "fit" and not trainer.loggers and not trainer.fast_dev_run:
            raise MisconfigurationException(
                "Cannot use `DeviceStatsMonitor` callback with `Trainer(logger=False)`, because it writes to loggers:"
                " pass `Trainer(logger=True)`, or leave the callback out."
            )
        on_cpu = trainer.strategy.root_device.type == "cpu"
        if self._cpu_stats or (self._cpu_stats is None and on_cpu):
            asked = f"DeviceStatsMonitor(cpu_stats={self._cpu_stats})"
            require_package("psutil", asked, "trainer", "With cpu_stats=False it is not needed.")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Log at the first batch of a step at which the loggers write."""
        progress = trainer.fit_progress
        due = is_multiple(progress.logging_step + 1, trainer.log_every_n_steps)
        if due and not progress.accumulation.place(batch_idx, math.inf).done:
            self._log(trainer, "on_train_batch_start", progress.logging_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log at the last batch of a step at which the loggers write."""
        progress = trainer.fit_progress
        if progress.stepping and is_multiple(progress.logging_step, trainer.log_every_n_steps):
            self._log(trainer, "on_train_batch_end", progress.logging_step - 1)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Log at every ``log_every_n_steps``-th batch."""
        self._log_evaluation(trainer, "on_validation_batch_start", batch_idx)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Log at every ``log_every_n_steps``-th batch."""
        self._log_evaluation(trainer, "on_validation_batch_end", batch_idx)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Log at every ``log_every_n_steps``-th batch."""
        self._log_evaluation(trainer, "on_test_batch_start", batch_idx)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Log at every ``log_every_n_steps``-th batch."""
        self._log_evaluation(trainer, "on_test_batch_end", batch_idx)

    def _log_evaluation(self, trainer: Trainer, hook: str, batch_idx: int) -> None:
        if is_multiple(batch_idx + 1, trainer.log_every_n_steps) and not trainer.sanity_checking:
            step = trainer.fit_progress.logging_step  # that of the evaluation's metrics
            self._log(trainer, hook, max(step - 1, 0) if trainer.state.fn is TrainerFn.FITTING else step)

    def _log(self, trainer: Trainer, hook: str, step: int) -> None:
        device = trainer.strategy.root_device
        on_cpu = device.type == "cpu"
        found: dict[str, float] = {}
        if not on_cpu or self._cpu_stats is not False:
            found |= trainer.accelerator.get_device_stats(device)
        if self._cpu_stats and not on_cpu:
            found |= CPUAccelerator().get_device_stats("cpu")
        if found:
            prefix = f"{type(self).__qualname__}.{hook}"
            for logger in trainer.loggers:
                named = {f"{prefix}{logger.group_separator}{name}": value for name, value in found.items()}
                logger.log_metrics(named, step=step)
