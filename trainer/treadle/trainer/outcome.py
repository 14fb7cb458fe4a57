"""Bring the outcome of a run in other processes (spawn, fork) back to the trainer that waits for them."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import Module

from treadle.callbacks import Callback
from treadle.metrics.latest import Metrics
from treadle.module import LightningModule
from treadle.run.progress import FitProgress
from treadle.run.signals import Signals
from treadle.stages import TrainerState
from treadle_fabric import Fabric, load_module_state, module_state, move_data_to_device, user_module

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from treadle.contracts import Trainer

__all__ = ["launch", "raise_asked_for"]

_COPIED = ("best_model_path", "best_model_score", "last_model_path", "best_k_models", "kth_best_model_path", "dirpath")


@dataclass
class Outcome:
    """A run's result, and what the run changed: weights, metrics, counters, and the states of callbacks and loggers."""

    result: Any
    weights: dict[str, Any]
    state: TrainerState
    progress: FitProgress
    metrics: Metrics
    callbacks: list[dict[str, Any]]
    loggers: list[dict[str, Any]]
    should_stop: bool


def launch(
    trainer: Trainer, stage: Callable[..., Any], module: LightningModule, args: tuple[Any, ...], signals: Signals | None
) -> Any:
    """Run a stage in processes that the strategy starts, wait for them, and take over its outcome.

    Args:
        trainer: The trainer.
        stage: Takes the module, and ``args``.
        module: The module.
        args: For the stage.
        signals: The signals that end the stage, which this process passes on to the others; None if no signal does.

    Returns:
        What the stage returned on rank 0.
    """
    with ExitStack() as stack:
        if signals is not None and (launcher := trainer.strategy.launcher) is not None:
            stack.enter_context(signals.passed_on_by(launcher.kill))
        outcome: Outcome = trainer.fabric.launch(partial(_run_and_capture, trainer, stage), module._runs, *args)
    _adopt(trainer, module, outcome)
    return outcome.result


def _run_and_capture(trainer: Trainer, stage: Callable[..., Any], fabric: Fabric, model: Module, *args: Any) -> Outcome:
    """Run a stage in a process of its own; return the outcome, with its tensors on the CPU.

    Args:
        trainer: The trainer.
        stage: Takes the module, and ``args``.
        fabric: The runtime; the trainer has it too.
        model: The module, or its compiled form.
        *args: For the stage.
    """
    module: Any = user_module(model)
    module._run_as(model)  # sent here, a module has forgotten its compiled form
    result = stage(module, *args)
    cpu = torch.device("cpu")
    return Outcome(
        result=result,
        weights=move_data_to_device(module_state(trainer.lightning_module), cpu),
        state=trainer.state,
        progress=trainer.fit_progress,
        metrics=trainer.metrics_on_cpu(),
        callbacks=[
            {k: getattr(c, k) for k in _COPIED if hasattr(c, k)} | {"state": c.state_dict()} for c in trainer.callbacks
        ],
        loggers=[logger.state_dict() for logger in trainer.loggers] if trainer.is_global_zero else [],
        should_stop=trainer.should_stop,
    )


def _adopt(trainer: Trainer, module: LightningModule, outcome: Outcome) -> None:
    """Take over an outcome in the process that waited for it."""
    load_module_state(module, outcome.weights, strict=False)
    trainer.take_outcome(module, outcome.state, outcome.progress, outcome.metrics, outcome.should_stop)
    for callback, copied in zip(trainer.callbacks, outcome.callbacks, strict=False):
        state = copied.pop("state")
        for key, value in copied.items():
            setattr(callback, key, value)
        if state:
            callback.load_state_dict(state)
    for logger, state in zip(trainer.loggers, outcome.loggers, strict=False):
        if state:  # the run that the other processes have written is the one that this trainer has
            logger.resume(state)


def raise_asked_for(callbacks: Iterable[Callback]) -> None:
    """Raise, once, what a callback asked for in the process that called the trainer; see ``raised_after_fit``."""
    for callback in callbacks:
        if isinstance(error := callback.raised_after_fit, BaseException):
            callback.raised_after_fit = None
            raise error
