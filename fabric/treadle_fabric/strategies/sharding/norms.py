"""Norms and limits of gradients of which each rank holds a part, and the search for infinite ones among them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from treadle_fabric.checkpoint import is_sharded_tensor
from treadle_fabric.coordination import reached_by
from treadle_fabric.errors import MisconfigurationException

__all__ = [
    "clip_norm",
    "clip_value",
    "count_elsewhere",
    "is_elsewhere",
    "local_gradients",
    "norms",
    "total_norm",
    "unscale",
]

_ELSEWHERE = "_treadle_counted_elsewhere"


def count_elsewhere(parameter: Tensor) -> None:
    """Let norms and checkpoints leave out a parameter, because another rank has the same one and counts it."""
    setattr(parameter, _ELSEWHERE, True)


def is_elsewhere(parameter: Tensor) -> bool:
    """Whether another rank has a parameter, and gives it to norms and checkpoints; this one may have it, too."""
    return parameter.is_meta or hasattr(parameter, _ELSEWHERE)


def total_norm(gradients: Iterable[Tensor], norm_type: float = 2.0, groups: Sequence[Any] = ()) -> Tensor:
    """The p-norm of tensors as one vector, of which each rank holds a part.

    Each rank sums the powers of its parts; one ``all_reduce`` for each dimension of a mesh that splits some of the
    tensors, and one for each of ``groups``, sums them over the ranks. Nothing waits for a device.

    Args:
        gradients: Plain tensors, which every rank has whole, and DTensors of any meshes and placements, on all ranks
            in the same order. Of sparse ones each row counts once.
        norm_type: The p of the p-norm, more than 0; ``inf`` for the largest absolute value.
        groups: Process groups over whose ranks the tensors are shared out, as over the stages of a pipeline: each rank
            calls this with those that it has, or none.

    Returns:
        A plain scalar, the same on every rank; ``float64`` where a tensor is, ``float32`` otherwise.

    Raises:
        MisconfigurationException: ``norm_type`` is not positive.
    """
    p = float(norm_type)
    if not p > 0:
        raise MisconfigurationException(f"norm_type={norm_type!r} is not a positive number, nor 'inf'.")
    parts: dict[tuple[Any, ...], list[Tensor]] = {}
    for gradient in gradients:
        part, split_over = _part(gradient)
        parts.setdefault(split_over, []).append(part)
    every = [part for some in parts.values() for part in some]
    device = _device(every)
    sums = {split_over: _power_sum(some, p, device) for split_over, some in parts.items()}
    operation = dist.ReduceOp.MAX if math.isinf(p) else dist.ReduceOp.SUM
    for group in dict.fromkeys(group for split_over in sums for group in split_over):
        concerned = [split_over for split_over in sums if group in split_over]
        packed = _reduced(torch.stack([sums[split_over] for split_over in concerned]), operation, group)
        sums.update(zip(concerned, packed.unbind(), strict=True))
    total = _joined(torch.stack(list(sums.values())), p) if sums else _power_sum([], p, device)
    for group in groups:
        total = _reduced(total, operation, group)
    double = any(part.dtype in (torch.float64, torch.complex128) for part in every)
    return _root(total, p).to(torch.float64 if double else torch.float32)


def norms(tensors: Iterable[Tensor], norm_type: float = 2.0) -> Tensor:
    """The p-norm of each of several tensors, as :func:`total_norm` gives that of all of them.

    Returns:
        A vector with one norm for each tensor, the same on every rank.
    """
    p, parts = float(norm_type), [_part(tensor) for tensor in tensors]
    device = _device([part for part, _ in parts])
    if not any(split_over for _, split_over in parts):
        return torch.stack([torch.linalg.vector_norm(part, p).to(device) for part, _ in parts]).float()
    sums = torch.stack([_power_sum([part], p, device) for part, _ in parts])
    operation = dist.ReduceOp.MAX if math.isinf(p) else dist.ReduceOp.SUM
    for group in dict.fromkeys(group for _, split_over in parts for group in split_over):
        concerned = [i for i, (_, split_over) in enumerate(parts) if group in split_over]
        sums[concerned] = _reduced(sums[concerned], operation, group)
    return torch.stack([_root(each, p) for each in sums]).float()


def clip_norm(
    parameters: Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    groups: Sequence[Any] = (),
    error_if_nonfinite: bool = False,
) -> Tensor:
    """Scale gradients so that their joint norm, over all ranks, is at most ``max_norm``.

    Args:
        parameters: Whose gradients to scale.
        max_norm: The largest norm.
        norm_type: The p of the p-norm.
        groups: As in :func:`total_norm`.
        error_if_nonfinite: Raise, on all ranks alike, if the norm is NaN or infinite, which waits for the device.

    Returns:
        The norm before, a plain scalar, the same on every rank.

    Raises:
        RuntimeError: The norm is NaN or infinite.
        MisconfigurationException: ``norm_type`` is not positive.
    """
    parameters = list(parameters)
    parts = local_gradients(parameters)
    counted = (p for p in parameters if p.grad is not None and not hasattr(p, _ELSEWHERE))
    norm = total_norm((p.grad for p in counted if p.grad is not None), norm_type, groups)
    if error_if_nonfinite and not bool(norm.isfinite()):
        raise RuntimeError(
            f"The total norm of order {norm_type} for gradients from `parameters` is non-finite, so it cannot be "
            "clipped. To disable this error and scale the gradients by the non-finite norm anyway, set "
            "`error_if_nonfinite=False`"
        )
    factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    for device in dict.fromkeys(part.device for part in parts):
        torch._foreach_mul_([part for part in parts if part.device == device], factor.to(device))
    return norm


def clip_value(parameters: Iterable[Tensor], limit: float) -> None:
    """Clamp every entry of the gradients to ``[-limit, limit]``."""
    for part in local_gradients(parameters):
        part.clamp_(-limit, limit)


def local_gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    """This rank's part of each gradient; a change of a part changes the gradient.

    A gradient that has yet to be summed over ranks is summed, once and for all: each rank's summand has another norm
    than the sum.
    """
    parts = []
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is None:
            continue
        if type(gradient) is Tensor and not gradient.is_sparse:
            parts.append(gradient)
            continue
        if gradient.is_sparse:
            parameter.grad = gradient = gradient.coalesce()
        elif is_sharded_tensor(gradient):
            parameter.grad = gradient = _summed(gradient)
        parts.append(_part(gradient)[0])
    return parts


def unscale(scaler: torch.amp.GradScaler, optimizer: Optimizer, groups: Sequence[Any] = ()) -> None:
    """Unscale an optimizer's gradients; that one is not finite is known to all ranks that hold a part.

    Torch's scaler alone would ask the mesh of the first gradient only.

    Args:
        scaler: The gradient scaler.
        optimizer: Whose gradients to unscale, in place.
        groups: As in :func:`total_norm`.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    parts = local_gradients(parameters)
    gradients = [p.grad for p in parameters if p.grad is not None]
    holders = []
    for part in parts:
        holder = part.detach()
        holder.grad = part
        holders.append(holder)
    own: Any = SimpleNamespace(param_groups=[{"params": holders}])  # all of an optimizer that is asked for
    scaler.unscale_(own)
    states: Any = scaler._per_optimizer_states
    state = states[id(optimizer)] = states.pop(id(own))
    found = state["found_inf_per_device"]
    device = _device(parts)
    worst = torch.stack([each.to(device) for each in found.values()]).max() if found else torch.zeros((), device=device)
    over = dict.fromkeys(group for gradient in gradients for group in _part(gradient)[1])
    for group in (*over, *groups):
        worst = _reduced(worst, dist.ReduceOp.MAX, group)
    state["found_inf_per_device"] = {device: worst}


def _summed(gradient: Any) -> Any:
    """A DTensor none of whose entries are sums that are still to be made."""
    if not any(placement.is_partial() for placement in gradient.placements):
        return gradient
    from torch.distributed.tensor import Replicate  # heavy

    wanted = [Replicate() if placement.is_partial() else placement for placement in gradient.placements]
    with torch.no_grad():
        return gradient.detach().redistribute(placements=wanted)


def _part(gradient: Any) -> tuple[Tensor, tuple[Any, ...]]:
    """What this rank holds, and the process groups over which the tensor is split."""
    if not is_sharded_tensor(gradient):
        gradient = gradient.detach()
        return gradient.coalesce().values() if gradient.is_sparse else gradient, ()
    gradient = _summed(gradient.detach())
    mesh = gradient.device_mesh
    groups = [mesh.get_group(i) for i, each in enumerate(gradient.placements) if not each.is_replicate()]
    return gradient.to_local(), tuple(group for group in groups if dist.get_world_size(group) > 1)


def _device(parts: Sequence[Tensor]) -> torch.device:
    """Where scalars of all parts meet: an accelerator, if one part is there."""
    devices = [part.device for part in parts]
    return next((device for device in devices if device.type != "cpu"), torch.device("cpu"))


def _power_sum(parts: Sequence[Tensor], p: float, device: torch.device) -> Tensor:
    """The sum of the p-th powers of absolute values, in double precision where the device has it.

    Of the maximum norm: the maximum, and 1 if there is a NaN, which a reduction over processes may lose.
    """
    norms: list[Tensor] = []
    plain = [part for part in parts if part.numel() and not part.is_complex()]
    for dtype in (torch.float32, torch.float64):
        if some := [part for part in plain if (part.dtype is torch.float64) == (dtype is torch.float64)]:
            norms.extend(torch._foreach_norm(some, p, dtype=dtype))
    norms.extend(torch.linalg.vector_norm(part, p) for part in parts if part.numel() and part.is_complex())
    exact = torch.float32 if device.type == "mps" else torch.float64
    if not norms:
        return torch.zeros((2,) if math.isinf(p) else (), dtype=exact, device=device)
    stacked = torch.stack([norm.to(device, exact) for norm in norms])
    if math.isinf(p):
        return torch.stack([stacked.nan_to_num(nan=0.0, posinf=math.inf).max(), stacked.isnan().any().to(exact)])
    return stacked.pow(p).sum()


def _joined(sums: Tensor, p: float) -> Tensor:
    """One sum of several, or one maximum."""
    return sums.amax(0) if math.isinf(p) else sums.sum(0)


def _root(total: Tensor, p: float) -> Tensor:
    if not math.isinf(p):
        return total.pow(1 / p)
    return torch.where(total[1] > 0, torch.full_like(total[0], math.nan), total[0])


def _reduced(tensor: Tensor, operation: Any, group: Any) -> Tensor:
    """The tensor reduced over a group, which may reach no memory of the host."""
    device, reached = tensor.device, reached_by(group)
    sent = tensor.clone() if device.type in reached else tensor.to(reached[0])
    dist.all_reduce(sent, op=operation, group=group)
    return sent.to(device)
