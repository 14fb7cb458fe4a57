"""The parts of a run put together: optimizers, evaluations, epochs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from treadle.data.evaluation import EvaluationData
from treadle.data.find import find_loaders
from treadle.data.training import TrainingData
from treadle.loops.epoch import TrainingEpoch
from treadle.loops.evaluate import Evaluation
from treadle.loops.fit import FitLoop
from treadle.loops.optimizers import parse_optimizers
from treadle.loops.schedule import ValidationSchedule
from treadle.loops.step.automatic import AutomaticStep
from treadle.loops.step.clipping import Clipping
from treadle.loops.step.manual import ManualStep
from treadle.loops.step.preparation import Preparation
from treadle.loops.stopping import Controls
from treadle.module import LightningModule
from treadle.module.overriding import overrides
from treadle.numbers.losses import choose_loss_policy
from treadle.run.run import Run
from treadle.run.signals import Signals
from treadle.trainer.preflight import merged_hyperparameters
from treadle.trainer.settings import Settings
from treadle_fabric import FabricOptimizer, MisconfigurationException, rank_zero_info

__all__: list[str] = []


def share_batch_norm(module: nn.Module, device: torch.device) -> None:
    """Let the batch-norm layers of ``module`` share their statistics over the ranks."""
    nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]
    layers = [name for name, m in module.named_modules() if isinstance(m, nn.SyncBatchNorm)]
    if layers and device.type == "cpu":
        raise MisconfigurationException(
            f"sync_batchnorm=True, but torch shares the statistics of {layers[0]!r} between GPUs only, and this run is"
            " on the CPU: leave sync_batchnorm out."
        )


def set_up_optimizers(run: Run, settings: Settings) -> None:
    """Make the optimizers and schedulers; in manual optimization their steps are counted and have their hook."""
    run.loss = choose_loss_policy(run, settings.on_nonfinite, settings.default_root_dir)
    returned = run.dispatch.run("configure_optimizers", run.module.configure_optimizers)
    optimizers, run.schedulers = parse_optimizers(returned, run.module)
    prepare, progress, strategy = Preparation(run), run.progress, run.fabric.strategy
    manual = not run.module.automatic_optimization

    left_out: set[Optimizer] = set()

    def before_step(optimizer: Optimizer) -> None:
        if not run.dispatch.run("on_before_optimizer_step", prepare.of, optimizer):
            left_out.add(optimizer)

    def after_step(optimizer: Optimizer) -> None:
        if optimizer in left_out:
            left_out.remove(optimizer)
        else:
            progress.optimizer_steps += 1

    hooks = (before_step, after_step) if manual else (None, None)
    run.optimizers = [FabricOptimizer(strategy.setup_optimizer(o), strategy, *hooks) for o in optimizers]


def validation_loaders(run: Run, settings: Settings, val: Any) -> Any:
    """The validation loaders of a fit; None where it does not validate."""
    if settings.limits["val"] == 0 or not overrides(run.module, "validation_step", LightningModule):
        return None
    loaders = run.dispatch.run("val_dataloader", find_loaders, val, "val_dataloader", run.module, run.datamodule)
    return None if loaders is None or (isinstance(loaders, (list, tuple)) and not loaders) else loaders


def evaluation_data(run: Run, settings: Settings, loaders: Any, stage: str) -> EvaluationData:
    """The loaders of "val", "test" or "predict", shared out and limited."""
    return EvaluationData(
        loaders,
        run.fabric,
        limit=settings.limits[stage],
        name=f"{stage}_dataloaders",
        inject=settings.use_distributed_sampler,
        overfit=bool(settings.overfit_batches) and stage == "val",
    )


def training_data(run: Run, settings: Settings, train: Any) -> TrainingData | None:
    """The training loader, shared out and limited; None where no batch is to be trained on."""
    loader = run.dispatch.run("train_dataloader", find_loaders, train, "train_dataloader", run.module, run.datamodule)
    if settings.limits["train"] == 0:
        return None
    return TrainingData(
        loader,
        run.fabric,
        limit=settings.limits["train"],
        overfit=bool(settings.overfit_batches),
        inject=settings.use_distributed_sampler,
    )


def make_epoch(
    run: Run,
    settings: Settings,
    data: TrainingData,
    loop: FitLoop,
    controls: Controls,
    signals: Signals,
) -> TrainingEpoch:
    """The epoch loop over ``data``."""
    schedule = None
    if loop.validation is not None:
        schedule = ValidationSchedule.resolve(
            settings.val_check_interval, settings.check_val_every_n_epoch, data.num_batches
        )
    every = settings.log_every_n_steps
    if run.loggers and data.num_batches < every and data.num_batches * max(settings.durations.max_epochs, 1) >= 1:
        rank_zero_info(
            f"An epoch has {data.num_batches} batches, and values of steps are logged every {every} steps: lower"
            " `log_every_n_steps` to see more of them."
        )
    clipping = Clipping(run, settings.gradient_clip_val, settings.gradient_clip_algorithm)
    return TrainingEpoch(
        run,
        data,
        AutomaticStep(run, clipping) if run.module.automatic_optimization else ManualStep(run),
        controls,
        schedule=schedule,
        validate=loop.validate,
        elapsed=loop.validation_elapsed,
        may_stop=loop.may_stop,
        max_steps=settings.durations.max_steps,
        log_every_n_steps=settings.log_every_n_steps,
        signals=signals,
        agreement=loop.agreement,
    )


def make_evaluation(run: Run, settings: Settings, data: EvaluationData, name: str) -> Evaluation:
    """The evaluation "validation" or "test" over ``data``."""
    return Evaluation(run, data, name, inference_mode=settings.inference_mode)


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
