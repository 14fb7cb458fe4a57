"""Where ``self.log`` sends a value: the metric bus of a run, or nowhere."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from numbers import Number
from operator import methodcaller
from typing import TYPE_CHECKING, Any, Final, Protocol

import torch
from torch import Tensor

from treadle_fabric import Fabric, MisconfigurationException, rank_zero_warn

if TYPE_CHECKING:
    from treadle.contracts import LightningModule
from treadle.metrics.options import GivenOptions, LogOptions
from treadle.metrics.values import flatten_metrics, is_metric, step_value

__all__ = ["NOT_LOGGING", "NOWHERE", "MetricSink", "log_in_fabric", "silenced"]


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
        else:
            log_in_fabric(module.fabric, {name: value}, options)


NOT_LOGGING: Final = _NotLogging()


def log_in_fabric(fabric: Fabric, dictionary: Any, options: GivenOptions) -> None:
    """Send what a module logs in a hand-written loop to Fabric's loggers, in one call.

    Args:
        fabric: The Fabric that the module was set up with.
        dictionary: Values by name, or a torchmetrics collection.
        options: Those of ``self.log``.

    Raises:
        MisconfigurationException: A value is no number.
    """
    if LogOptions(*options).logger is False:
        return
    found = {}
    for name, value in flatten_metrics(dictionary):
        found[name] = step_value(value, methodcaller("compute")) if is_metric(value) else value
        if not isinstance(found[name], (Number, Tensor, Mapping)):
            raise MisconfigurationException(
                f"`self.log({name!r}, ...)` got a {type(value).__name__}; it logs numbers, tensors of one element,"
                " torchmetrics objects, and dictionaries of these."
            )
    fabric.log_dict(found)


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
