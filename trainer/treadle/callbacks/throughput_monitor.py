"""ThroughputMonitor: logs batches, samples and floating-point operations a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from treadle.callbacks.callback import Callback
from treadle.callbacks.monitoring.intervals import is_multiple
from treadle.stages import RunningStage
from treadle_fabric import MisconfigurationException, rank_zero_warn
from treadle_fabric.measuring import Throughput, compute_dtype, get_available_flops

if TYPE_CHECKING:
    from treadle.contracts import LightningModule, Trainer

__all__ = ["ThroughputMonitor"]


class ThroughputMonitor(Callback):
    """Log how fast a run trains, validates, tests and predicts.

    The names are those of :class:`treadle_fabric.utilities.Throughput` after ``train/``, ``validate/``, ``test/`` or
    ``predict/``; rates come once its window is full. They are logged where step values are, every ``log_every_n_steps``
    and after an optimizer step; of the other stages, every ``log_every_n_steps`` batches. Each validation begins anew,
    and its time is not part of that of training. A checkpoint keeps the totals of training, which go on after a resume.

    With ``flops_per_batch``, an attribute of the module with the floating-point operations of a batch on this device
    (see :func:`treadle_fabric.utilities.measure_flops`), operations a second and their share of the peak rate of the
    chip (MFU) are logged, too.

    The device is waited for at the batches at which values are logged, and at no others, so that the batches between
    are timed when they are queued.

    Args:
        batch_size_fn: Called with a batch; returns the number of its samples.
        length_fn: Called with a batch; returns the number of items in all of its samples, such as tokens. Default:
            None, items are not counted.
        **kwargs: ``window_size`` and ``separator`` of ``Throughput``; ``available_flops`` where the chip is not known.

    Raises:
        MisconfigurationException: An argument is wrong; and when a run begins, the trainer has no logger.

    Example:
        >>> monitor = ThroughputMonitor(lambda batch: batch["ids"].size(0), lambda batch: batch["ids"].numel())
    """

    def __init__(
        self, batch_size_fn: Callable[[Any], int], length_fn: Callable[[Any], int] | None = None, **kwargs: Any
    ) -> None:
        for name, function in (("batch_size_fn", batch_size_fn), ("length_fn", length_fn)):
            if not callable(function) and not (name == "length_fn" and function is None):
                raise MisconfigurationException(
                    f"ThroughputMonitor({name}={function!r}): it must be a function of a batch that returns a number."
                )
        Throughput(**kwargs)  # refuses wrong arguments before any work starts
        self.batch_size_fn, self.length_fn, self.kwargs = batch_size_fn, length_fn, kwargs
        self._throughputs: dict[RunningStage, Throughput] = {}
        self._totals: dict[str, dict[str, float]] = {}
        """By stage; ``time`` is that of the last update."""
        self._began: dict[str, float] = {}
        self._logged_at = 0  # the number of validation batches so far, the x axis of their metrics

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_throughputs": {}, "_began": {}}  # the clock of another process is another one

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find out what the chip can do at most."""
        if stage == "fit" and not trainer.loggers and not trainer.fast_dev_run:
            rank_zero_warn(
                "ThroughputMonitor writes to loggers, and the trainer has none: pass `Trainer(logger=True)`, or leave"
                " the callback out."
            )
        kwargs = dict(self.kwargs)
        if "available_flops" not in kwargs:
            dtype = compute_dtype(trainer.precision)
            kwargs["available_flops"] = get_available_flops(trainer.strategy.root_device, dtype)
        sizes: dict[str, Any] = {"world_size": trainer.world_size, "shares": trainer.strategy.data_parallel_size}
        self._throughputs = {s: Throughput(**sizes, **kwargs) for s in RunningStage}

    def state_dict(self) -> dict[str, Any]:
        """Return the totals of training."""
        return {"train": dict(self._totals.get(RunningStage.TRAINING, {})), "validated": self._logged_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Count on from the totals of training."""
        self._totals[RunningStage.TRAINING] = dict(state_dict.get("train", {}))
        self._logged_at = state_dict.get("validated", 0)

    def on_train_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Begin to measure training; in a fit that goes on, the totals go on."""
        self._begin(trainer, goes_on=trainer.fit_progress.batches > 0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch, and log where step values are logged."""
        progress = trainer.fit_progress
        due = progress.stepping and is_multiple(progress.logging_step, trainer.log_every_n_steps)
        self._count(trainer, pl_module, batch, waits=due)
        if due:
            self._log(trainer, progress.logging_step - 1, epoch=trainer.current_epoch)

    def on_validation_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Begin to measure validation."""
        self._begin(trainer)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the batch, and log every ``log_every_n_steps`` batches."""
        self._logged_at += not trainer.sanity_checking
        self._evaluated(trainer, pl_module, batch, self._logged_at)

    def on_validation_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Leave the time of the validation out of that of training."""
        if RunningStage.TRAINING in self._began and RunningStage.VALIDATING in self._began:
            self._began[RunningStage.TRAINING] += time.perf_counter() - self._began.pop(RunningStage.VALIDATING)

    def on_test_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Begin to measure testing."""
        self._begin(trainer)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the batch, and log every ``log_every_n_steps`` batches."""
        self._evaluated(trainer, pl_module, batch)

    def on_predict_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Begin to measure prediction."""
        self._begin(trainer)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the batch, and log every ``log_every_n_steps`` batches."""
        self._evaluated(trainer, pl_module, batch)

    def _begin(self, trainer: Trainer, *, goes_on: bool = False) -> None:
        """A stage begins: its totals are 0, unless they go on."""
        stage = trainer.state.stage
        if stage is None or trainer.sanity_checking:
            return
        self._throughputs[stage].reset()
        if not goes_on:
            self._totals[stage] = {}
        self._began[stage] = time.perf_counter() - self._totals.setdefault(stage, {}).get("time", 0.0)

    def _evaluated(self, trainer: Trainer, pl_module: LightningModule, batch: Any, step: int | None = None) -> None:
        """Count a batch of an evaluation or a prediction, and log where that is due."""
        if trainer.sanity_checking:
            return
        batches = int(self._totals[str(trainer.state.stage)].get("batches", 0)) + 1
        due = is_multiple(batches, trainer.log_every_n_steps)
        self._count(trainer, pl_module, batch, waits=due)
        if due:
            self._log(trainer, batches if step is None else step)

    def _count(self, trainer: Trainer, pl_module: LightningModule, batch: Any, *, waits: bool) -> None:
        stage = trainer.state.stage
        assert stage is not None
        if waits:
            _wait_for(trainer.strategy.root_device)
        totals, lengths = self._totals[stage], None
        totals["batches"] = totals.get("batches", 0) + 1
        totals["samples"] = totals.get("samples", 0) + (size := int(self.batch_size_fn(batch)))
        if self.length_fn is not None:
            lengths = totals["lengths"] = totals.get("lengths", 0) + int(self.length_fn(batch))
        totals["time"] = time.perf_counter() - self._began[stage]
        if not size:  # such a batch is skipped in training
            return
        self._throughputs[stage].update(
            time=totals["time"],
            batches=int(totals["batches"]),
            samples=int(totals["samples"]),
            lengths=None if lengths is None else int(lengths),
            flops=getattr(pl_module, "flops_per_batch", None),
        )

    def _log(self, trainer: Trainer, step: int, **more: float) -> None:
        stage = trainer.state.stage
        assert stage is not None
        throughput = self._throughputs[stage]
        found = throughput.compute()
        named = {f"{stage.value}{throughput.separator}{name}": value for name, value in found.items()}
        for logger in trainer.loggers:
            logger.log_metrics({**named, **more}, step=step)


def _wait_for(device: torch.device) -> None:
    """Wait until the device has done what was queued; else the clock tells when batches were queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
