"""What the strategies for several devices of XLA have in common."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout

from treadle_fabric.accelerators import Accelerator
from treadle_fabric.checkpoint import CheckpointIO
from treadle_fabric.checks import require_package
from treadle_fabric.environments import ClusterEnvironment
from treadle_fabric.precision import Precision
from treadle_fabric.strategies.on_xla.averaging import GradientAveraging
from treadle_fabric.strategies.on_xla.exchange import Exchange, OverDevices, find_exchange
from treadle_fabric.strategies.on_xla.process import begin_process
from treadle_fabric.strategies.parallel import DeviceExchange, ParallelStrategy

__all__ = ["SeveralXLAStrategy"]


class SeveralXLAStrategy(ParallelStrategy):
    """Several processes, each with one device of XLA.

    The processes meet in a gloo group of their hosts, which is for objects, votes, barriers and checkpoints. Tensors on
    devices go from device to device, where PJRT connects these.

    Args:
        name: What users write as ``strategy=``.
        accelerator: The hardware.
        parallel_devices: The devices of this machine, one a process.
        cluster_environment: Where ranks and addresses come from.
        checkpoint_io: Writes and reads files.
        precision: Default: ``32-true``.
        timeout: How long a collective of the hosts waits for the slowest process.
        start_method: How processes are started.
        precision_plugin: The precision, under the name that strategies of a trainer have for it.

    Raises:
        MissingPackageError: torch-xla is not installed.
    """

    only_on = "tpu"

    def __init__(
        self,
        name: str,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision: Precision | None = None,
        timeout: timedelta | None = default_pg_timeout,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
        precision_plugin: Precision | None = None,
    ) -> None:
        require_package("torch_xla", f"strategy={name!r}", "xla", "Its last release, 2.9, goes with torch 2.9.")
        super().__init__(
            accelerator,
            parallel_devices,
            cluster_environment,
            checkpoint_io,
            precision,
            "gloo",
            timeout,
            start_method,
            precision_plugin,
        )
        self._exchange: Exchange | None = None
        self._order: list[int] = []
        self._averaging = GradientAveraging(lambda: self.exchange)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_exchange": None, "_averaging": None}  # of this process

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _averaging=GradientAveraging(lambda: self.exchange))

    @property
    def exchange(self) -> Exchange | None:
        """How tensors on devices are exchanged; None before :meth:`setup_environment`."""
        return self._exchange

    @property
    def device_exchange(self) -> DeviceExchange | None:
        return self._exchange if isinstance(self._exchange, OverDevices) else None

    def prepare_process(self) -> None:
        begin_process(self.local_rank, self.num_processes)

    def process_is_ready(self) -> None:
        import torch_xla.runtime as xr  # an extra

        ordinals: list[Any] = [None] * self.world_size
        dist.all_gather_object(ordinals, xr.global_ordinal())
        ranks = [*range(self.world_size)]
        self._order = ordinals if sorted(ordinals) == ranks else ranks  # of devices that PJRT does not connect
        self._exchange = find_exchange(self.global_rank, self.world_size, self._order)
