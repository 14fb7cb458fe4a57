"""What a module has of a trainer in a loop that is written by hand, with Fabric."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from torch.optim import Optimizer

from treadle_fabric import Fabric, FabricOptimizer, MisconfigurationException
from treadle_fabric.loggers import Logger
from treadle_fabric.strategies import Strategy

if TYPE_CHECKING:
    from treadle.contracts import LightningModule

__all__ = ["TrainerInFabric"]

_KNOWN: Final = "device, global_rank, is_global_zero, local_rank, logger, loggers, node_rank, strategy and world_size"


class TrainerInFabric:
    """What ``self.trainer`` is in a Fabric loop: the part of a Trainer that Fabric knows too.

    Everything else that a Trainer has belongs to its loop, which there is none of here: an AttributeError says so.

    Args:
        module: The module.
        fabric: The Fabric that the module was set up with.
    """

    def __init__(self, module: LightningModule, fabric: Fabric) -> None:
        self._module = module
        self._fabric = fabric

    @property
    def strategy(self) -> Strategy:
        """Fabric's strategy."""
        return self._fabric.strategy

    @property
    def device(self) -> torch.device:
        """This process's device."""
        return self._fabric.device

    @property
    def global_rank(self) -> int:
        """This process's rank among all processes."""
        return self._fabric.global_rank

    @property
    def local_rank(self) -> int:
        """This process's rank on its machine."""
        return self._fabric.local_rank

    @property
    def node_rank(self) -> int:
        """This machine's rank among all machines."""
        return self._fabric.node_rank

    @property
    def world_size(self) -> int:
        """The number of processes."""
        return self._fabric.world_size

    @property
    def is_global_zero(self) -> bool:
        """Whether this is the process of rank 0."""
        return self._fabric.is_global_zero

    @property
    def loggers(self) -> list[Logger]:
        """Fabric's loggers."""
        return list(self._fabric.loggers)

    @property
    def logger(self) -> Logger | None:
        """The first of Fabric's loggers, or None."""
        return next(iter(self._fabric.loggers), None)

    @property
    def wrapped_optimizers(self) -> list[FabricOptimizer]:
        """The optimizers that ``Fabric.setup`` got with the module, as it returned them."""
        return self._module._fabric_optimizers

    @property
    def optimizers(self) -> list[Optimizer]:
        """The same as plain optimizers of torch."""
        return [each.optimizer for each in self.wrapped_optimizers]

    @property
    def lr_scheduler_configs(self) -> list[Any]:
        """Empty: a Fabric loop has its schedulers itself."""
        return []

    def clip_gradients(self, optimizer: Optimizer, value: float | None = None, algorithm: str | None = None) -> None:
        """Clip gradients; modules call it as ``self.clip_gradients``. Without a value nothing happens.

        Raises:
            MisconfigurationException: The algorithm is neither "norm" nor "value".
        """
        known = {None: "max_norm", "norm": "max_norm", "value": "clip_val"}
        if algorithm not in known:
            raise MisconfigurationException(f"gradient_clip_algorithm={algorithm!r} is unknown. There is: norm, value.")
        if value is not None:
            limits: Any = {known[algorithm]: value}
            self._fabric.clip_gradients(self._module, optimizer, **limits)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"`self.trainer.{name}` is not there in a Fabric loop, which has no Trainer. There are {_KNOWN}. "
            "Keep what the loop needs, such as the epoch, in the loop itself, or run the module with a Trainer."
        )
