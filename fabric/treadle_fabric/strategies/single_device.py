"""One process, one device."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from treadle_fabric.accelerators import Accelerator, with_index
from treadle_fabric.checkpoint import CheckpointIO
from treadle_fabric.environments import ClusterEnvironment
from treadle_fabric.launchers import Launcher
from treadle_fabric.precision import Precision
from treadle_fabric.strategies.native_step import NativeStepStrategy
from treadle_fabric.strategies.parts import Parts
from treadle_fabric.strategies.reduction import reduction_of
from treadle_fabric.strategies.states.whole_state import WholeStateStrategy

__all__ = ["OneDeviceStrategy", "SingleDeviceStrategy"]


class OneDeviceStrategy(WholeStateStrategy, NativeStepStrategy):
    """A strategy that runs everything in this process, on one device.

    Args:
        device: Which.
        chosen: Whether the user chose the device; else Fabric or the Trainer does.
        accelerator: The hardware.
        checkpoint_io: Writes and reads files.
        precision: Default: ``32-true``.
        precision_plugin: The same, under the name that strategies of a trainer have for it.
    """

    def __init__(
        self,
        device: torch.device,
        chosen: bool,
        accelerator: Accelerator | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision: Precision | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        super().__init__(accelerator, checkpoint_io, precision, precision_plugin)
        self._device, self._chosen = device, chosen
        self._environment: ClusterEnvironment | None = None

    @property
    def given(self) -> Parts:
        devices = (self._device,) if self._chosen else ()
        return Parts(self._accelerator, devices, self._precision, self._checkpoint_io, self._environment)

    def assign_devices(
        self, devices: list[torch.device], environment: ClusterEnvironment | None, num_nodes: int
    ) -> None:
        self._environment = environment
        if devices and not self._chosen:
            self._device = devices[0]

    def forget_devices(self) -> None:
        self._chosen, self._accelerator, self._environment = False, None, None

    @property
    def root_device(self) -> torch.device:
        return self._device

    @property
    def parallel_devices(self) -> list[torch.device]:
        return [self._device]

    @property
    def cluster_environment(self) -> ClusterEnvironment | None:
        return self._environment

    @property
    def num_nodes(self) -> int:
        return 1

    @property
    def start_method(self) -> str | None:
        return None

    @property
    def world_size(self) -> int:
        return 1

    @property
    def global_rank(self) -> int:
        return 0

    @property
    def local_rank(self) -> int:
        return 0

    @property
    def node_rank(self) -> int:
        return 0

    @property
    def launcher(self) -> Launcher | None:
        return None

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any] | None:
        return None

    def setup_environment(self) -> None:
        if self._accelerator is not None:
            self._accelerator.setup_device(self._device)

    def leave_environment(self) -> None:
        pass

    def setup_module(self, module: Module) -> Module:
        return module

    def module_to_device(self, module: Module) -> None:
        if self._device.type != "xla":
            module.to(self._device)
            return
        from treadle_fabric.strategies.on_xla.tensors import move_module  # for the few who use XLA

        move_module(module, self._device)

    def no_backward_sync(self, module: Module, enabled: bool = True) -> AbstractContextManager[Any]:
        return nullcontext()

    def all_reduce(self, tensor: Tensor, group: Any | None = None, reduce_op: Any = "mean") -> Tensor:
        return reduction_of(reduce_op, tensor.dtype).alone(tensor)

    def all_gather(self, tensor: Tensor, group: Any | None = None, sync_grads: bool = False) -> Tensor:
        return tensor

    def barrier(self, name: str | None = None) -> None:
        pass

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return obj

    def begin_vote(self, decision: bool) -> Callable[[], int]:
        return lambda: int(bool(decision))


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
