"""Where ``self.log`` sends a value: the metric bus of a run, or nowhere."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from operator import methodcaller
from typing import TYPE_CHECKING, Any, Final, Protocol

import torch

from treadle_fabric import rank_zero_warn

if TYPE_CHECKING:
    from treadle.contracts import LightningModule
from treadle.metrics.options import GivenOptions, LogOptions
from treadle.metrics.values import flatten_metrics, is_metric, step_value

__all__ = ["NOT_LOGGING", "NOWHERE", "MetricSink", "silenced"]


class MetricSink(Protocol):
    """What ``self.log`` writes to."""

    def log(
        self, module: LightningModule, name: str, value: Any, options: GivenOptions, batch_size: int | None
    ) -> None: ...


class _NotLogging:
    """The sink without a trainer: sends values to the Fabric that set the module up, if any."""

    def log(
        self, module: LightningModule, name: str, value: Any, options: GivenOptions, batch_size: int | None
    ) -> None:
        if torch.compiler.is_exporting():  # a trace has no values
            return
        if module.fabric is None or module._trainer is not None:
            where = "without a Trainer or a Fabric" if module._trainer is None else "outside a run of its Trainer"
            rank_zero_warn(
                f"You are trying to `self.log({name!r}, ...)` {where}: the `self.trainer` reference is not registered,"
                " and the value is dropped. Log in a hook of a run, or after `fabric.setup(module)`."
            )
        elif LogOptions(*options).logger is not False:
            for key, scalar in flatten_metrics({name: value}):
                module.fabric.log(key, step_value(scalar, methodcaller("compute")) if is_metric(scalar) else scalar)


NOT_LOGGING: Final = _NotLogging()


class _Nowhere:
    """The sink for a batch that runs again: drops every value."""

    def log(self, *args: Any) -> None:
        pass


NOWHERE: Final = _Nowhere()


@contextmanager
def silenced(modules: Iterable[LightningModule]) -> Generator[None]:
    """While entered, drop what these modules log."""
    before = [(module, module.__dict__["_metrics"]) for module in modules]
    for module, _ in before:
        module.attach_metrics(NOWHERE)
    try:
        yield
    finally:
        for module, sink in before:
            module.attach_metrics(sink)
