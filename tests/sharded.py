"""A strategy that shards by torch's ``fully_shard``, for tests of what is above strategies."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import Linear, Module

from treadle_fabric.checkpoint import placed_like
from treadle_fabric.strategies.native_step import NativeStepStrategy
from treadle_fabric.strategies.parallel import ParallelStrategy
from treadle_fabric.strategies.states.whole_state import WholeStateStrategy
from treadle_fabric.strategies.strategy import METHOD_KEYWORD
from treadle_fabric.strategies.unwrapping import inside, user_module

_engines: WeakKeyDictionary[Module, ShardedEngine] = WeakKeyDictionary()


class ShardedEngine(Module):
    """Runs methods of a module as its own forward; notes in which order parts are gathered."""

    def __init__(self, module: Module, mesh: Any) -> None:
        super().__init__()
        self.module = module
        for part in module.modules():
            if isinstance(part, Linear):
                fully_shard(part, mesh=mesh, reshard_after_forward=True)
        fully_shard(self, mesh=mesh, reshard_after_forward=True)
        self.passes = {"joined": 0, "run": 0}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.passes["run"] += 1
        return kwargs.pop(METHOD_KEYWORD, self.module)(*args, **kwargs)

    def gather(self) -> None:
        """The collectives of a forward pass, in the order in which every test's module runs its parts."""
        self.passes["joined"] += 1
        for part in (self, *(m for m in self.module.modules() if isinstance(m, FSDPModule))):
            part.unshard()  # type: ignore[operator]
        for part in (self, *(m for m in self.module.modules() if isinstance(m, FSDPModule))):
            part.reshard()  # type: ignore[operator]


@inside.register
def _(engine: ShardedEngine) -> Module:
    return engine.module


class FullySharded(ParallelStrategy, WholeStateStrategy, NativeStepStrategy):
    """Each rank has a part of every parameter.

    Args:
        replicas: Ranks that work on one share of a batch, as those of a tensor group.
    """

    shards_parameters = True
    forward_is_collective = True
    requires_forward_redirect = True
    restores_after_setup = True

    def __init__(self, together: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.together = together

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any] | None:
        return {"num_replicas": self.world_size // self.together, "rank": self.global_rank // self.together}

    def setup_module(self, module: Module) -> Module:
        engine = _engines.get(module)  # a module is sharded once, and may be set up for each run of a trainer
        if engine is None:
            engine = _engines[module] = ShardedEngine(module, init_device_mesh("cpu", (self.world_size,)))
        return engine

    def module_to_device(self, module: Module) -> None:
        pass

    def no_backward_sync(self, module: Module, enabled: bool = True) -> nullcontext[None]:
        return nullcontext()

    def join_forward(self, module: Module, method: str = "forward") -> None:
        assert isinstance(module, ShardedEngine)
        module.gather()

    def load_module_state_dict(self, module: Module, state_dict: dict[str, Any], strict: bool = True) -> None:
        own = user_module(module)
        with torch.no_grad():
            for name, target in own.state_dict(keep_vars=True).items():
                target.copy_(placed_like(state_dict[name], target))

    def load_optimizer_state(self, optimizer: Any, state: dict[str, Any]) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        saved = state["state"]
        for i, values in saved.items():
            for name, value in values.items():
                if isinstance(value, Tensor) and value.dim() and isinstance(parameters[i], DTensor):
                    values[name] = placed_like(value, parameters[i])
        optimizer.load_state_dict(state)


def whole(tensor: Any) -> Tensor:
    """A tensor of which ranks have parts; every rank calls this."""
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
