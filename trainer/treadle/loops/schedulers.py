"""When learning-rate schedulers step."""

from __future__ import annotations

from functools import partial
from typing import Any

from treadle.module import LightningModule
from treadle.module.overriding import overrides
from treadle.run.run import Run
from treadle_fabric import MisconfigurationException, near_names, rank_zero_warn

__all__ = ["Schedulers"]


class Schedulers:
    """Steps the learning-rate schedulers of a run that are due; in manual optimization none."""

    def __init__(self, run: Run) -> None:
        self.configs = run.schedulers if run.module.automatic_optimization else []
        self._progress, self._metrics, self._first_time = run.progress, run.metrics, run.first_time
        hook: Any = run.module.lr_scheduler_step
        own = overrides(run.module, "lr_scheduler_step", LightningModule)
        self._step = partial(run.dispatch.run, "lr_scheduler_step", hook) if own else hook

    def step(self, interval: str, count: int, *, plateau: bool = False) -> None:
        """Step the schedulers that are due.

        Args:
            interval: "step" or "epoch": what has just ended.
            count: how many of those have ended.
            plateau: whether the schedulers that monitor a metric are meant, or the others.

        Raises:
            MisconfigurationException: a monitored metric was not logged (with ``strict``); names the near ones.
        """
        for config in self.configs:
            if config.interval != interval or config.reduce_on_plateau is not plateau or count % config.frequency:
                continue
            value = None
            if config.reduce_on_plateau and config.monitor is not None:
                found = self._metrics.callback
                value = found.get(config.monitor)
                if value is None:
                    message = (
                        f"The scheduler {type(config.scheduler).__name__} monitors {config.monitor!r}, which nobody"
                        f" logged. {near_names(config.monitor, found)}"
                    )
                    if config.strict:
                        raise MisconfigurationException(f"{message} Log it, or set 'strict': False.")
                    if self._first_time(f"no {config.monitor} to step by"):
                        rank_zero_warn(f"{message} The step is skipped.")
                    continue
            self._step(config.scheduler, value)
            self._progress.scheduler_steps += 1
            self._progress.scheduler_steps_in_epoch += 1
