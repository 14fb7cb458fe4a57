"""Trials: a few batches of a stage on a trainer of their own, after which everything is as it was before."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from treadle.callbacks import Callback
from treadle.data.find import find_loaders
from treadle.loops.optimizers import parse_optimizers
from treadle.loops.stopping import Controls
from treadle.module import LightningDataModule, LightningModule
from treadle.run.run import ReadyRun, Run
from treadle.run.signals import Signals
from treadle.searches import Snapshot
from treadle.stages import TrainerFn, TrainerState
from treadle.trainer.settings import Settings
from treadle_fabric import Fabric, MisconfigurationException, isolate_rng
from treadle_fabric.accelerators import garbage_collection_cuda, is_oom_error
from treadle_fabric.data import CombinedLoader, copy_loader, sized_len

if TYPE_CHECKING:
    from treadle.contracts import Trainer

__all__ = ["LOADERS", "Trials", "trial_settings", "undone"]

LOADERS: Final = {
    TrainerFn.FITTING: "train",
    TrainerFn.VALIDATING: "val",
    TrainerFn.TESTING: "test",
    TrainerFn.PREDICTING: "predict",
}
"""The loaders of a stage."""


def trial_settings(settings: Settings, limits: Mapping[str, int | float] | None = None) -> Settings:
    """The settings of a trial: the user's, without what writes, checks or resumes.

    Args:
        settings: The user's.
        limits: Limits of batches that replace the user's.
    """
    return replace(
        settings,
        limits={**settings.limits, **(limits or {})},
        num_sanity_val_steps=0,
        log_every_n_steps=0,
        reload_dataloaders_every_n_epochs=0,
        enable_checkpointing=False,
        enable_autolog_hparams=False,
        auto_resume=False,
        on_nonfinite=None,  # a loss that explodes is what a search looks for, and no file is to be written
    )


@contextmanager
def undone(fabric: Fabric, snapshot: Snapshot) -> Generator[None]:
    """While entered, anything may be done to what a snapshot has noted; on exit all is as it was."""
    strategy = fabric.strategy
    snapshot.add(strategy.precision)  # a gradient scaler is part of it
    engine, callbacks = strategy.engine_state(), list(fabric.callbacks)
    with isolate_rng():
        try:
            yield
        finally:
            fabric.callbacks[:] = callbacks
            snapshot.restore()
            strategy.load_engine_state(engine)


class TrialRunner(Protocol):
    """What runs the stages of a trainer, as far as trials use it."""

    state: TrainerState

    @property
    def run(self) -> Run | None:
        """The run."""

    @property
    def signals(self) -> Signals:
        """The signals that end a fit."""

    def train_trial(self, other: ReadyRun, loaders: Any, bounds: Controls, signals: Signals, *, alone: bool) -> None:
        """Train with what another run has set up, until a callback raises what ends the trial."""

    def end_trial(self) -> None:
        """Call the hook that ends training."""

    def evaluate_trial(self, other: ReadyRun, loaders: Any) -> None:
        """Validate, test or predict with what another run has set up."""


class _OverError(Exception):
    """The trial has all the batches that it needs."""


@dataclass
class _Bounds:
    """What a trial heeds in the place of the trainer's ``should_stop`` and bounds: it ends by its listener alone."""

    accumulate_grad_batches: int
    should_stop: bool = False
    max_epochs: int | None = -1
    min_epochs: int | None = None
    max_steps: int = -1
    min_steps: int | None = None


class _Listener(Callback):
    """Tells the search of each training batch, after the module's own hooks."""

    monitors = True

    def __init__(
        self, before: Callable[[], None], after: Callable[[Tensor | None, bool], bool], *, one_epoch: bool = False
    ) -> None:
        self._before, self._after, self._one_epoch = before, after, one_epoch
        self._idle = 0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._idle += 1
        if self._idle > 2:
            raise MisconfigurationException(
                "A search cannot go on: two epochs had no training batch. `on_train_batch_start` may have left out all"
                " of them, or the training loader gives batches once only."
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._before()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._idle = 0
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
        if self._after(loss, trainer.fit_progress.stepping) or (self._one_epoch and trainer.is_last_batch):
            raise _OverError


class Trials:
    """Runs trials with module, engine and optimizers of a run, as :class:`treadle.searches.trials.Trials` declares.

    Each trial has a trainer of its own, with the user's settings and runtime but without callbacks and loggers, and
    with a runner of its own, so that the trainer whose run this is does not notice. Module, data module, loaders,
    optimizers and schedulers are the run's own; a snapshot puts them back after each trial.

    Args:
        trainer: The trainer that runs.
        runner: Its runner.
        settings: Its settings.
        given: The loaders that the user passed, or None.
        keeps_values: Whether to put back the values of weights, too. False where the caller does it at the end.
    """

    def __init__(
        self, trainer: Trainer, runner: TrialRunner, settings: Settings, given: Any, *, keeps_values: bool
    ) -> None:
        run, fn = runner.run, runner.state.fn
        if not isinstance(run, ReadyRun) or fn is None:
            raise MisconfigurationException(
                "A search was asked for before the module is set up: call it in `on_fit_start` (or that of the stage)"
                " or later, or use `treadle.tuner.Tuner`."
            )
        self._trainer, self._runner, self._settings = trainer, runner, settings
        self._run, self._fn = run, fn
        self.given_loaders = given
        if any(isinstance(each, Iterator) for each in _flat(given)):
            raise MisconfigurationException(
                "A search was asked for with an iterator as loader: it gives each batch once, and the search would use"
                " batches up. Pass a DataLoader, or an iterable that begins again, such as a list."
            )
        self._snapshot = Snapshot(
            run.module,
            *self.optimizers,
            *(config.scheduler for config in run.schedulers),
            data=[run.datamodule, given],
            values=keeps_values,
        )
        self.loader_batch_size: int | None = None
        self.samples: int | None = None

    @property
    def module(self) -> LightningModule:
        """The module that runs."""
        return self._run.module

    @property
    def datamodule(self) -> LightningDataModule | None:
        """The data module, or None."""
        return self._run.datamodule

    @property
    def optimizers(self) -> list[Optimizer]:
        """The torch optimizers of the run."""
        return [each.optimizer for each in self._run.optimizers]

    @property
    def shows_progress(self) -> bool:
        """Whether the search may use the last line of the terminal: no progress bar has it."""
        return (
            self._trainer.is_global_zero
            and self._settings.enable_progress_bar
            and self._trainer.progress_bar_callback is None
        )

    def mean(self, value: Tensor | None) -> float | None:
        """The mean of a value over the ranks that have one; None where none has."""
        strategy = self._run.fabric.strategy
        if strategy.world_size == 1:
            return None if value is None else float(value.mean())
        pair = torch.zeros(2, dtype=torch.float32, device=strategy.root_device)
        if value is not None:
            pair[0], pair[1] = value.float().mean(), 1
        total, count = strategy.all_reduce(pair, reduce_op="sum").tolist()
        return total / count if count else None

    def configured_groups(self) -> list[dict[str, Any]]:
        """The parameter groups of what ``configure_optimizers`` returns now, without their parameters."""
        with self._undone():
            found = self._run.dispatch.run("configure_optimizers", self.module.configure_optimizers)
            groups = [group for each in parse_optimizers(found, self.module)[0] for group in each.param_groups]
            return [{name: copy.copy(value) for name, value in group.items() if name != "params"} for group in groups]

    def train(self, before: Callable[[], None], after: Callable[[Tensor | None, bool], bool]) -> None:
        """Train until ``after`` returns True; see :class:`treadle.searches.trials.Trials`."""
        with self._undone():
            self._train(_Listener(before, after))

    def fits(self, steps: int) -> bool:
        """Run ``steps`` batches, or one epoch if that has fewer; returns whether all ranks had memory for them."""
        failed = False
        with self._undone():
            try:
                failed = self._try_batches(steps)
            except Exception as error:
                if not is_oom_error(error):
                    raise
                self._refuse_alone(error)
                failed = True
        if failed or self._run.fabric.device.type != "cpu":
            garbage_collection_cuda()  # an error has held the frames in which memory became full
        return not self._run.fabric.strategy.reduce_boolean_decision(failed, all=False)

    def _refuse_alone(self, error: Exception) -> None:
        """Other ranks wait in the model for a rank that has no room, where the strategy's ranks run it together."""
        strategy = self._run.fabric.strategy
        if strategy.forward_is_collective and strategy.world_size > 1:
            raise MisconfigurationException(
                f"The batch size that is tried does not fit into the memory of rank {strategy.global_rank}, and under"
                f" {type(strategy).__name__} the other ranks wait for that rank, so that the search cannot go on: set"
                " the size that was tried before it, or bound the search (max_val, max_trials)."
            ) from error

    def _try_batches(self, steps: int) -> bool:
        if self._fn is not TrainerFn.FITTING:
            return self._evaluate(steps)
        left = steps

        def after(loss: Tensor | None, stepping: bool) -> bool:
            nonlocal left
            left -= 1
            return left == 0

        # Only some ranks may have no room: the others must not wait for their gradients, losses and buffers
        fabric, epochs = self._run.fabric, self._run.progress.epoch + 1
        if "synchronizes" in (engine := fabric.strategy.engine_state()):
            fabric.strategy.load_engine_state({**engine, "synchronizes": False})
        with fabric.no_backward_sync(self._run.wrapped, enabled=not fabric.strategy.forward_is_collective):
            self._train(_Listener(lambda: None, after, one_epoch=True), epochs=epochs, alone=True)
        return False

    def _train(self, listener: _Listener, *, epochs: int = -1, alone: bool = False) -> None:
        bounds = _Bounds(self._trainer.accumulate_grad_batches, max_epochs=epochs)
        runner = self._trainer.for_trials(trial_settings(self._settings, {"val": 0}), [listener])
        loaders = self._loaders()
        try:
            runner.train_trial(self._run, loaders, bounds, self._runner.signals, alone=alone)
        except _OverError:
            runner.end_trial()
        if self._run.fabric.strategy.shards_parameters:  # what the last batches left, where a snapshot does not see it
            self._run.fabric.strategy.settle_gradients(self._run.engine)

    def _evaluate(self, steps: int) -> bool:
        stage = LOADERS[self._fn]
        limit = self._settings.limits[stage]
        steps = min(steps, limit) if isinstance(limit, int) else steps
        runner = self._trainer.for_trials(trial_settings(self._settings, {stage: steps}), [])
        guard = _Guard(self.module, stage) if self._run.fabric.world_size > 1 else None
        runner.evaluate_trial(self._run, self._loaders())
        return guard is not None and guard.failed

    def _loaders(self) -> Any:
        """The loaders of the stage, as copies that have workers of their own."""
        name = f"{LOADERS[self._fn]}_dataloader"
        found = self._run.dispatch.run(name, find_loaders, self.given_loaders, name, self.module, self.datamodule)
        self._snapshot.add(data=[found])
        flat = list(_flat(found))
        sizes = [size for each in flat if (size := _batch_size(each)) is not None]
        self.loader_batch_size = sizes[0] if sizes else None
        counts = [sized_len(each.dataset) for each in flat if isinstance(each, DataLoader)]
        known = [count for count in counts if count is not None]
        ranks = self._run.fabric.world_size
        self.samples = max(1, max(known) // ranks) if known and len(known) == len(flat) else None
        return _copied(found)

    @contextmanager
    def _undone(self) -> Generator[None]:
        with ExitStack() as stack:
            stack.enter_context(self._run.steps.paused())
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.set_grad_enabled(self._fn is TrainerFn.FITTING))
            stack.enter_context(undone(self._run.fabric, self._snapshot))
            yield


class _Guard:
    """Keeps a rank without memory in step with the others: its later evaluation steps do nothing.

    The module's step is replaced by another one, which the snapshot takes away after the trial.
    """

    def __init__(self, module: LightningModule, stage: str) -> None:
        self.failed = False
        name = {"val": "validation_step"}.get(stage, f"{stage}_step")
        step = getattr(module, name)

        @functools.wraps(step)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            if self.failed:
                return None
            try:
                return step(*args, **kwargs)
            except Exception as error:
                if not is_oom_error(error):
                    raise
                self.failed = True
                return None

        module.__dict__[name] = guarded


def _flat(loaders: Any) -> Generator[Any]:
    if isinstance(loaders, CombinedLoader):
        yield from loaders.flattened
    elif isinstance(loaders, Mapping):
        for each in loaders.values():
            yield from _flat(each)
    elif isinstance(loaders, (list, tuple)):
        for each in loaders:
            yield from _flat(each)
    else:
        yield loaders


def _batch_size(loader: Any) -> int | None:
    size = getattr(loader, "batch_size", None)
    size = getattr(getattr(loader, "batch_sampler", None), "batch_size", None) if size is None else size
    return size if isinstance(size, int) else None


def _copied(loaders: Any) -> Any:
    """The same loaders with workers of their own: those of the originals may be in the middle of an epoch."""
    if isinstance(loaders, DataLoader):
        return copy_loader(loaders)
    if isinstance(loaders, CombinedLoader):
        other = copy.copy(loaders)
        other.flattened = [_copied(each) for each in loaders.flattened]
        return other
    if isinstance(loaders, dict):
        return {name: _copied(each) for name, each in loaders.items()}
    if type(loaders) in (list, tuple) and all(isinstance(each, DataLoader) for each in loaders):
        return [_copied(each) for each in loaders]
    return loaders
