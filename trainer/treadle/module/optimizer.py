"""The optimizer that a module gets from ``self.optimizers()``."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from treadle_fabric import FabricOptimizer, MisconfigurationException, SingleDeviceStrategy, Strategy

if TYPE_CHECKING:
    from treadle.contracts import LightningModule

__all__ = ["LightningOptimizer", "toggle", "untoggle"]

Toggling = Callable[[Optimizer, bool], AbstractContextManager[Any]]


class LightningOptimizer(FabricOptimizer):
    """An optimizer whose ``step`` goes through strategy and precision, and which a module steps itself.

    Args:
        optimizer: The user's optimizer.
        strategy: The strategy. Default: that of one device.
        before_step: Called with the user's optimizer before each step.
        after_step: The same after it.
        toggled: A context in which only the parameters of the optimizer require gradients, for :meth:`toggle_model`.
    """

    _prefix = "Lightning"

    def __init__(
        self,
        optimizer: Optimizer,
        strategy: Strategy | None = None,
        before_step: Callable[[Optimizer], None] | None = None,
        after_step: Callable[[Optimizer], None] | None = None,
        toggled: Toggling | None = None,
    ) -> None:
        self.__dict__["_toggled"] = toggled
        super().__init__(optimizer, strategy or SingleDeviceStrategy(), before_step, after_step)

    @contextmanager
    def toggle_model(self, sync_grad: bool = True) -> Generator[None]:
        """Let only the parameters of this optimizer require gradients, for the length of a with block.

        Args:
            sync_grad: Whether gradients are exchanged between the ranks in the backward pass; False for a batch whose
                gradients are only accumulated.

        Raises:
            MisconfigurationException: The optimizer is not one of a running fit.
        """
        if self._toggled is None:
            raise MisconfigurationException(
                "toggle_model() is for an optimizer of a running fit: use what `self.optimizers()` returns."
            )
        with self._toggled(self, sync_grad):
            yield


def toggle(module: LightningModule, optimizer: Optimizer) -> None:
    """Let only the parameters of an optimizer require gradients, of those that the module's optimizers have."""
    mine = {p for group in optimizer.param_groups for p in group["params"]}
    known = [group for each in module.trainer.optimizers for group in each.param_groups]
    others = {p for group in known for p in group["params"] if p not in mine}
    module._toggled[_identity(optimizer)] = [(p, p.requires_grad) for p in others]
    for p in others:
        p.requires_grad_(False)
    module.trainer.strategy.after_trainable_change()


def untoggle(module: LightningModule, optimizer: Optimizer) -> None:
    """Put back what :func:`toggle` changed."""
    for p, required in module._toggled.pop(_identity(optimizer), []):
        p.requires_grad_(required)
    module.trainer.strategy.after_trainable_change()


def _identity(optimizer: Optimizer) -> int:
    return id(getattr(optimizer, "optimizer", optimizer))
