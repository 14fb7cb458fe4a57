"""Put a checkpoint's content back into a run: weights first, optimizers and schedulers later."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Final

from torch.nn import Module
from torch.optim import Optimizer

from treadle.callbacks.callback import Callback
from treadle.checkpoint.content import keeping, read_progress
from treadle.checkpoint.exact import keep_own_part
from treadle.formats import SCALERS, modernize
from treadle.run.changes import group_names
from treadle.run.progress import FitProgress
from treadle.run.run import Run
from treadle_fabric import CheckpointMismatchError, rank_zero_warn
from treadle_fabric.checkpoint import in_memory, parts_on_demand, tensors_on_demand

_PLACED: Final = ("state_dict", "current_model_state", "optimizer_states", "treadle")
"""The entries whose tensors are copied to where they belong, and are read from a folder only then."""

__all__ = ["read_checkpoint", "restore_training", "restore_weights"]


def read_checkpoint(run: Run, path: str, weights_only: bool | None, *, training: bool) -> dict[str, Any]:
    """Read a checkpoint, and for training what this rank needs of the states of all ranks; every rank calls this.

    Its tensors are mapped from the file until ``run.maps`` is released.
    """
    strategy, classes = run.fabric.strategy, keeping(run).classes["treadle"]
    with parts_on_demand(), tensors_on_demand(), run.maps.reading():
        checkpoint = strategy.load_checkpoint(path, weights_only=weights_only, classes=classes)
        checkpoint = {key: value if key in _PLACED else in_memory(value) for key, value in checkpoint.items()}
        checkpoint = modernize(checkpoint)
        if training and "treadle" in checkpoint:
            checkpoint["treadle"] = keep_own_part(checkpoint["treadle"], strategy)
    return checkpoint


def restore_weights(
    run: Run, engine: Module, checkpoint: dict[str, Any], callbacks: Sequence[Callback], *, training: bool
) -> None:
    """Restore module, data module and callbacks, before the optimizers are restored.

    Args:
        run: The run.
        engine: What gets the weights: the module, or the strategy's engine around it.
        checkpoint: What was read.
        callbacks: Get ``on_load_checkpoint``, and their states back when training.
        training: Whether a fit goes on.
    """
    module = run.module
    trainer: Any = module._trainer
    run.dispatch.run("on_load_checkpoint", module.on_load_checkpoint, checkpoint)
    if "state_dict" not in checkpoint:
        raise CheckpointMismatchError(
            f"The checkpoint has no 'state_dict' but {sorted(checkpoint)[:8]}: it was not written by a Trainer. Load it"
            " yourself with torch.load and `load_state_dict`."
        )
    if training:
        run.changes.load_state_dict(checkpoint.get("treadle", {}).get("changes", {}))
        run.changes.restore_trainable(module)  # before the strategy asks what is trainable
    run.fabric.strategy.precision.convert_module(module)  # loaded into single precision, double would lose digits
    weights = checkpoint["state_dict"]
    if training:  # a callback may have put averaged weights there, for example
        weights = checkpoint.get("current_model_state", weights)
    try:
        run.fabric.strategy.load_module_state_dict(engine, weights, strict=module.strict_loading)
    except RuntimeError as error:
        added = (
            f" Parameters that came during the run: {', '.join(run.changes.added[:5])}. Make them in the module's"
            " `on_load_checkpoint`, which comes before its weights."
            if run.changes.added
            else ""
        )
        raise CheckpointMismatchError(
            f"The checkpoint's weights do not fit {type(module).__qualname__}: {error}\nUse the model that was saved,"
            f" or set `self.strict_loading = False` to load what fits.{added}"
        ) from None
    if not training:
        for callback in callbacks:
            run.dispatch.run("on_load_checkpoint", callback.on_load_checkpoint, trainer, module, checkpoint)
        return
    datamodule = run.datamodule
    if datamodule is not None and type(datamodule).__qualname__ in checkpoint:
        datamodule.load_state_dict(checkpoint[type(datamodule).__qualname__])
    states = dict(checkpoint.get("callbacks", {}))
    for callback in callbacks:  # the class was the key in Lightning 1, and the only one
        if (state := states.get(type(callback).__qualname__)) is not None:
            states.setdefault(callback.state_key, state)
    for callback in callbacks:
        run.dispatch.run("on_load_checkpoint", callback.on_load_checkpoint, trainer, module, checkpoint)
    known = {key for callback in callbacks for key in (callback.state_key, type(callback).__qualname__)}
    run.dispatch.keep_states({key: state for key, state in states.items() if key not in known})
    for callback in callbacks:
        if callback.state_key in states:
            callback.load_state_dict(states[callback.state_key])


def restore_training(run: Run, checkpoint: dict[str, Any]) -> None:
    """Restore optimizers, schedulers, precision and progress; call it after ``configure_optimizers``."""
    if "optimizer_states" not in checkpoint:
        raise CheckpointMismatchError(
            "The checkpoint holds weights only, so training cannot go on from it: load the weights with "
            "`load_from_checkpoint` and start a new fit, or save with `save_weights_only=False`."
        )
    for kind, have, saved in (
        ("optimizer", run.optimizers, checkpoint["optimizer_states"]),
        ("scheduler", run.schedulers, checkpoint.get("lr_schedulers", [])),
    ):
        if have and not saved:  # the module's on_load_checkpoint may have emptied the list, to begin anew
            rank_zero_warn(f"The checkpoint has no {kind} states: what `configure_optimizers` made begins anew.")
        elif len(have) != len(saved):
            raise CheckpointMismatchError(
                f"The checkpoint has {len(saved)} {kind} states, `configure_optimizers` made {len(have)} {kind}s: make"
                " the same ones to resume."
            )
    run.changes.restore_trainable(run.module)  # again: on_fit_start came in between
    for i, (wrapped, state) in enumerate(zip(run.optimizers, checkpoint["optimizer_states"], strict=False)):
        optimizer = wrapped.optimizer
        run.changes.restore_groups(run.module, i, optimizer, state)
        try:
            run.fabric.strategy.load_optimizer_state(optimizer, state)
        except ValueError as error:
            raise CheckpointMismatchError(
                f"The checkpoint's state of {type(optimizer).__name__} does not fit: {error}. "
                + _unlike_groups(run, i, optimizer, state)
            ) from None
    for config, state in zip(run.schedulers, checkpoint.get("lr_schedulers", []), strict=False):
        config.scheduler.load_state_dict(state)
    precision = run.fabric.strategy.precision
    for key in (type(precision).__qualname__, *SCALERS):
        if key in checkpoint:
            precision.load_state_dict(checkpoint[key])
            break
    found = read_progress(checkpoint)
    for field in dataclasses.fields(FitProgress):
        setattr(run.progress, field.name, getattr(found, field.name))


def _unlike_groups(run: Run, index: int, optimizer: Optimizer, state: dict[str, Any]) -> str:
    """Say how parameter groups differ, and what to do."""
    made, saved = (run.changes.saved_groups(when, index) for when in ("made", "groups"))
    have = group_names(run.module, optimizer)
    if saved:
        known = {name for names in saved for name in names}
        mine = {name for names in have for name in names}
        lists = [("Only the checkpoint has", known - mine), ("Only this run has", mine - known)]
        parted = " ".join(f"{what} {', '.join(sorted(names)[:5])}." for what, names in lists if names)
        sizes = f"{[len(names) for names in made]} parameters when the saved run began, and now {list(map(len, have))}"
        return (
            f"`configure_optimizers` made groups of {sizes}. {parted} Let it make the same groups as then; what the run"
            " changed afterwards is restored."
        )
    sizes = f"{[len(group['params']) for group in state['param_groups']]} parameters, and now {list(map(len, have))}"
    return (
        f"The saved optimizer had groups of {sizes}. Groups that the run added belong into `configure_optimizers`, or"
        " into `on_fit_start`, which comes before the state is restored (trainer.ckpt_path is not None there)."
    )
