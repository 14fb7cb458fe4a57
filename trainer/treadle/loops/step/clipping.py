"""Gradient clipping, as the arguments of the Trainer or the hooks of the module say."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

from treadle.module import LightningModule
from treadle.module.overriding import by_name, overrides
from treadle.run.run import ReadyRun
from treadle_fabric import MisconfigurationException, rank_zero_warn

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["Clipping", "GradClipAlgorithmType"]


class GradClipAlgorithmType(StrEnum):
    """What ``gradient_clip_val`` limits: each entry of the gradients, or their norm."""

    VALUE = "value"
    NORM = "norm"

    @staticmethod
    def supported_type(val: str) -> bool:
        """Return whether there is an algorithm of this name."""
        return val in tuple(GradClipAlgorithmType)

    @staticmethod
    def supported_types() -> list[str]:
        """Return the names of all."""
        return [each.value for each in GradClipAlgorithmType]


class Clipping:
    """Clips gradients by the module's ``configure_gradient_clipping`` or ``clip_gradients`` hook, or by itself.

    Args:
        run: the run.
        value: the largest norm, or the largest entry; None or 0 for no clipping.
        algorithm: "norm" or "value". Default: "norm".
    """

    def __init__(self, run: ReadyRun, value: float | None, algorithm: str | None) -> None:
        module = run.module
        self._strategy, self._engine = run.fabric.strategy, run.engine
        self._value, self._algorithm = value, algorithm
        self._dispatch = run.dispatch
        self._hook, self._clip = (
            by_name(getattr(module, name), 1, "gradient_clip_val", "gradient_clip_algorithm")
            if overrides(module, name, LightningModule)
            else None
            for name in ("configure_gradient_clipping", "clip_gradients")
        )
        self.active = bool(value) or self._hook is not None or self._clip is not None

    @property
    def hooked(self) -> bool:
        """Whether the module's own ``configure_gradient_clipping`` does it."""
        return self._hook is not None

    def tell_unused(self) -> None:
        """Warn of hooks of the module that are not called, because the strategy's engine clips."""
        names = ("configure_gradient_clipping", self._hook), ("clip_gradients", self._clip)
        own = [name for name, hook in names if hook is not None]
        if own and self._strategy.handles_gradient_clipping:
            rank_zero_warn(
                f"`{own[0]}` is overridden, and is not called: the engine of {type(self._strategy).__name__} has the"
                " gradients, and clips them by gradient_clip_val of the Trainer."
            )

    def __call__(self, optimizer: Optimizer) -> None:
        if self._hook is not None:
            self._dispatch.run("configure_gradient_clipping", self._hook, optimizer, self._value, self._algorithm)
        elif self._clip is not None:
            self._dispatch.run("clip_gradients", self._clip, optimizer, self._value, self._algorithm)
        else:
            self.clip(optimizer, self._value, self._algorithm)

    def clip(self, optimizer: Optimizer, value: float | None = None, algorithm: str | None = None) -> None:
        """Clip the gradients of ``optimizer``; a value must agree with the Trainer's, if that has one."""
        if value is None:
            value = self._value
        elif self._value is not None and self._value != value:
            raise MisconfigurationException(
                f"clip_gradients got gradient_clip_val={value}, the Trainer has {self._value}: give it in one place."
            )
        algorithm = algorithm or self._algorithm or "norm"
        if algorithm not in tuple(GradClipAlgorithmType):
            raise MisconfigurationException(f"gradient_clip_algorithm={algorithm!r} must be 'norm' or 'value'.")
        if not value:
            return
        raw = getattr(optimizer, "optimizer", optimizer)
        if algorithm == "value":
            self._strategy.clip_gradients_value(self._engine, raw, value)
        else:
            self._strategy.clip_gradients_norm(self._engine, raw, value, error_if_nonfinite=False)
