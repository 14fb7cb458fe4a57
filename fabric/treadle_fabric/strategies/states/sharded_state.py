"""Strategies under which a rank has a part of the state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from treadle_fabric.checkpoint import fill, in_memory
from treadle_fabric.checkpoint.distributed.split import is_sharded_tensor, map_leaves
from treadle_fabric.strategies.states.checkpointing import CheckpointingStrategy
from treadle_fabric.strategies.states.elsewhere import brought_to_rank_zero, with_states_of_others, without_copies
from treadle_fabric.strategies.states.whole_state import complete_state, load_complete_state
from treadle_fabric.strategies.unwrapping import load_module_state, module_state, names_in, user_module

__all__ = ["ShardedStateStrategy", "gather_parts"]


class ShardedStateStrategy(CheckpointingStrategy):
    """A strategy under which parameters, gradients and optimizer state are DTensors, of which a rank has its part.

    A tensor on the meta device is one that another rank of :attr:`stage_groups` has.

    Where checkpoints are folders, a rank saves the parts that it has. Where they are single files, the tensors are
    gathered one after the other, and rank 0 keeps them on the host.
    """

    shards_parameters = True

    def get_module_state_dict(self, module: Module) -> dict[str, Any]:
        """The state of the user's module, in DTensors if checkpoints are folders; else whole on rank 0.

        On other ranks the tensors that are gathered are on the meta device.
        """
        self.release_gathered()
        return self.as_stored(without_copies(module_state(module), user_module(module)))

    def load_module_state_dict(self, module: Module, state_dict: dict[str, Any], strict: bool = True) -> None:
        self.release_gathered()
        own = user_module(module)
        state = dict(names_in(own, state_dict))
        targets = own.state_dict(keep_vars=True)
        if not strict or targets.keys() == state.keys():  # otherwise nothing is loaded
            for name, target in targets.items():
                source = state.get(name)
                elsewhere = isinstance(target, Tensor) and target.is_meta
                placed = elsewhere or is_sharded_tensor(target)
                if isinstance(source, Tensor) and placed and source.shape == target.shape:
                    if not elsewhere:
                        fill(target, source)
                    state[name] = target.detach()
        load_module_state(module, state, strict=strict)

    def get_optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return self.as_stored(with_states_of_others(complete_state(optimizer), optimizer, self.stage_groups))

    def load_optimizer_state(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        names = [key for group in state["param_groups"] for key in group["params"]]
        if len(parameters) == len(names):
            by_key = dict(zip(names, parameters, strict=True))
            here = {key: found for key, found in state["state"].items() if not _is_elsewhere(by_key.get(key))}
            entries = {key: self._placed(by_key.get(key), found) for key, found in here.items()}
            state = {**state, "param_groups": in_memory(state["param_groups"]), "state": entries}
        load_complete_state(optimizer, state)

    def as_stored(self, content: dict[str, Any]) -> dict[str, Any]:
        if self.checkpoint_io.sharded:
            return content
        return gather_parts(content, self.stage_groups)

    def _placed(self, parameter: Any, entry: Any) -> Any:
        """The state of one parameter, each tensor in it placed as the parameter is."""
        if not is_sharded_tensor(parameter) or not isinstance(entry, dict):
            return in_memory(entry)
        return {name: _placed_like(parameter, name, value) for name, value in entry.items()}


def gather_parts(content: dict[str, Any], groups: tuple[Any, ...]) -> dict[str, Any]:
    """Gather DTensors, one after the other: whole on rank 0's host, and on the meta device elsewhere.

    Args:
        content: Of a checkpoint; every rank calls this.
        groups: The strategy's ``stage_groups``.
    """
    gathered: dict[int, Any] = {}  # tied parameters are one tensor

    def gather(value: Any, name: str) -> Any:
        if not is_sharded_tensor(value):
            return value
        if id(value) not in gathered:
            whole, first = value.full_tensor().detach(), not any(value.device_mesh.get_coordinate() or (1,))
            gathered[id(value)] = whole.cpu() if first else whole.to("meta")
        return gathered[id(value)]

    return brought_to_rank_zero(map_leaves(content, gather, ""), groups)


def _is_elsewhere(parameter: Any) -> bool:
    return isinstance(parameter, Tensor) and parameter.is_meta


def _placed_like(parameter: Any, name: str, value: Any) -> Any:
    if not isinstance(value, Tensor) or value.ndim == 0 or name == "step":
        return in_memory(value)
    from torch.distributed.tensor import DTensor, Replicate  # heavy

    assert isinstance(parameter, DTensor)
    if value.shape == parameter.shape:
        target: Any = torch.zeros_like(parameter, dtype=value.dtype, requires_grad=False)
    else:  # factors of a matrix, say
        mesh = parameter.device_mesh
        local = torch.zeros(value.shape, dtype=value.dtype, device=parameter.to_local().device)
        target = DTensor.from_local(local, mesh, [Replicate()] * mesh.ndim, run_check=False)
    fill(target, value)
    return target
