"""Make the parts of a run: optimizers, evaluations, epochs."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.optim import Optimizer

from treadle.data.advice import advise
from treadle.data.evaluation import EvaluationData
from treadle.data.find import defines_loader, find_loaders, gives_loaders
from treadle.data.training import TrainingData
from treadle.data.transfer import make_transfer
from treadle.loops.epoch import TrainingEpoch
from treadle.loops.fit import FitLoop
from treadle.loops.optimizers import check_optimizers, check_together, explained_optimizers, parse_optimizers
from treadle.loops.schedule import ValidationSchedule
from treadle.loops.step.choose import choose_step
from treadle.loops.step.clipping import Clipping
from treadle.loops.step.preparation import Preparation
from treadle.loops.stopping import Controls
from treadle.module import LightningModule, LRSchedulerConfig
from treadle.module.optimizer import LightningOptimizer
from treadle.module.overriding import overrides
from treadle.numbers.losses import choose_loss_policy
from treadle.run.dispatch import action_of
from treadle.run.layer_sync import LayerSync
from treadle.run.run import ReadyRun, Run
from treadle.run.signals import Signals
from treadle.run.steps import StepCounter
from treadle.stages import TrainerFn
from treadle.trainer.preflight import merged_hyperparameters
from treadle.trainer.settings import Settings
from treadle_fabric import (
    FabricOptimizer,
    MisconfigurationException,
    PossibleUserWarning,
    is_list,
    rank_zero_warn,
    with_plain_names,
)
from treadle_fabric.accelerators import Accelerator
from treadle_fabric.precision import needs_closure, takes_closure

__all__: list[str] = []


def sync_layers(module: nn.Module, sync: LayerSync, accelerator: Accelerator) -> None:
    """Let layers of ``module`` share over the ranks.

    Raises:
        MisconfigurationException: torch cannot share batch norm between devices of this accelerator; or the plugin made
            another module.
    """
    if sync.apply(module) is not module:
        raise MisconfigurationException(
            f"{type(sync).__qualname__}.apply made another module, and the run has this one: let it change the layers"
            " of the module that it gets, and return that."
        )
    layers = [name for name, m in with_plain_names(module, module.named_modules()) if isinstance(m, nn.SyncBatchNorm)]
    if layers and not accelerator.shares_batch_norm:
        sync.revert(module)
        raise MisconfigurationException(
            f"sync_batchnorm=True, but torch cannot share the statistics of {layers[0]!r} between devices of"
            f" accelerator={accelerator.name()!r}: leave sync_batchnorm out."
        )


def set_up(run: Run, settings: Settings) -> ReadyRun:
    """Bring the module to its device and into its engine.

    Where the strategy sets up module and optimizers together, a fit makes its optimizers and schedulers here;
    otherwise :func:`set_up_optimizers` makes them afterwards.
    """
    fabric = run.fabric
    loss = choose_loss_policy(run, settings.on_nonfinite, settings.default_root_dir)
    transfer = make_transfer(run.module, run.datamodule, fabric.device, run.dispatch.run)
    transfer = run.timed(transfer, "batch_to_device", fabric.strategy)
    steps = StepCounter(run.progress, run.module)
    if run.state.fn is TrainerFn.FITTING and fabric.strategy.sets_up_jointly:
        made = fabric.setup(run.module._runs, *_configure_optimizers(run))
        wrapped, *others = made if isinstance(made, tuple) else (made,)
        stepped = [each.optimizer for each in others if isinstance(each, FabricOptimizer)]
        run.schedulers.extend(LRSchedulerConfig(each, interval="step") for each in others[len(stepped) :])
        ready = run.ready(wrapped=wrapped, transfer=transfer, loss=loss, steps=steps)
        _add_optimizers(ready, stepped)
        return ready
    return run.ready(wrapped=fabric.setup_module(run.module._runs), transfer=transfer, loss=loss, steps=steps)


def take_over(run: Run, other: ReadyRun, settings: Settings, *, alone: bool) -> ReadyRun:
    """Let a trial run with the engine and the optimizers of another run, in which the module is set up.

    Schedulers are taken over only where the module steps them itself: a search sets the learning rates.

    Args:
        run: The trial's run.
        other: The other run.
        settings: The trial's.
        alone: Whether ranks must not wait for each other in a step.
    """
    run.changes.begin(run.module)
    loss = choose_loss_policy(run, settings.on_nonfinite, settings.default_root_dir, alone=alone)
    transfer = make_transfer(run.module, run.datamodule, run.fabric.device, run.dispatch.run)
    ready = run.ready(wrapped=other.wrapped, transfer=transfer, loss=loss, steps=StepCounter(run.progress, run.module))
    _add_optimizers(ready, [each.optimizer for each in other.optimizers])
    if not run.module.automatic_optimization:
        run.schedulers.extend(other.schedulers)
    return ready


def set_up_optimizers(run: ReadyRun) -> None:
    """Make the optimizers and schedulers, unless :func:`set_up` has made them."""
    strategy = run.fabric.strategy
    if not strategy.sets_up_jointly:
        _add_optimizers(run, [strategy.setup_optimizer(optimizer) for optimizer in _configure_optimizers(run)])


def replace_optimizers(run: ReadyRun, optimizers: Sequence[Any]) -> None:
    """Let the run have other optimizers; each may be in the wrapper of a run."""
    plain = [each.optimizer if isinstance(each, FabricOptimizer) else each for each in optimizers]
    check_optimizers(plain, run.module)
    if len(plain) > 1 and run.module.automatic_optimization:
        check_together(plain, run.module, run.fabric.strategy)
    run.changes.note_groups(run.module, plain)
    run.optimizers.clear()
    _add_optimizers(run, [run.fabric.strategy.setup_optimizer(optimizer) for optimizer in plain])


def _configure_optimizers(run: Run) -> list[Optimizer]:
    with run.changes.undone(run.module), explained_optimizers(run.module):
        returned = run.dispatch.run("configure_optimizers", run.module.configure_optimizers)
    if returned is None and run.fabric.strategy.brings_optimizer:
        return []
    optimizers, schedulers = parse_optimizers(returned, run.module)
    if len(optimizers) > 1 and run.module.automatic_optimization:
        check_together(optimizers, run.module, run.fabric.strategy)
    run.changes.note_groups(run.module, optimizers)
    run.schedulers.extend(schedulers)
    return optimizers


def _add_optimizers(run: ReadyRun, optimizers: list[Optimizer]) -> None:
    """Add the optimizers to the run; in manual optimization, their steps call the step's hook."""
    steps, module = run.steps, run.module

    def prepare_step(optimizer: Optimizer) -> None:
        steps.begin(optimizer)
        preparation = preparations[optimizer]
        if not preparation.permits():
            steps.leave_out(optimizer)
        elif preparation.shows:
            run.dispatch.run("on_before_optimizer_step", preparation.show, optimizer)

    preparations = {optimizer: Preparation(run, [optimizer]) for optimizer in optimizers}

    own = overrides(module, "optimizer_step", LightningModule)
    closures = own or any(needs_closure(each) or takes_closure(each) for each in optimizers)
    for optimizer in optimizers:
        steps.add(optimizer)
        hooks: tuple[Any, Any] = (None, None)  # the loop steps the plain optimizer
        if not module.automatic_optimization:
            hooks = prepare_step, steps.end
        elif closures:
            hooks = steps.begin, steps.end
        if not module.automatic_optimization and run.profiler is not None:
            hooks = _timed_hooks(run, *hooks)
        run.optimizers.append(LightningOptimizer(optimizer, run.fabric.strategy, *hooks, partial(_toggled, run)))


@contextmanager
def _toggled(run: ReadyRun, optimizer: Optimizer, sync_grad: bool) -> Generator[None]:
    """A context in which only the parameters of an optimizer require gradients, and ranks exchange them, or do not."""
    accumulates = not sync_grad and run.fabric.world_size > 1
    with run.fabric.no_backward_sync(run.wrapped, enabled=accumulates), run.module.toggled_optimizer(optimizer):
        yield


def _timed_hooks(run: ReadyRun, before: Callable[..., Any], after: Callable[..., Any]) -> tuple[Any, Any]:
    """Let the profiler measure what comes between the two hooks around a step of manual optimization."""
    profiler, action = run.profiler, action_of(run.fabric.strategy, "optimizer_step")
    assert profiler is not None

    def before_step(optimizer: Optimizer) -> None:
        before(optimizer)
        profiler.start(action)

    def after_step(optimizer: Optimizer) -> None:
        profiler.stop(action)
        after(optimizer)

    return before_step, after_step


def may_validate(run: Run, settings: Settings, val: Any) -> bool:
    """Return whether a fit validates, as far as that is known before its validation loaders are asked for."""
    given = val is not None or defines_loader(gives_loaders(run.module, run.datamodule), "val_dataloader")
    has_step = run.fabric.strategy.runs_whole_batch or overrides(run.module, "validation_step", LightningModule)
    return given and settings.limits["val"] != 0 and has_step


def validation_loaders(run: Run, val: Any) -> Any:
    """Find the validation loaders of a fit; None where there are none."""
    loaders = run.dispatch.run("val_dataloader", find_loaders, val, "val_dataloader", run.module, run.datamodule)
    return None if loaders is None or (is_list(loaders) and not loaders) else loaders


def evaluation_data(run: Run, settings: Settings, loaders: Any, stage: str) -> EvaluationData:
    """Share out the loaders of "val", "test" or "predict" over the ranks, and limit their batches."""
    _advise_once(run, settings, loaders, stage)
    return EvaluationData(
        loaders,
        run.fabric,
        limit=settings.limits[stage],
        name=f"{stage}_dataloaders",
        inject=settings.use_distributed_sampler,
        overfit=bool(settings.overfit_batches) and stage == "val",
    )


def _advise_once(run: Run, settings: Settings, loaders: Any, stage: str) -> None:
    """Tell, the first time that the loaders of a stage are made, what may not be meant about them."""
    if settings.limits[stage] and run.first_time(f"{stage} loaders"):
        overfit = bool(settings.overfit_batches) and stage in ("train", "val")
        processes = max(1, run.fabric.world_size // run.fabric.strategy.num_nodes)
        advise(loaders, stage, processes=processes, overfit=overfit)


def training_data(run: Run, settings: Settings, train: Any) -> TrainingData | None:
    """Find the training loader, share it out over the ranks, and limit its batches; None for a limit of 0."""
    if settings.limits["train"] == 0:
        return None
    loader = run.dispatch.run("train_dataloader", find_loaders, train, "train_dataloader", run.module, run.datamodule)
    _advise_once(run, settings, loader, "train")
    return TrainingData(
        loader,
        run.fabric,
        limit=settings.limits["train"],
        overfit=bool(settings.overfit_batches),
        inject=settings.use_distributed_sampler,
    )


def make_epoch(
    run: ReadyRun,
    settings: Settings,
    data: TrainingData,
    loop: FitLoop,
    controls: Controls,
    signals: Signals,
) -> TrainingEpoch:
    """Make the epoch loop over ``data``."""
    schedule = None
    if loop.validates:
        schedule = ValidationSchedule.resolve(
            settings.val_check_interval, settings.check_val_every_n_epoch, data.num_batches
        )
    every = settings.log_every_n_steps
    few = data.num_batches < every and not settings.fast_dev_run
    if run.loggers and few and run.first_time("few step values"):
        rank_zero_warn(
            f"The number of training batches ({data.num_batches}) is smaller than the logging interval"
            f" Trainer(log_every_n_steps={every}), so that values of steps are not logged in every epoch. Set a lower"
            " `log_every_n_steps` to see more of them.",
            category=PossibleUserWarning,
        )
    clipping = Clipping(run, settings.gradient_clip_val, settings.gradient_clip_algorithm)
    return TrainingEpoch(
        run,
        data,
        choose_step(run, clipping),
        controls,
        schedule=schedule,
        validate=loop.validate,
        elapsed=loop.validation_elapsed,
        may_stop=loop.may_stop,
        log_every_n_steps=every,
        signals=signals,
        agreement=loop.agreement,
    )


def log_hyperparameters(run: Run, settings: Settings) -> None:
    """Send the hyper-parameters and the graph to the loggers."""
    if not run.loggers or not settings.enable_autolog_hparams:
        return
    hparams = merged_hyperparameters(run.module, run.datamodule)
    for logger in run.loggers:
        if hparams:
            logger.log_hyperparams(hparams)
        logger.log_graph(run.module)
        logger.save()
