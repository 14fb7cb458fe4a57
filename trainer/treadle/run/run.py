"""What a run is made of, decided once before it starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from treadle.data.transfer import stay
from treadle.metrics.bus import Results
from treadle.metrics.latest import Metrics
from treadle.metrics.values import is_metric, to_floats
from treadle.module import LightningDataModule, LightningModule
from treadle.run.dispatch import Dispatch
from treadle.run.loss import LossPolicy
from treadle.run.progress import FitProgress, LRSchedulerConfig
from treadle.stages import TrainerState
from treadle_fabric import Fabric, FabricModule, FabricOptimizer
from treadle_fabric.loggers import Logger

__all__ = ["Run"]


@dataclass
class Run:
    """The parts of one fit, validate, test or predict. The loops read it; the trainer shows it to the user."""

    fabric: Fabric
    module: LightningModule
    datamodule: LightningDataModule | None
    dispatch: Dispatch
    state: TrainerState
    metrics: Metrics
    results: Results
    loggers: list[Logger]
    progress: FitProgress
    modules: list[LightningModule] = field(default_factory=list)
    """The module and its children that are LightningModules: all of them may log."""
    wrapped: FabricModule | None = None
    optimizers: list[FabricOptimizer] = field(default_factory=list)
    """Wrapped: their ``step`` goes through precision and strategy."""
    schedulers: list[LRSchedulerConfig] = field(default_factory=list)
    transfer: Callable[[Any, int], Any] = stay
    """How a batch of a loader reaches the device."""
    validated: dict[int, int] = field(default_factory=dict)
    """Batches of each loader in all evaluations of this run: the x axis of values logged on their steps."""
    before_validation: dict[str, Any] = field(default_factory=dict)
    """What a checkpoint in the middle of a validation keeps: a resumed run begins it anew."""

    loss: LossPolicy | None = None
    """How losses become gradients; None in a run that does not train."""

    @cached_property
    def metric_objects(self) -> tuple[list[Any], dict[str, Any]]:
        """The torchmetrics collections in the module, and its single torchmetrics objects by path."""
        found = list(self.module.named_modules())
        return [m for _, m in found if hasattr(m, "compute_groups")], {n: m for n, m in found if is_metric(m)}

    def log_to(self, results: Results) -> Results:
        """Send ``self.log`` to the slots of another stage; returns those it went to before."""
        before = self.dispatch.results
        assert before is not None
        self.metrics.keep(before)  # its step values stay in sight
        self.dispatch.results = results
        self.metrics.active = results
        for module in self.modules:
            module.attach_metrics(results)
        return before

    def write(self, metrics: Mapping[str, Any], step: int, *, with_epoch: bool = True) -> None:
        """Send metrics to the loggers, in one transfer from the device. A metric called ``step`` replaces the step."""
        if not metrics or not self.loggers:
            return
        scalars: dict[str, Any] = to_floats(metrics)
        if "step" in scalars:
            step = int(scalars.pop("step"))
        elif with_epoch:
            scalars.setdefault("epoch", self.progress.epoch)
        for logger in self.loggers:
            logger.log_metrics(scalars, step)
