"""Sharding on several devices of XLA, by torch-xla's FSDP."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.constants import default_pg_timeout
from torch.nn import Module
from torch.optim import Optimizer

from treadle_fabric.accelerators import Accelerator
from treadle_fabric.checkpoint import CheckpointIO, in_memory
from treadle_fabric.checkpoint.host.xla_io import on_host
from treadle_fabric.environments import ClusterEnvironment
from treadle_fabric.errors import MisconfigurationException
from treadle_fabric.precision import Precision
from treadle_fabric.strategies.native_step import NativeStepStrategy
from treadle_fabric.strategies.on_xla.parts import with_whole_states
from treadle_fabric.strategies.on_xla.several import SeveralXLAStrategy
from treadle_fabric.strategies.on_xla.sharded import (
    XLAShardedEngine,
    check_arguments,
    clip_parts,
    engine_around,
    register_wrappers,
    shard,
)
from treadle_fabric.strategies.on_xla.stored import as_part, from_part
from treadle_fabric.strategies.on_xla.tensors import copy_from_rank_zero, run_recorded
from treadle_fabric.strategies.parts import is_part
from treadle_fabric.strategies.states.checkpointing import CheckpointingStrategy
from treadle_fabric.strategies.states.sharded_state import gather_parts
from treadle_fabric.strategies.states.whole_state import complete_state, load_complete_state
from treadle_fabric.strategies.unwrapping import load_module_state, module_state

__all__ = ["XLAFSDPStrategy"]


class XLAFSDPStrategy(SeveralXLAStrategy, CheckpointingStrategy, NativeStepStrategy):
    """Every process has a part of parameters, gradients and optimizer state, on its device of XLA.

    Gradients are reduced after each micro-batch of an accumulation, because a process has no room for whole ones.

    Args:
        accelerator: The hardware.
        parallel_devices: The devices of this machine, one a process.
        checkpoint_io: Writes and reads checkpoints.
        precision: Default: ``32-true``. XLA's FSDP keeps parameters in float32: see ``compute_dtype``.
        auto_wrap_policy: Which submodules are gathered by themselves: a set of classes, or one of the policies in
            ``torch_xla.distributed.fsdp.wrap``. Default: the module as a whole.
        activation_checkpointing_policy: Of which submodules activations are computed again in the backward pass: a set
            of classes, or a function of a module, a flag and a number. Default: of none.
        state_dict_type: ``"sharded"`` (default): checkpoints are folders, to which every process writes its part.
            ``"full"``: single files.
        sequential_save: Bring the parts of a checkpoint to the host one process after the other, which needs less of
            a machine's memory at a time and takes longer. Default: False.
        cluster_environment: Where ranks and addresses come from.
        timeout: How long a collective of the hosts waits for the slowest process.
        start_method: ``"popen"``, ``"spawn"``, ``"fork"`` or ``"forkserver"``.
        precision_plugin: The precision, under the name that strategies of a trainer have for it.
        **kwargs: For ``XlaFullyShardedDataParallel``, such as ``reshard_after_forward`` and ``compute_dtype``.

    Raises:
        MissingPackageError: torch-xla is not installed.
        MisconfigurationException: An argument is unknown, or Treadle needs another value of it.
    """

    requires_forward_redirect = True
    fixes_parameters = True
    restores_after_setup = True
    shards_parameters = True
    forward_is_collective = True
    allows_inference_mode = False

    def __init__(
        self,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision: Precision | None = None,
        auto_wrap_policy: Collection[type[Module]] | Callable[..., bool] | None = None,
        activation_checkpointing_policy: Collection[type[Module]] | Callable[..., bool] | None = None,
        state_dict_type: Literal["full", "sharded"] = "sharded",
        sequential_save: bool = False,
        cluster_environment: ClusterEnvironment | None = None,
        timeout: timedelta | None = default_pg_timeout,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
        precision_plugin: Precision | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            "xla_fsdp",
            accelerator,
            parallel_devices,
            cluster_environment,
            checkpoint_io,
            precision,
            timeout,
            start_method,
            precision_plugin,
        )
        if state_dict_type not in ("full", "sharded"):
            raise MisconfigurationException(
                f"XLAFSDPStrategy(state_dict_type={state_dict_type!r}): must be 'full' or 'sharded'."
            )
        check_arguments(kwargs)
        self._wrap, self._recompute = auto_wrap_policy, activation_checkpointing_policy
        self._state_dict_type, self._sequential_save = state_dict_type, sequential_save
        self._arguments = kwargs
        self._mesh: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_mesh": None}

    @property
    def writes_folders(self) -> bool:
        return self._state_dict_type == "sharded"

    @property
    def _hosts(self) -> Any:
        """The mesh of the processes' hosts."""
        if self._mesh is None:
            from torch.distributed.device_mesh import init_device_mesh  # heavy

            self._mesh = init_device_mesh("cpu", (self.world_size,))
        return self._mesh

    def setup_module(self, module: Module) -> Module:
        if isinstance(module, XLAShardedEngine):
            return module
        exchange = self.exchange
        if exchange is None:
            raise MisconfigurationException("XLAFSDPStrategy shards a module after the launch: call fabric.launch().")
        engine = engine_around(module)
        if engine is None:
            register_wrappers()
            if self.world_size > 1:
                copy_from_rank_zero(module, self.broadcast)
            engine = shard(module, exchange, self._order, self._wrap, self._recompute, self._arguments)
            with_whole_states(engine.module, self._hosts)
        self._averaging.watch(engine, lambda parameter: not is_part(parameter))
        return engine

    def module_to_device(self, module: Module) -> None:
        """Do nothing: each part of a module goes to the device by itself when it is sharded."""

    def module_sharded_context(self) -> AbstractContextManager[Any]:
        """Return a context that does nothing: modules are sharded when they are set up."""
        return nullcontext()

    def no_backward_sync(self, module: Module, enabled: bool = True) -> AbstractContextManager[Any]:
        """Return a context that does nothing: a process has no room for whole gradients."""
        return nullcontext()

    def join_forward(self, module: Module, method: str = "forward") -> None:
        if isinstance(module, XLAShardedEngine):
            with torch.no_grad():
                module.join_forward()

    def finish_forward(self, module: Module, method: str) -> None:
        if isinstance(module, XLAShardedEngine):
            with torch.no_grad():
                module.finish_forward()

    def clip_parts(
        self, parameters: Sequence[Tensor], max_norm: float, norm_type: float, strict: bool
    ) -> Tensor | None:
        assert self.exchange is not None
        return clip_parts(parameters, max_norm, norm_type, strict, self.exchange)

    def after_optimizer_step(self, optimizer: Optimizer) -> None:
        run_recorded()

    # State

    def get_module_state_dict(self, module: Module) -> dict[str, Any]:
        """The state of the user's module, in DTensors on the host if checkpoints are folders; else whole on rank 0."""
        return self.as_stored(module_state(module))

    def load_module_state_dict(self, module: Module, state_dict: dict[str, Any], strict: bool = True) -> None:
        load_module_state(module, state_dict, strict=strict)

    def get_optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        state = complete_state(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        entries = {
            key: {n: as_part(parameters[key], v) if isinstance(v, Tensor) else v for n, v in entry.items()}
            for key, entry in state["state"].items()
        }
        return self.as_stored({**state, "state": entries})

    def load_optimizer_state(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        keys = [key for group in state["param_groups"] for key in group["params"]]
        entries = state["state"]
        if len(parameters) == len(keys):
            by_key = dict(zip(keys, parameters, strict=True))
            entries = {
                key: {n: self._placed(by_key[key], n, v) for n, v in entry.items()} for key, entry in entries.items()
            }
        load_complete_state(optimizer, {"param_groups": in_memory(state["param_groups"]), "state": entries})

    def _placed(self, parameter: Tensor, name: str, value: Any) -> Any:
        if isinstance(value, Tensor) and name != "step" and value.ndim:
            found = from_part(parameter, value)
            return in_memory(found) if found is value else found
        return in_memory(value)

    def as_stored(self, content: dict[str, Any]) -> dict[str, Any]:
        stored = content
        for turn in range(self.world_size if self._sequential_save else 1):
            if not self._sequential_save or turn == self.global_rank:
                stored = on_host(content)
            if self._sequential_save:
                self.barrier("the part of a checkpoint")
        return stored if self.checkpoint_io.sharded else gather_parts(stored, ())

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        strategy_registry.register("xla_fsdp", cls, description="Fully sharded data parallelism on devices of XLA")
