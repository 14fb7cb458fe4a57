"""What a module has of a trainer in a loop that is written by hand, with Fabric."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

from treadle_fabric import Fabric, MisconfigurationException
from treadle_fabric.loggers import Logger
from treadle_fabric.strategies import Strategy

if TYPE_CHECKING:
    from treadle.contracts import LightningModule

__all__ = ["TrainerInFabric", "clip_in_fabric", "steps_in_fabric"]

_KNOWN: Final = "device, global_rank, is_global_zero, local_rank, logger, loggers, node_rank, strategy and world_size"


class TrainerInFabric:
    """What ``self.trainer`` is in a Fabric loop: the part of a Trainer that Fabric knows too.

    Everything else that a Trainer has belongs to its loop, which there is none of here: an AttributeError says so.

    Args:
        fabric: The Fabric that the module was set up with.
    """

    def __init__(self, fabric: Fabric) -> None:
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

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"`self.trainer.{name}` is not there in a Fabric loop, which has no Trainer. There are {_KNOWN}. "
            "Keep what the loop needs, such as the epoch, in the loop itself, or run the module with a Trainer."
        )


def steps_in_fabric(module: LightningModule, wrapped: bool) -> Any:
    """The optimizers that ``Fabric.setup`` got with a module: one, or a list.

    Args:
        module: The module.
        wrapped: Return what ``setup`` returned, and not the plain optimizers of torch.
    """
    steps = module._fabric_optimizers
    found = [each if wrapped else each.optimizer for each in steps]
    return found[0] if len(found) == 1 else found


def clip_in_fabric(module: LightningModule, optimizer: Any, value: float | None, algorithm: str | None) -> None:
    """Clip gradients in a Fabric loop, as ``LightningModule.clip_gradients`` does under a Trainer.

    Args:
        module: The module.
        optimizer: The optimizer whose parameters' gradients are clipped.
        value: The largest norm or absolute value; None: nothing happens, as under a Trainer without one.
        algorithm: "norm" or "value". Default: "norm".

    Raises:
        MisconfigurationException: There is no such algorithm.
    """
    known = {None: "max_norm", "norm": "max_norm", "value": "clip_val"}
    if algorithm not in known:
        raise MisconfigurationException(f"gradient_clip_algorithm={algorithm!r} is unknown. There is: norm, value.")
    if value is not None:
        fabric: Any = module.fabric
        fabric.clip_gradients(module, optimizer, **{known[algorithm]: value})
