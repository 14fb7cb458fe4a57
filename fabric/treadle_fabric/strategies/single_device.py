"""One process, one device."""

from __future__ import annotations

from typing import Any

import torch

from treadle_fabric.accelerators import Accelerator, with_index
from treadle_fabric.checkpoint import CheckpointIO
from treadle_fabric.precision import Precision
from treadle_fabric.strategies.one_device import OneDeviceStrategy

__all__ = ["SingleDeviceStrategy"]


class SingleDeviceStrategy(OneDeviceStrategy):
    """Runs everything on one device.

    Args:
        device: Which. ``"cpu"`` leaves the choice to Fabric or the Trainer.
        accelerator: The hardware.
        checkpoint_io: Writes and reads files.
        precision: Default: ``32-true``.
        precision_plugin: The same, under the name that strategies of a trainer have for it.
    """

    def __init__(
        self,
        device: torch.device | str | int = "cpu",
        accelerator: Accelerator | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision: Precision | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        where = with_index(torch.device(device))
        super().__init__(where, where.type != "cpu", accelerator, checkpoint_io, precision, precision_plugin)

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        strategy_registry.register("single_device", cls, description="One process, one device")
