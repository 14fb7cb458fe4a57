"""One process, one device of XLA."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

from treadle_fabric.accelerators import Accelerator, with_index
from treadle_fabric.checkpoint import CheckpointIO
from treadle_fabric.checkpoint.host.xla_io import on_host
from treadle_fabric.checks import require_package
from treadle_fabric.precision import Precision
from treadle_fabric.strategies.on_xla.tensors import run_recorded
from treadle_fabric.strategies.single_device import OneDeviceStrategy

__all__ = ["SingleDeviceXLAStrategy"]


class SingleDeviceXLAStrategy(OneDeviceStrategy):
    """Runs everything on one device of XLA: what is recorded runs after each optimizer step, and before each batch.

    Args:
        device: Which, such as ``"xla:1"``. Default: Fabric or the Trainer chooses.
        accelerator: The hardware.
        checkpoint_io: Writes and reads files.
        precision: Default: ``32-true``.
        precision_plugin: The same, under the name that strategies of a trainer have for it.

    Raises:
        MissingPackageError: torch-xla is not installed.
    """

    only_on = "tpu"

    def __init__(
        self,
        device: torch.device | str | int | None = None,
        accelerator: Accelerator | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision: Precision | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        require_package("torch_xla", "strategy='single_xla'", "xla", "Its last release, 2.9, goes with torch 2.9.")
        where = torch.device("xla", device) if isinstance(device, int) else torch.device(device or "xla")
        chosen = device is not None
        super().__init__(with_index(where), chosen, accelerator, checkpoint_io, precision, precision_plugin)

    def after_optimizer_step(self, optimizer: Optimizer) -> None:
        run_recorded()

    def as_stored(self, content: dict[str, Any]) -> dict[str, Any]:
        stored: dict[str, Any] = on_host(content)
        return stored

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        strategy_registry.register("single_xla", cls, description="One process, one device of XLA")
