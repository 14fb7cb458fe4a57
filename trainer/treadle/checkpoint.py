"""What a checkpoint holds, in Lightning's keys, and how a run takes it back.

Everything in it is tensors and plain containers, so it loads with ``weights_only=True``. Beside Lightning's keys there
is one entry, ``treadle``, for what Lightning does not keep.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from argparse import Namespace
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from treadle.callbacks.callback import Callback
from treadle.dispatch import overrides
from treadle.state import FitProgress, Phase
from treadle_fabric import CheckpointMismatchError, MisconfigurationException, rank_zero_warn
from treadle_fabric.checkpoint.folder import bring_back, representative

if TYPE_CHECKING:
    from treadle.run import Run

__all__ = ["dump_checkpoint", "find_checkpoint", "restore_training", "restore_weights"]

FORMAT: Final = "2.6.6"
"""The Lightning release whose checkpoint format is written."""
PREEMPTED: Final = "preempted.ckpt"
"""What a run saves when it is asked to terminate; "last" finds it beside the last checkpoint."""
_PLAIN: Final = (bool, int, float, complex, str, bytes, Tensor, torch.dtype, torch.device, torch.Size, type(None))


def dump_checkpoint(run: Run, callbacks: Sequence[Callback], *, weights_only: bool = False) -> dict[str, Any]:
    """The checkpoint of a run as it stands. Every rank calls it.

    Args:
        run: the run.
        callbacks: whose states are kept, in their order.
        weights_only: leave out optimizers, schedulers and callbacks.
    """
    from treadle.datamodule import LightningDataModule

    strategy, module, progress = run.fabric.strategy, run.module, run.progress
    assert run.wrapped is not None
    checkpoint: dict[str, Any] = {
        "epoch": progress.epoch,
        "global_step": progress.step,
        "pytorch-lightning_version": FORMAT,
        "state_dict": strategy.get_module_state_dict(module),
        "loops": _loops(progress, automatic=module.automatic_optimization),
        "treadle": {"progress": {**dataclasses.asdict(progress), "phase": int(progress.phase)}},
    }
    if not weights_only:
        states = {c.state_key: c.state_dict() for c in callbacks if overrides(c, "state_dict", Callback)}
        checkpoint["callbacks"] = {key: state for key, state in states.items() if state}
        checkpoint["optimizer_states"] = [strategy.get_optimizer_state(o.optimizer) for o in run.optimizers]
        checkpoint["lr_schedulers"] = [config.scheduler.state_dict() for config in run.schedulers]
        if scaler := strategy.precision.state_dict():
            checkpoint[type(strategy.precision).__qualname__] = scaler
    for owner, prefix in ((module, ""), (run.datamodule, "datamodule_")):
        hparams = owner.hparams if owner is not None else None
        if hparams:
            checkpoint[f"{prefix}hparams_name"] = getattr(owner, "_hparams_name", "kwargs")
            checkpoint[f"{prefix}hyper_parameters"] = plain(dict(hparams), "hyper_parameters")
    if run.datamodule is not None and not weights_only and overrides(run.datamodule, "state_dict", LightningDataModule):
        if state := run.datamodule.state_dict():
            checkpoint[type(run.datamodule).__qualname__] = state
    if not weights_only:
        for callback in callbacks:
            run.dispatch.run("on_save_checkpoint", callback.on_save_checkpoint, module._trainer, module, checkpoint)
    run.dispatch.run("on_save_checkpoint", module.on_save_checkpoint, checkpoint)
    return checkpoint


def plain(value: Any, where: str) -> Any:
    """A copy of ``value`` in tensors and plain containers; what cannot be one is left out, with a warning."""
    if isinstance(value, Enum):
        return plain(value.value, where)
    if type(value) in _PLAIN or isinstance(value, Tensor):
        return value
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Namespace):
        value = vars(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        found = {k if isinstance(k, _PLAIN) else str(k): plain(v, f"{where}.{k}") for k, v in value.items()}
        return {k: v for k, v in found.items() if v is not _LEFT_OUT}
    if isinstance(value, (list, tuple, set, frozenset)):
        items = [v for v in (plain(v, f"{where}[{i}]") for i, v in enumerate(value)) if v is not _LEFT_OUT]
        return (
            tuple(items) if isinstance(value, tuple) else set(items) if isinstance(value, (set, frozenset)) else items
        )
    for kind in (bool, int, float, str):  # subclasses and numpy scalars
        if isinstance(value, kind):
            return kind(value)
    if callable(getattr(value, "item", None)) and getattr(value, "ndim", None) == 0:
        return value.item()
    rank_zero_warn(
        f"{where} is a {type(value).__qualname__}, which a checkpoint cannot hold safely; it is left out. Pass it to "
        "`load_from_checkpoint` as an argument, or leave it out with `save_hyperparameters(ignore=...)`."
    )
    return _LEFT_OUT


_LEFT_OUT: Final = object()


def _counts(total: int, current: int, *, keys: Sequence[str] = ("ready", "started", "processed", "completed")) -> Any:
    return {"total": dict.fromkeys(keys, total), "current": dict.fromkeys(keys, current)}


def _loops(p: FitProgress, *, automatic: bool) -> dict[str, Any]:
    """The progress in Lightning's structure."""
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
    else:
        progress = _lightning_progress(checkpoint)
    progress.begun |= progress.batch > 0  # in checkpoints that do not tell
    if progress.epoch_ended:
        progress.epoch += 1
        progress.begin_epoch()
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


def restore_weights(run: Run, checkpoint: dict[str, Any], callbacks: Sequence[Callback], *, training: bool) -> None:
    """Before the optimizers exist: module, data module, and callbacks (their states only when training)."""
    module = run.module
    trainer: Any = module._trainer
    run.dispatch.run("on_load_checkpoint", module.on_load_checkpoint, checkpoint)
    if "state_dict" not in checkpoint:
        raise CheckpointMismatchError(
            f"The checkpoint has no 'state_dict' but {sorted(checkpoint)[:8]}: it was not written by a Trainer. Load it"
            " yourself with torch.load and `load_state_dict`."
        )
    run.fabric.strategy.precision.convert_module(module)  # loaded into single precision, double would lose digits
    try:
        run.fabric.strategy.load_module_state_dict(module, checkpoint["state_dict"], strict=module.strict_loading)
    except RuntimeError as error:
        raise CheckpointMismatchError(
            f"The checkpoint's weights do not fit {type(module).__qualname__}: {error}\nUse the model that was saved,"
            " or set `self.strict_loading = False` to load what fits."
        ) from None
    if not training:
        for callback in callbacks:
            run.dispatch.run("on_load_checkpoint", callback.on_load_checkpoint, trainer, module, checkpoint)
        return
    datamodule = run.datamodule
    if datamodule is not None and type(datamodule).__qualname__ in checkpoint:
        datamodule.load_state_dict(checkpoint[type(datamodule).__qualname__])
    states = checkpoint.get("callbacks", {})
    for callback in callbacks:
        run.dispatch.run("on_load_checkpoint", callback.on_load_checkpoint, trainer, module, checkpoint)
    known = {callback.state_key for callback in callbacks}
    if missing := set(states) - known:
        rank_zero_warn(
            f"The checkpoint has the states of callbacks that this Trainer does not have: {sorted(missing)}. Add them"
            " to go on as before."
        )
    for callback in callbacks:
        if callback.state_key in states:
            callback.load_state_dict(states[callback.state_key])


def restore_training(run: Run, checkpoint: dict[str, Any]) -> None:
    """After they exist: optimizers, schedulers, precision and progress."""
    if "optimizer_states" not in checkpoint:
        raise CheckpointMismatchError(
            "The checkpoint holds weights only, so training cannot go on from it: load the weights with "
            "`load_from_checkpoint` and start a new fit, or save with `save_weights_only=False`."
        )
    for kind, have, saved in (
        ("optimizer", run.optimizers, checkpoint["optimizer_states"]),
        ("scheduler", run.schedulers, checkpoint.get("lr_schedulers", [])),
    ):
        if len(have) != len(saved):
            raise CheckpointMismatchError(
                f"The checkpoint has {len(saved)} {kind} states, `configure_optimizers` made {len(have)} {kind}s: make"
                " the same ones to resume."
            )
    for optimizer, state in zip(run.optimizers, checkpoint["optimizer_states"], strict=True):
        try:
            optimizer.optimizer.load_state_dict(state)
        except ValueError as error:
            raise CheckpointMismatchError(
                f"The checkpoint's state of {type(optimizer.optimizer).__name__} does not fit: {error}. Make the"
                " optimizer with the same parameter groups to resume."
            ) from None
    for config, state in zip(run.schedulers, checkpoint.get("lr_schedulers", []), strict=True):
        config.scheduler.load_state_dict(state)
    precision = run.fabric.strategy.precision
    for key in (type(precision).__qualname__, "MixedPrecision", "AMPGradScalerPlugin"):
        if key in checkpoint:
            precision.load_state_dict(checkpoint[key])
            break
    found = read_progress(checkpoint)
    for field in dataclasses.fields(FitProgress):
        setattr(run.progress, field.name, getattr(found, field.name))


def preempted_path(callbacks: Sequence[Callback], root: str) -> str:
    """Where a run that is asked to terminate saves: beside its checkpoints."""
    folders = [folder for c in callbacks if (folder := getattr(c, "dirpath", None))]
    return str(Path(folders[0] if folders else root) / PREEMPTED)


def find_checkpoint(ckpt_path: Any, callbacks: Sequence[Callback], root: str, *, fitting: bool) -> str | None:
    """The file that ``ckpt_path`` means.

    Args:
        ckpt_path: a path, "best", "last", "hpc" or None.
        callbacks: whose checkpoints "best" and "last" mean.
        root: ``default_root_dir``, where "hpc" is looked for.
        fitting: in fit, "last" without a file starts from the beginning.

    Raises:
        MisconfigurationException: nothing is meant by it.
    """
    if ckpt_path is None:
        return None
    savers: list[Any] = [c for c in callbacks if hasattr(c, "best_model_path")]
    if ckpt_path == "best":
        found = [c.best_model_path for c in savers if c.best_model_path]
        if not found:
            raise MisconfigurationException(
                "ckpt_path='best' needs a ModelCheckpoint that saved: give the Trainer one with a `monitor` and fit"
                " first, or pass a path."
            )
        if len(found) > 1:
            rank_zero_warn(
                f"Several ModelCheckpoints have a best checkpoint; ckpt_path='best' means the first: {found[0]}."
            )
        return str(found[0])
    if ckpt_path == "last":
        paths = [Path(c.last_model_path) for c in savers if getattr(c, "last_model_path", "")]
        for saver in savers:
            folder = Path(saver.dirpath) if saver.dirpath else None
            if folder is not None and folder.is_dir():
                bring_back(folder)
                paths += [*folder.glob("*last*.ckpt"), folder / PREEMPTED]
        paths = [p for p in paths if p.exists()]
        if paths:
            return str(max(paths, key=lambda p: os.stat(representative(p)).st_mtime))
        if fitting:
            rank_zero_warn("ckpt_path='last' found no checkpoint: training starts from the beginning.")
            return None
        raise MisconfigurationException("ckpt_path='last' found no checkpoint: pass a path.")
    if ckpt_path == "hpc":
        numbered = {
            int(m.group(1)): p
            for p in Path(root).glob("hpc_ckpt_*.ckpt")
            if (m := re.search(r"hpc_ckpt_(\d+)", p.name))
        }
        if not numbered:
            raise MisconfigurationException(f"ckpt_path='hpc' found no hpc_ckpt_N.ckpt in {root}: pass a path.")
        return str(numbered[max(numbered)])
    path = str(ckpt_path)
    if not path:
        raise MisconfigurationException("ckpt_path is empty: pass a path, 'best' or 'last', or leave it out.")
    near = difflib.get_close_matches(path.lower(), ("best", "last", "hpc"), n=1) if path == PurePath(path).stem else []
    if near and not os.path.exists(path):
        raise MisconfigurationException(
            f"ckpt_path={path!r} is no file, and none of the words 'best', 'last' and 'hpc'. Did you mean {near[0]!r}?"
        )
    return path
