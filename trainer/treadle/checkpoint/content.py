"""What a checkpoint holds, in Lightning's keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Final

from treadle.callbacks.callback import Callback
from treadle.module import LightningDataModule
from treadle.module.overriding import overrides
from treadle.run.accumulation import Accumulation
from treadle.run.progress import FitProgress, Phase
from treadle.run.run import ReadyRun, Run
from treadle_fabric.checkpoint import Keeping, kept_by_engines, known_classes, state_of

__all__ = ["dump_checkpoint", "keeping", "read_progress"]

FORMAT: Final = "2.6.6"
"""The Lightning release whose checkpoint format is written."""


def dump_checkpoint(run: ReadyRun, callbacks: Sequence[Callback], *, weights_only: bool = False) -> dict[str, Any]:
    """The checkpoint of a run in its present state. Every rank calls this.

    Args:
        run: the run.
        callbacks: whose states are kept, in their order.
        weights_only: leave out optimizers, schedulers and callbacks.
    """
    strategy, module, progress = run.fabric.strategy, run.module, run.progress
    with kept_by_engines():
        weights = strategy.get_module_state_dict(module)
        training = [] if weights_only else [strategy.get_optimizer_state(o.optimizer) for o in run.optimizers]
    checkpoint: dict[str, Any] = {
        "epoch": progress.epoch,
        "global_step": progress.step,
        "pytorch-lightning_version": FORMAT,
        "state_dict": weights,
        "loops": loops_state(progress, automatic=module.automatic_optimization),
        "treadle": {"progress": {**dataclasses.asdict(progress), "phase": int(progress.phase)}},
    }
    if not weights_only:
        checkpoint["treadle"]["changes"] = run.changes.state_dict(module, run.optimizers)
        states = {c.state_key: c.state_dict() for c in callbacks if overrides(c, "state_dict", Callback)}
        checkpoint["callbacks"] = {key: state for key, state in states.items() if state}
        checkpoint["optimizer_states"] = training
        checkpoint["lr_schedulers"] = [state_of(config.scheduler) for config in run.schedulers]
        if scaler := strategy.precision.state_dict():
            checkpoint[type(strategy.precision).__qualname__] = scaler
    for owner, prefix in ((module, ""), (run.datamodule, "datamodule_")):
        if owner is not None and owner.hparams:
            checkpoint[owner.CHECKPOINT_HYPER_PARAMS_NAME] = getattr(owner, "_hparams_name", "kwargs")
            checkpoint[owner.CHECKPOINT_HYPER_PARAMS_KEY] = dict(owner.hparams)
            if (whole := owner.hparams_object) is not None:
                checkpoint["treadle"][f"{prefix}hparams_object"] = whole
    if run.datamodule is not None and not weights_only and overrides(run.datamodule, "state_dict", LightningDataModule):
        if state := run.datamodule.state_dict():
            checkpoint[type(run.datamodule).__qualname__] = state
    for callback in callbacks:
        if callback.__class__.decides_weights or not weights_only:
            run.dispatch.run("on_save_checkpoint", callback.on_save_checkpoint, module._trainer, module, checkpoint)
    run.dispatch.run("on_save_checkpoint", module.on_save_checkpoint, checkpoint)
    return checkpoint


def keeping(run: Run) -> Keeping:
    """How the values of the run's checkpoints are kept: which classes are known where the checkpoint is loaded."""
    own = known_classes(type(run.module))
    others = known_classes(type(run.datamodule)) if run.datamodule is not None else frozenset()
    classes = {"hyper_parameters": own, "datamodule_hyper_parameters": others, "treadle": own | others}
    return Keeping(classes, lenient=True, name="")


def _counts(total: int, current: int, *, keys: Sequence[str] = ("ready", "started", "processed", "completed")) -> Any:
    return {"total": dict.fromkeys(keys, total), "current": dict.fromkeys(keys, current)}


def loops_state(p: FitProgress, *, automatic: bool) -> dict[str, Any]:
    """Return the progress in Lightning's structure."""
    two = ("ready", "completed")
    steps = _counts(p.optimizer_steps, p.step_in_epoch, keys=two)
    none = _counts(0, 0, keys=two)
    zero = {part: {**counts, "started": counts["ready"]} for part, counts in steps.items()}
    no_zero = {part: {**counts, "started": 0} for part, counts in none.items()}
    idle = {**_counts(0, 0), "is_last_batch": False}
    epochs = _counts(p.epoch + 1, p.epoch + 1)
    for part in epochs.values():
        part["completed"] = p.epoch
        part["processed"] = p.epoch + 1 if p.epoch_ended else p.epoch
    evaluation = {"state_dict": {}, "batch_progress": idle}
    return {
        "fit_loop": {
            "state_dict": {},
            "epoch_loop.state_dict": {"_batches_that_stepped": p.logging_step},
            "epoch_loop.batch_progress": {**_counts(p.batches, p.batch), "is_last_batch": p.is_last_batch},
            "epoch_loop.scheduler_progress": _counts(p.scheduler_steps, p.scheduler_steps_in_epoch, keys=two),
            "epoch_loop.automatic_optimization.state_dict": {},
            "epoch_loop.automatic_optimization.optim_progress": {
                "optimizer": {"step": steps if automatic else none, "zero_grad": zero if automatic else no_zero}
            },
            "epoch_loop.manual_optimization.state_dict": {},
            "epoch_loop.manual_optimization.optim_step_progress": none if automatic else steps,
            "epoch_loop.val_loop.state_dict": {},
            "epoch_loop.val_loop.batch_progress": idle,
            "epoch_progress": epochs,
        },
        "validate_loop": evaluation,
        "test_loop": evaluation,
        "predict_loop": evaluation,
    }


def read_progress(checkpoint: Mapping[str, Any]) -> FitProgress:
    """The progress in a checkpoint of this library, or of Lightning 2.x."""
    own = checkpoint.get("treadle", {}).get("progress")
    if own is not None:
        known = {f.name for f in dataclasses.fields(FitProgress)}
        progress = FitProgress(**{k: v for k, v in own.items() if k in known})
        progress.phase = Phase(progress.phase)
        if "accumulation" in own:
            progress.accumulation = Accumulation(**own["accumulation"])
    else:
        progress = _lightning_progress(checkpoint)
    progress.settle()
    return progress


def _lightning_progress(checkpoint: Mapping[str, Any]) -> FitProgress:
    fit = checkpoint.get("loops", {}).get("fit_loop")
    step = int(checkpoint.get("global_step", 0))
    if not fit:
        return FitProgress(epoch=int(checkpoint.get("epoch", 0)), step=step, logging_step=step, optimizer_steps=step)
    batches, epochs = fit["epoch_loop.batch_progress"], fit["epoch_progress"]["current"]
    schedulers = fit.get("epoch_loop.scheduler_progress", _counts(0, 0))
    optimizer = fit["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
    optimizer_steps = optimizer["total"]["completed"]
    ended = epochs["processed"] > epochs["completed"]
    finished = epochs["processed"] == epochs["completed"] == epochs["ready"]  # saved after an epoch, not in one
    manual = not optimizer_steps and fit["epoch_loop.manual_optimization.optim_step_progress"]["total"]["completed"]
    within = batches["current"]["processed"] > batches["current"]["completed"]  # saved in on_train_batch_end
    progress = FitProgress(
        epoch=epochs["completed"],
        batch=0 if finished else batches["current"]["processed"],
        batches=batches["total"]["processed"],
        step=batches["total"]["processed"] if manual else step,
        step_in_epoch=optimizer["current"]["completed"],
        logging_step=fit["epoch_loop.state_dict"].get("_batches_that_stepped", step) + within,
        optimizer_steps=optimizer_steps or step,
        scheduler_steps=schedulers["total"]["completed"],
        scheduler_steps_in_epoch=schedulers["current"]["completed"],
        is_last_batch=bool(batches.get("is_last_batch", False)),
        epoch_ended=ended,
    )
    if progress.is_last_batch and not ended and not finished:
        progress.epoch_ended = True
    return progress
