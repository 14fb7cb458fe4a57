"""What ranks that work on one batch have alike: random numbers, and gradients of parameters that each has whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from treadle_fabric.checkpoint import own_part
from treadle_fabric.containers import leaves
from treadle_fabric.errors import MisconfigurationException
from treadle_fabric.randomness import own_rng_states, set_rng_states

__all__ = ["align_random_state", "check_gradients_alike", "check_inputs_alike", "whole_over"]

_MAX_NAMED = 5


def align_random_state(meshes: Iterable[Any]) -> None:
    """Give ranks that work on one batch the random state of the first of them: of Python, NumPy and torch.

    What the ranks draw for activations that each has whole, such as a dropout, has to be the same. Ranks of one seed
    are alike already; this is for those that were not seeded.

    Args:
        meshes: One-dimensional meshes, along each of which the state is to be the same.
    """
    for mesh in meshes:
        if mesh.size() > 1:
            states: list[Any] = [own_rng_states()]
            dist.broadcast_object_list(states, group=mesh.get_group(), group_src=0)
            set_rng_states(states[0])


def check_inputs_alike(inputs: Any, mesh: Any) -> None:
    """Refuse inputs of a model that differ between ranks which work on the same samples.

    Sharded layers would add up what belongs to different samples. It is one collective of a few numbers.

    Args:
        inputs: Containers of tensors.
        mesh: Of one dimension.

    Raises:
        MisconfigurationException: Number, sizes or sums of the tensors differ.
    """
    tensors = [t.detach() for t in leaves(inputs) if isinstance(t, Tensor) and not t.is_sparse and not t.is_complex()]
    sums = [t.float().nan_to_num().sum().to(mesh.device_type) * (1 + i) for i, t in enumerate(tensors)]
    sizes = [len(tensors), sum(t.numel() for t in tensors), 0.0]
    mine = torch.tensor(sizes, dtype=torch.float32).to(mesh.device_type)  # the default dtype may be a half one
    if sums:
        mine[2] = torch.stack(sums).sum()
    if _differ(mine, mesh).any():
        raise MisconfigurationException(
            f"The {mesh.size()} ranks of {mesh.mesh_dim_names[0]} work on the same samples together, and got different"
            " ones. A loader from setup_dataloaders, or the Trainer's, gives them the same; one that shares samples out"
            " by itself does so by strategy.data_parallel_size and data_parallel_rank. Samples that are drawn at random"
            " need the same seed on these ranks."
        )


def _differ(mine: Tensor, mesh: Any, tolerance: float = 1e-5) -> Tensor:
    """For each number, whether it differs between the ranks by more than a part of it."""
    extremes = torch.stack([mine, -mine])
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=mesh.get_group())
    most, least = extremes[0], -extremes[1]
    differ: Tensor = most - least > tolerance * torch.maximum(most.abs(), least.abs()) + 1e-6
    return differ  # NaN is not greater than anything


def whole_over(named: Mapping[str, Tensor], dimension: str) -> dict[str, Tensor]:
    """Return the trained parameters that are not distributed over a dimension of the mesh, by name.

    They may be sharded over other dimensions.
    """
    return {
        name: p
        for name, p in named.items()
        if p.requires_grad and dimension not in (getattr(getattr(p, "device_mesh", None), "mesh_dim_names", None) or ())
    }


def check_gradients_alike(named: Mapping[str, Tensor], mesh: Any) -> None:
    """Refuse gradients of whole parameters that differ between ranks which work on the same samples.

    The optimizer would step these parameters apart, without a word. It is one collective of one number a parameter.

    Args:
        named: Parameters that are the same on each rank of the mesh: whole, or the same part.
        mesh: Of one dimension.

    Raises:
        MisconfigurationException: Gradients differ by more than rounding explains.
    """
    if not named:
        return
    norms = [0.0 if p.grad is None else _norm(p.grad) for p in named.values()]
    mine = torch.stack([torch.as_tensor(norm, dtype=torch.float32).to(mesh.device_type) for norm in norms])
    differ = _differ(mine, mesh, tolerance=1e-3).tolist()
    apart = [name for name, differs in zip(named, differ, strict=True) if differs]
    if apart:
        more = f" and {len(apart) - _MAX_NAMED} more" if len(apart) > _MAX_NAMED else ""
        raise MisconfigurationException(
            "Gradients of parameters that every tensor-parallel rank has whole differ between the ranks:"
            f" {', '.join(apart[:_MAX_NAMED])}{more}. Either the ranks got different samples: a loader shares them out"
            " by strategy.data_parallel_size and data_parallel_rank. Or a layer works on a slice of the sequence:"
            " give it the style 'sequence' in the plan. Or ranks draw different random numbers: seed them alike."
        )


def _norm(gradient: Any) -> Tensor:
    part = own_part(gradient)
    norm: Tensor = torch.linalg.vector_norm((part.coalesce().values() if part.is_sparse else part).detach().float())
    return norm
