"""Fully sharded data parallelism: every process has a part of the model and a share of the batch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any, Literal

import torch
from torch.distributed.constants import default_pg_timeout
from torch.nn import Module

from treadle_fabric.accelerators import Accelerator
from treadle_fabric.checkpoint import CheckpointIO
from treadle_fabric.environments import ClusterEnvironment
from treadle_fabric.precision import Precision
from treadle_fabric.strategies.parallelism.explain import explain_not_gathered
from treadle_fabric.strategies.sharding.arguments import parse_arguments
from treadle_fabric.strategies.sharding.broadcast import take_over_from_rank_zero
from treadle_fabric.strategies.sharding.engine import ShardedEngine
from treadle_fabric.strategies.sharding.mesh import check_mesh_size, make_mesh
from treadle_fabric.strategies.sharding.shard import shard_module
from treadle_fabric.strategies.sharding.sharding import ShardingStrategy

__all__ = ["FSDPStrategy"]


class FSDPStrategy(ShardingStrategy):
    """Parameters, gradients and optimizer state are shared out over the processes, with torch's ``fully_shard``.

    Before a sharded submodule runs, the processes gather its parameters; afterwards each keeps its own part. Gradients
    are averaged, and each process gets those of its part.

    Args:
        accelerator: The hardware.
        parallel_devices: The devices of this machine, one a process.
        cluster_environment: Where ranks and addresses come from.
        checkpoint_io: Writes and reads checkpoints.
        precision: Default: ``32-true``.
        process_group_backend: Default: torch's for the device, ``"nccl"`` on CUDA and ``"gloo"`` on the CPU.
        timeout: How long a collective waits for the slowest process.
        cpu_offload: Keep parameters, gradients and optimizer state on the host. Default: False.
        mixed_precision: torch's ``MixedPrecisionPolicy``. Default: what ``precision`` asks for.
        auto_wrap_policy: As ``policy``.
        activation_checkpointing: Classes of layers whose activations are computed again in the backward pass; True:
            the repeated layers of the module.
        activation_checkpointing_policy: The same as a set of classes, or a function of a module.
        sharding_strategy: ``"FULL_SHARD"``; ``"SHARD_GRAD_OP"``, where parameters stay gathered until the backward
            pass; or ``"HYBRID_SHARD"``, where groups of processes have a copy of the model each.
        state_dict_type: ``"sharded"``: checkpoints are folders to which each process writes its part; ``"full"``: rank
            0 writes a single file.
        device_mesh: The shape of a hybrid mesh, (copies of the model, processes that share one), or a DeviceMesh.
            Default: one copy a machine.
        policy: Which submodules are gathered at a time: a set of classes, or a function of a module that returns
            whether. Default: the repeated layers of the module.
        reshard_after_forward: Whether gathered parameters are freed after the forward pass. Default: True.
        precision_plugin: The precision, under the name that strategies of a trainer have for it.
        start_method: How processes are started: ``"popen"``, ``"spawn"``, ``"fork"`` or ``"forkserver"``.
        **kwargs: ``ignored_parameters``: parameters, or modules with them, that stay whole on every process, which
            averages their gradients with nobody. ``activation_checkpointing_saves``: operators of torch, such as
            ``torch.ops.aten.mm.default``, whose results are kept for the backward pass all the same.
    """

    forward_is_collective = True

    def __init__(
        self,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision: Precision | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
        cpu_offload: Any = None,
        mixed_precision: Any = None,
        auto_wrap_policy: Any = None,
        activation_checkpointing: type[Module] | Sequence[type[Module]] | bool | None = None,
        activation_checkpointing_policy: Collection[type[Module]] | Callable[..., bool] | None = None,
        sharding_strategy: Any = "FULL_SHARD",
        state_dict_type: Literal["full", "sharded"] = "sharded",
        device_mesh: Any = None,
        *,
        policy: Any = None,
        reshard_after_forward: bool | None = None,
        precision_plugin: Precision | None = None,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            accelerator,
            parallel_devices,
            cluster_environment,
            checkpoint_io,
            precision,
            process_group_backend,
            timeout,
            start_method,
            precision_plugin,
        )
        self._options = parse_arguments(
            cpu_offload=cpu_offload,
            mixed_precision=mixed_precision,
            auto_wrap_policy=auto_wrap_policy,
            activation_checkpointing=activation_checkpointing,
            activation_checkpointing_policy=activation_checkpointing_policy,
            sharding_strategy=sharding_strategy,
            state_dict_type=state_dict_type,
            device_mesh=device_mesh,
            policy=policy,
            reshard_after_forward=reshard_after_forward,
            **kwargs,
        )

    def move_references(self, copy_of: Callable[[Any], Any]) -> None:
        self._options = replace(self._options, ignored=tuple(copy_of(each) for each in self._options.ignored))

    @property
    def offloads(self) -> bool:  # type: ignore[override]
        return self._options.offload

    @property
    def writes_folders(self) -> bool:
        return self._options.state_dict_type == "sharded"

    def _sizes(self, processes: int, num_nodes: int) -> dict[str, int]:
        given, hybrid = self._options.mesh, self._options.hybrid
        names = ("data_replicate", "data_shard") if hybrid else ("data_shard",)
        shape: tuple[int, ...] = (num_nodes, processes // num_nodes) if hybrid else (processes,)
        if given is not None:
            shape = given if isinstance(given, tuple) else tuple(given.mesh.shape)
        sizes = dict(zip(names, shape, strict=True))
        one = "(copies of the model, processes that share one)" if hybrid else "(all processes,)"
        check_mesh_size(sizes, processes, f"Give device_mesh={one}, or leave device_mesh out.")
        return sizes

    def check_processes(self, number: int) -> None:
        self._sizes(number, self.num_nodes)

    def make_device_mesh(self) -> Any:
        given, sizes = self._options.mesh, self._sizes(self.world_size, self.num_nodes)
        return make_mesh(self.root_device.type, sizes) if isinstance(given, tuple | None) else given

    def parallelize(self, module: Module) -> ShardedEngine:
        take_over_from_rank_zero(module, self.root_device)
        return shard_module(module, self.device_mesh, self._options, self.precision, self.root_device, self.broadcast)

    def explain_error(self, engine: Module | None, error: RuntimeError) -> Exception | None:
        return explain_not_gathered(error, engine or next(iter(self._alive()), None))
