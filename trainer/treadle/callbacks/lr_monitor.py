"""LearningRateMonitor: logs the learning rates of the optimizers."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any, Literal

from torch.optim import Optimizer

from treadle.callbacks.callback import Callback
from treadle.callbacks.monitoring.intervals import is_multiple
from treadle.metrics.values import to_floats
from treadle_fabric import MisconfigurationException, rank_zero_warn

if TYPE_CHECKING:
    from treadle.contracts import LightningModule, Trainer

__all__ = ["LearningRateMonitor"]


class LearningRateMonitor(Callback):
    """Log the learning rate of every parameter group to all loggers.

    A rate is logged under the ``name`` of the scheduler. Without such a name it is ``lr-`` and the class of the
    optimizer, with ``-1``, ``-2``, ... added for further optimizers of that class. Where an optimizer has several
    parameter groups, ``/`` and the ``name`` of the group follow, or ``/pg1``, ``/pg2``, ... for groups without a name.
    The names of momentum and weight decay end in ``-momentum`` and ``-weight_decay``.

    Args:
        logging_interval: log at each "step" or "epoch". None: at the interval of each scheduler.
        log_momentum: log momentum too (for optimizers such as Adam, the first beta).
        log_weight_decay: log weight decay too.

    Raises:
        MisconfigurationException: ``logging_interval`` is anything else; and when fit begins, the trainer has no
            logger, or two schedulers or two parameter groups have the same name.
    """

    def __init__(
        self,
        logging_interval: Literal["step", "epoch"] | None = None,
        log_momentum: bool = False,
        log_weight_decay: bool = False,
    ) -> None:
        super().__init__()
        if logging_interval not in (None, "step", "epoch"):
            raise MisconfigurationException(
                f"LearningRateMonitor(logging_interval={logging_interval!r}): it must be 'step', 'epoch' or None."
            )
        self.logging_interval = logging_interval
        self.log_momentum = log_momentum
        self.log_weight_decay = log_weight_decay
        self.lrs: dict[str, list[float]] = {}
        self.last_momentum_values: dict[str, float | None] = {}
        self.last_weight_decay_values: dict[str, float | None] = {}
        self.lr_sch_names: list[str] = []
        self._every = 0  # log at each n-th step; 0: not at steps

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a trainer without loggers."""
        if stage == "fit" and not trainer.loggers and not trainer.fast_dev_run:
            raise MisconfigurationException(
                "Cannot use `LearningRateMonitor` callback with `Trainer` that has no logger: pass"
                " `Trainer(logger=True)`, or leave the callback out."
            )

    def on_train_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Find out the names under which the rates are logged."""
        sources = self._sources(trainer)
        self.lr_sch_names = [name for name, _, _ in sources]
        if self.log_momentum and any(not _has_momentum(optimizer) for _, optimizer, _ in sources):
            rank_zero_warn(
                "You have set log_momentum=True, but some optimizers do not have momentum: for these 0 is logged.",
                category=RuntimeWarning,
            )
        names = [key for name, optimizer, _ in sources for key in _group_names(name, optimizer)]
        self.lrs = {name: [] for name in names}
        self.last_momentum_values = {f"{name}-momentum": None for name in names}
        self.last_weight_decay_values = {f"{name}-weight_decay": None for name in names}
        at_steps = self.logging_interval == "step" or (
            self.logging_interval is None and any(interval != "epoch" for _, _, interval in sources)
        )
        self._every = trainer.log_every_n_steps if at_steps else 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Log before a step at which the loggers write."""
        progress = trainer.fit_progress
        due = is_multiple(progress.logging_step + 1, self._every)
        # while gradients accumulate, several batches have the same step
        if due and not progress.accumulation.place(batch_idx, math.inf).done:
            self._log(trainer, pl_module, "step")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log at the start of an epoch."""
        if self.logging_interval != "step" and not trainer.fit_progress.begun:  # begun: resumed within the epoch
            self._log(trainer, pl_module, "epoch")

    def _log(self, trainer: Trainer, pl_module: LightningModule, interval: str) -> None:
        given: dict[str, Any] = {}
        rates: list[str] = []
        for name, optimizer, own in self._sources(trainer):
            if self.logging_interval is None and own not in (interval, "any"):
                continue
            for key, group in zip(_group_names(name, optimizer), optimizer.param_groups, strict=True):
                rates.append(key)
                if key not in self.lrs and name in self.lrs:  # it was the only group until now
                    self.lrs[key] = self.lrs.pop(name)
                given[key] = group["lr"]
                if self.log_momentum:
                    given[f"{key}-momentum"] = group["betas"][0] if "betas" in group else group.get("momentum", 0)
                if self.log_weight_decay:
                    given[f"{key}-weight_decay"] = group.get("weight_decay", 0)
        if not given:
            return
        found = to_floats(given)  # rates may be on the device: one transfer for all
        for key in rates:
            self.lrs.setdefault(key, []).append(found[key])
        for last, kind in ((self.last_momentum_values, "momentum"), (self.last_weight_decay_values, "weight_decay")):
            last.update({name: value for key in rates if (value := found.get(name := f"{key}-{kind}")) is not None})
        for logger in trainer.loggers:
            logger.log_metrics(found, step=trainer.fit_progress.logging_step)
        at_step = interval == "step"
        for key, value in found.items():  # for callbacks that monitor a rate
            pl_module.log(key, value, logger=False, on_step=at_step, on_epoch=not at_step, batch_size=1)

    def _sources(self, trainer: Trainer) -> list[tuple[str, Optimizer, str]]:
        """Return name, optimizer and interval of every scheduler, and of every optimizer without a scheduler."""
        sources: list[tuple[str, Optimizer, str]] = []
        count: Counter[str] = Counter()

        def numbered(optimizer: Optimizer) -> str:
            base = f"lr-{type(optimizer).__name__}"
            count[base] += 1
            return base if count[base] == 1 else f"{base}-{count[base] - 1}"

        for config in trainer.lr_scheduler_configs:
            optimizer = config.scheduler.optimizer
            sources.append((config.name or numbered(optimizer), optimizer, config.interval))
        scheduled = {id(optimizer) for _, optimizer, _ in sources}
        sources += [(numbered(o), o, "any") for o in trainer.optimizers if id(o) not in scheduled]
        names = Counter(name for name, _, _ in sources)
        if twice := [name for name, times in names.items() if times > 1]:
            raise MisconfigurationException(
                f"LearningRateMonitor: two schedulers are called {twice[0]!r}; give each a `name` of its own."
            )
        return sources


def _group_names(name: str, optimizer: Optimizer) -> list[str]:
    groups = optimizer.param_groups
    if len(groups) == 1:
        return [name]
    names = [f"{name}/{group.get('name', f'pg{i}')}" for i, group in enumerate(groups, start=1)]
    if twice := [key for key, times in Counter(names).items() if times > 1]:
        raise MisconfigurationException(
            f"LearningRateMonitor: two parameter groups are called {twice[0]!r}; give each a 'name' of its own."
        )
    return names


def _has_momentum(optimizer: Optimizer) -> bool:
    return any(name in group for group in optimizer.param_groups for name in ("momentum", "betas"))
