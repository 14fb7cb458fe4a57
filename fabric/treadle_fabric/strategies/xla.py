"""Data parallelism on several devices of XLA."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, Literal

import torch
from torch.distributed.constants import default_pg_timeout
from torch.nn import Module
from torch.optim import Optimizer

from treadle_fabric.accelerators import Accelerator
from treadle_fabric.checkpoint import CheckpointIO
from treadle_fabric.checkpoint.host.xla_io import on_host
from treadle_fabric.environments import ClusterEnvironment
from treadle_fabric.precision import Precision
from treadle_fabric.strategies.native_step import NativeStepStrategy
from treadle_fabric.strategies.on_xla.several import SeveralXLAStrategy
from treadle_fabric.strategies.on_xla.tensors import copy_from_rank_zero, move_module, run_recorded
from treadle_fabric.strategies.states.whole_state import WholeStateStrategy

__all__ = ["XLAStrategy"]


class XLAStrategy(SeveralXLAStrategy, WholeStateStrategy, NativeStepStrategy):
    """Every process has the whole model on its device of XLA; gradients are averaged at the end of each backward pass.

    Args:
        accelerator: The hardware.
        parallel_devices: The devices of this machine, one a process.
        checkpoint_io: Writes and reads files.
        precision: Default: ``32-true``.
        sync_module_states: Give every process the parameters and buffers that rank 0 has, when a module is set up.
            Default: True.
        cluster_environment: Where ranks and addresses come from.
        timeout: How long a collective of the hosts waits for the slowest process.
        start_method: ``"popen"``, ``"spawn"``, ``"fork"`` or ``"forkserver"``.
        precision_plugin: The precision, under the name that strategies of a trainer have for it.

    Raises:
        MissingPackageError: torch-xla is not installed.
    """

    def __init__(
        self,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision: Precision | None = None,
        sync_module_states: bool = True,
        cluster_environment: ClusterEnvironment | None = None,
        timeout: timedelta | None = default_pg_timeout,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
        precision_plugin: Precision | None = None,
    ) -> None:
        super().__init__(
            "xla",
            accelerator,
            parallel_devices,
            cluster_environment,
            checkpoint_io,
            precision,
            timeout,
            start_method,
            precision_plugin,
        )
        self._sync_module_states = sync_module_states

    def setup_module(self, module: Module) -> Module:
        if self.world_size > 1:
            if self._sync_module_states:
                copy_from_rank_zero(module, self.broadcast)
            self._averaging.watch(module)
        return module

    def module_to_device(self, module: Module) -> None:
        move_module(module, self.root_device)

    def no_backward_sync(self, module: Module, enabled: bool = True) -> AbstractContextManager[Any]:
        return self._averaging.paused(module) if enabled else nullcontext()

    def after_optimizer_step(self, optimizer: Optimizer) -> None:
        run_recorded()

    def as_stored(self, content: dict[str, Any]) -> dict[str, Any]:
        stored: dict[str, Any] = on_host(content)
        return stored

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        strategy_registry.register("xla", cls, description="Data parallelism on devices of XLA")
