"""States in which a tensor on the meta device stands for one that another rank has, as of a pipeline's other stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from treadle_fabric.checkpoint.distributed.split import map_leaves
from treadle_fabric.coordination import reached_by
from treadle_fabric.strategies.sharding.norms import is_elsewhere
from treadle_fabric.strategies.unwrapping import with_plain_names

__all__ = ["stand_in"]


def without_copies(state: dict[str, Any], module: Module) -> dict[str, Any]:
    """Put stand-ins into a module's state dict for the parameters that this rank has, and another one gives."""
    parameters = with_plain_names(module, module.named_parameters(remove_duplicate=False))
    copies = {name: stand_in(each) for name, each in parameters if is_elsewhere(each) and not each.is_meta}
    for name in copies.keys() & state.keys():
        state[name] = copies[name]
    return state


def stand_in(tensor: Tensor) -> Tensor:
    """A tensor of the same shape and dtype, on the meta device."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


class _Form(NamedTuple):
    """The shape and dtype of a tensor that another rank has."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def with_states_of_others(state: dict[str, Any], optimizer: Optimizer, groups: Sequence[Any]) -> dict[str, Any]:
    """Add the states of the parameters that other ranks have to an optimizer's state dict, on the meta device.

    Every rank of the groups calls this.

    Args:
        state: The state dict, with the states of this rank's parameters, and perhaps of others.
        optimizer: The optimizer, which holds the parameters of all ranks.
        groups: The ranks that share out the parameters.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for group in groups:
        mine = {key: entry for key, entry in state["state"].items() if not is_elsewhere(parameters[key])}
        forms = {key: map_leaves(entry, _form_of, "") for key, entry in mine.items()}
        everywhere: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(everywhere, forms, group=group)
        others = {key: entry for theirs in everywhere for key, entry in theirs.items() if key not in mine}
        found = {**{key: map_leaves(entry, _made, "") for key, entry in others.items()}, **mine}
        state = {**state, "state": dict(sorted(found.items()))}
    return state


def _form_of(value: Any, name: str) -> Any:
    return _Form(tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value


def _made(value: Any, name: str) -> Any:
    return torch.empty(value.shape, dtype=value.dtype, device="meta") if isinstance(value, _Form) else value


def brought_to_rank_zero(state: dict[str, Any], groups: Sequence[Any]) -> dict[str, Any]:
    """Bring the tensors that other ranks have to rank 0, where they are kept on the host.

    Every rank of the groups calls this with a state of the same structure.
    """
    for group in groups:
        members = dist.get_process_group_ranks(group)
        if 0 in members:  # the ranks of other pipelines have the same
            state = _brought(state, group, members)
    return state


def _brought(state: dict[str, Any], group: Any, members: list[int]) -> dict[str, Any]:
    tensors: dict[str, Tensor] = {}

    def note(value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            tensors[name] = value
        return value

    map_leaves(state, note, "")
    rank = dist.get_rank()
    wanted: list[Any] = [[name for name, tensor in tensors.items() if tensor.is_meta]]
    dist.broadcast_object_list(wanted, 0, group=group)
    here = {name for name in wanted[0] if name in tensors and not tensors[name].is_meta}
    have: list[Any] = [None] * len(members)
    dist.all_gather_object(have, here, group=group)
    reached = reached_by(group)
    device = torch.device("cpu" if "cpu" in reached else reached[0])
    received: dict[str, Tensor] = {}
    for name in wanted[0]:
        owner = next((member for member, names in zip(members, have, strict=True) if name in names), None)
        if owner == rank:
            dist.send(tensors[name].detach().to(device).contiguous(), 0, group=group)
        elif owner is not None and rank == 0:
            incoming = torch.empty(tensors[name].shape, dtype=tensors[name].dtype, device=device)
            dist.recv(incoming, owner, group=group)
            received[name] = incoming.cpu()
    result: dict[str, Any] = map_leaves(state, lambda value, name: received.get(name, value), "")
    return result
