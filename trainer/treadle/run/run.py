"""The parts of a run: decided once, and never assigned again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch.nn import Module

from treadle.metrics.bus import Results
from treadle.metrics.latest import Metrics
from treadle.metrics.values import metrics_by_path, to_floats
from treadle.module import LightningDataModule, LightningModule, LRSchedulerConfig
from treadle.profilers.profiler import Profiler, timed
from treadle.run.changes import ModelChanges
from treadle.run.dispatch import Dispatch, action_of
from treadle.run.loss import LossPolicy
from treadle.run.progress import FitProgress
from treadle.run.steps import StepCounter
from treadle.stages import TrainerState
from treadle_fabric import Fabric, FabricModule, FabricOptimizer, engine_of, method_of
from treadle_fabric.checkpoint import FileMaps
from treadle_fabric.loggers import Logger

__all__ = ["ReadyRun", "Run"]


@dataclass(frozen=True, eq=False, repr=False)
class Run:
    """The parts of a fit, validate, test or predict that exist before the module is set up; hooks can be called."""

    fabric: Fabric
    module: LightningModule
    datamodule: LightningDataModule | None
    dispatch: Dispatch
    state: TrainerState
    metrics: Metrics
    results: Results
    loggers: list[Logger]
    progress: FitProgress
    modules: list[LightningModule]
    """The module and its children that are LightningModules: all of them may log."""
    optimizers: list[FabricOptimizer] = field(default_factory=list)
    """The wrapped optimizers, whose ``step`` goes through precision and strategy. Empty before
    ``configure_optimizers``, and outside of fit."""
    schedulers: list[LRSchedulerConfig] = field(default_factory=list)
    validated: dict[int, int] = field(default_factory=dict)
    """The batches of each loader in all evaluations of this run: the x axis of values logged on evaluation steps."""
    told: set[str] = field(default_factory=set)
    """What this run has warned of: parts that are made anew do not repeat it."""
    changes: ModelChanges = field(default_factory=ModelChanges)
    """What the run changes about its module and optimizers: what is trainable, modes, parameter groups."""
    maps: FileMaps = field(default_factory=FileMaps)
    """The file that the run starts from, until all of it is restored."""
    profiler: Profiler | None = None
    """Measures the actions of the run; None where nobody does."""

    @property
    def metric_objects(self) -> tuple[list[Any], dict[str, Any]]:
        """The torchmetrics collections in the module, and the single torchmetrics objects of the run by path."""
        collections = [each for each in self.module.modules() if hasattr(each, "compute_groups")]
        return collections, metrics_by_path(self.module, self.results.callbacks)

    def log_to(self, results: Results) -> Results:
        """Send ``self.log`` to the slots of another stage, and return the slots that it went to before."""
        before = self.dispatch.results
        self.metrics.keep(before)  # its step values can still be read
        self.dispatch.results = results
        self.metrics.active = results
        for module in self.modules:
            module.attach_metrics(results)
        return before

    def write(
        self, metrics: Mapping[str, Any], step: int, *, with_epoch: bool = True, epoch: int | None = None
    ) -> None:
        """Send metrics to the loggers, in one transfer from the device. A metric called ``step`` replaces the step.

        Args:
            metrics: names and values.
            step: the x axis.
            with_epoch: add the epoch, unless there is a metric called ``step``.
            epoch: that the values are of. Default: the current one.
        """
        if not metrics or not self.loggers:
            return
        scalars: dict[str, Any] = to_floats(metrics)
        if "step" in scalars:
            step = int(scalars.pop("step"))
        elif with_epoch:
            scalars.setdefault("epoch", self.progress.epoch if epoch is None else epoch)
        for logger in self.loggers:
            logger.log_metrics(scalars, step)

    def timed(self, function: Callable[..., Any], name: str, owner: object = None) -> Callable[..., Any]:
        """Return a function that the profiler measures; ``function`` itself where there is no profiler.

        Args:
            function: what is measured.
            name: of the action.
            owner: the module, the strategy, ... that does it. Default: the loop.
        """
        return function if self.profiler is None else timed(self.profiler, action_of(owner, name), function)

    def first_time(self, what: str) -> bool:
        """Return whether this run asks for the first time; for what is told once."""
        first = what not in self.told
        self.told.add(what)
        return first

    def ready(self, **parts: Any) -> ReadyRun:
        """Return this run with the parts that :class:`ReadyRun` adds."""
        return ReadyRun(**{each.name: getattr(self, each.name) for each in fields(Run)}, **parts)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ReadyRun(Run):
    """A run whose module is on its device and in its engine: batches can be run."""

    wrapped: FabricModule
    transfer: Callable[[Any, int], Any]
    """Moves a batch to the device: takes the batch and the index of its loader."""
    loss: LossPolicy
    """How losses become the gradients of an optimizer step."""
    steps: StepCounter
    """Counts the optimizer steps of a fit."""
    before_validation: dict[str, Any] = field(default_factory=dict)
    """What a checkpoint saved in the middle of a validation keeps, so that a resumed run begins that validation anew.
    Empty outside of a validation."""
    unwritten: dict[str, Any] = field(default_factory=dict)
    """In the end hooks of an epoch: ``values`` of the epoch that no logger has yet, and whether those that a hook still
    logs are ``local`` to the ranks."""

    @property
    def engine(self) -> Module:
        """The strategy's engine, which runs the module."""
        return engine_of(self.wrapped)

    def method(self, name: str, *, changes_weights: bool = False) -> Callable[..., Any]:
        """Return a method of the module for a hot loop: through the engine, in the precision.

        Args:
            name: of the method.
            changes_weights: whether it may change weights and use them again.
        """
        method = method_of(self.wrapped, name, changes_weights=changes_weights)
        return self.timed(method, name, self.fabric.strategy)
