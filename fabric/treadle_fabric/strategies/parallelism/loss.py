"""Cross entropy of logits of which each tensor-parallel rank has some of the classes.

The logits are never gathered: the ranks exchange three numbers a sample. The loss is a plain tensor, the same on every
rank, and may be differentiated anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from treadle_fabric.batches import map_tensors
from treadle_fabric.errors import MisconfigurationException, near_names

__all__ = ["loss_functions", "plain_scalars", "sharded_cross_entropy"]

_REDUCTIONS = ("none", "mean", "sum")


def loss_functions() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return what takes the place of torch's loss functions where a plan leaves logits sharded on their classes."""
    return {F.cross_entropy: sharded_cross_entropy}


def plain_scalars(output: Any) -> Any:
    """Make single numbers that are DTensors, in containers of any kind, plain tensors: losses, for logging."""
    from torch.distributed.tensor import DTensor  # heavy

    return map_tensors(output, lambda t: t.full_tensor() if isinstance(t, DTensor) and t.dim() == 0 else t)


def sharded_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Compute what ``torch.nn.functional.cross_entropy`` does, also of logits that are sharded on their classes.

    Args:
        input: Logits, shape ``(classes)``, ``(samples, classes)`` or ``(samples, classes, ...)``. A DTensor sharded on
            the classes is not gathered; any other DTensor is.
        target: Indices of classes, or probabilities in the shape of ``input``; a plain tensor of all classes.
        weight: Of each class, all of them.
        size_average: Deprecated by torch: give ``reduction``.
        ignore_index: Targets that do not count.
        reduce: Deprecated by torch: give ``reduction``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        label_smoothing: From 0 to 1.

    Returns:
        A plain tensor.

    Raises:
        MisconfigurationException: ``input`` is sharded on the classes along one dimension of a mesh, and along others,
            too; or ``reduction`` is unknown, or ``size_average`` or ``reduce`` is given.
    """
    from torch.distributed.tensor import DTensor  # heavy

    options: dict[str, Any] = {"ignore_index": ignore_index, "reduction": reduction, "label_smoothing": label_smoothing}
    target = target.full_tensor() if isinstance(target, DTensor) else target
    weight = weight.full_tensor() if isinstance(weight, DTensor) else weight
    classes = 1 if input.dim() > 1 else 0
    if isinstance(input, DTensor) and not any(each.is_shard(classes) for each in input.placements):
        input = input.full_tensor()
    if not isinstance(input, DTensor):
        return F.cross_entropy(input, target, weight, size_average, reduce=reduce, **options)
    if size_average is not None or reduce is not None or reduction not in _REDUCTIONS:
        raise MisconfigurationException(
            f"cross_entropy(size_average={size_average!r}, reduce={reduce!r}, reduction={reduction!r}): of logits"
            f" that are sharded on their classes only reduction is taken. {near_names(reduction, _REDUCTIONS)}"
        )
    if input.device_mesh.ndim > 1:
        raise MisconfigurationException(
            f"cross_entropy got logits sharded as {input.placements} over a mesh of {input.device_mesh.ndim}"
            " dimensions; one is allowed, that of tensor parallelism: the samples are those of this rank alone."
        )
    shard = _shard_of(input, classes)
    if shard.logits.dim() == 1:  # one sample without a dimension of its own
        shard.logits, target = shard.logits[None], target[None]
    loss, unit = _losses(shard, target, weight, ignore_index, label_smoothing)
    if torch.is_autocast_enabled(shard.logits.device.type):
        input = input.float()  # as torch's function returns there
    if reduction == "none":
        loss = loss if input.dim() > 1 else loss[0]
    else:
        loss = loss.sum() / unit if reduction == "mean" else loss.sum()
    return loss.to(input.dtype)


@dataclass
class _Shard:
    """A rank's part of the logits: the classes from ``start`` on, in dimension 1."""

    logits: Tensor
    start: int
    total: int
    group: Any
    rank: int

    def of(self, tensor: Tensor, dim: int) -> Tensor:
        """The part of a tensor of all classes."""
        return tensor.narrow(dim, self.start, self.logits.shape[1])


def _shard_of(input: Any, classes: int) -> _Shard:
    mesh, total = input.device_mesh, input.shape[classes]
    local = input.to_local()
    local = local.float() if local.dtype in (torch.float16, torch.bfloat16) else local
    rank = mesh.get_local_rank()
    start = min(rank * -(-total // mesh.size()), total)  # as torch.chunk splits, uneven ones too
    return _Shard(local, start, total, mesh.get_group(), rank)


def _losses(
    shard: _Shard, target: Tensor, weight: Tensor | None, ignore_index: int, smoothing: float
) -> tuple[Tensor, Any]:
    """The loss of each sample, and what their sum is divided by for their mean."""
    logits = shard.logits
    mine = None if weight is None else shard.of(weight.to(logits.dtype), 0).view(-1, *[1] * (logits.dim() - 2))
    weighted = logits if mine is None else logits * mine
    mass: Any
    if target.is_floating_point():
        wanted = shard.of(target.to(logits.dtype), 1) * (1 - smoothing) + smoothing / shard.total
        counted = wanted if mine is None else wanted * mine
        # of each sample: the sum of w * p, and that of w * p * logit
        rows = [counted.sum(1), (counted * logits).sum(1)]
        lse, (mass, picked) = _joined(shard, rows)
        return lse * mass - picked, target.numel() / target.shape[1]
    counts = target != ignore_index
    index = torch.where(counts, target, 0)
    _check_range(index, shard.total)
    rows = [_of_target(shard, index)]
    if smoothing:
        rows.append(weighted.sum(1))
    lse, (picked, *smoothed) = _joined(shard, rows)
    of_class = torch.ones_like(lse) if weight is None else weight.to(lse.dtype)[index]
    loss = (lse - picked) * of_class
    if smoothing:
        mass = shard.total if weight is None else weight.to(lse.dtype).sum()
        loss = (1 - smoothing) * loss + smoothing / shard.total * (lse * mass - smoothed[0])
    return torch.where(counts, loss, 0.0), (of_class * counts).sum()


def _of_target(shard: _Shard, index: Tensor) -> Tensor:
    """The logits of the targets, 0 where another rank has them."""
    logits, local = shard.logits, index - shard.start
    if not logits.shape[1]:  # fewer classes than ranks
        return logits.sum(1)
    here = (local >= 0) & (local < logits.shape[1])
    return torch.where(here, logits.gather(1, torch.where(here, local, 0)[:, None])[:, 0], 0.0)


def _check_range(index: Tensor, total: int) -> None:
    """Torch checks targets on the CPU only, too: elsewhere the host would have to wait."""
    if index.device.type == "cpu" and index.numel() and not 0 <= int(index.min()) <= int(index.max()) < total:
        raise IndexError(
            f"Target {int(index.min())} or {int(index.max())} is out of bounds: there are {total} classes."
        )


def _joined(shard: _Shard, rows: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The log of the sum of all exponentials, and the sums of rows over the ranks."""
    mine = torch.logsumexp(shard.logits, dim=1) if shard.logits.shape[1] else shard.logits.sum(1) - torch.inf
    gathered = _gathered(torch.stack([mine, *rows]), shard.group, shard.rank)
    return torch.logsumexp(gathered[:, 0], dim=0), list(gathered[:, 1:].sum(0))


class _Gathered(torch.autograd.Function):
    """The tensors of all ranks, stacked. What comes after is the same on every rank, and so is its gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any, rank: int) -> Tensor:
        ctx.rank = rank
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, tensor.contiguous(), group=group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient[ctx.rank], None, None


_gathered: Callable[[Tensor, Any, int], Tensor] = _Gathered.apply
