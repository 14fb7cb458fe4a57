"""Logged scalars reduced over the ranks, all of them in one packed collective."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import torch
from torch import Tensor

from treadle_fabric import rank_zero_warn

if TYPE_CHECKING:
    from treadle_fabric import Fabric

__all__ = ["REDUCTIONS", "Reduction", "gather_values", "reduce_over_ranks"]

Reduction: TypeAlias = Literal["mean", "sum", "min", "max"]
REDUCTIONS: Final[dict[Any, Reduction]] = {
    "mean": "mean", "avg": "mean", torch.mean: "mean", "sum": "sum", torch.sum: "sum", sum: "sum",
    "min": "min", torch.min: "min", min: "min", "max": "max", torch.max: "max", max: "max",
}  # fmt: skip
_PACKET: Final = 130  # doubles in the packed collective: a checksum, a count and 64 pairs; more slots need a second one


def gather_values(fabric: Fabric, values: list[Any]) -> list[Any]:
    """The values of all ranks, in their order."""
    mine = [float(v) for v in values]
    return [v for rank in range(fabric.world_size) for v in fabric.broadcast(mine, src=rank)]


def reduce_over_ranks(fabric: Fabric, rows: list[tuple[str, Reduction, Any, float]]) -> dict[str, Tensor]:
    """Reduce scalars over all ranks in one collective (two above 64 of them).

    Args:
        fabric: whose ranks.
        rows: name, reduction, this rank's total (for a mean: the weighted sum), weight.

    Returns:
        The reduced value of every name that any rank logged, in float64 (float32 on MPS).
    """
    rows = sorted(rows, key=lambda r: r[0])
    names = [f"{name}:{how}" for name, how, *_ in rows]
    gathered = _exchange(fabric, rows, names)
    if gathered is None:  # the ranks logged different names
        everywhere = [fabric.broadcast(names, src=rank) for rank in range(fabric.world_size)]
        union = sorted({name for theirs in everywhere for name in theirs})
        for name in union:
            if without := [rank for rank, theirs in enumerate(everywhere) if name not in theirs]:
                rank_zero_warn(
                    f"{name.rpartition(':')[0]!r} was not logged on rank {', '.join(map(str, without))}: it is reduced"
                    " over the other ranks."
                )
        mine = dict(zip(names, rows, strict=True))
        for extra in union:
            if extra not in mine:
                name, _, how = extra.rpartition(":")
                neutral = {"min": float("inf"), "max": float("-inf")}.get(how, 0.0)
                mine[extra] = (name, REDUCTIONS[how], neutral, 0.0)
        rows, names = [mine[n] for n in union], union
        gathered = _exchange(fabric, rows, names)
        assert gathered is not None
    out: dict[str, Tensor] = {}
    for i, (name, how, *_) in enumerate(rows):
        totals, weights = gathered[:, 2 * i], gathered[:, 2 * i + 1]
        match how:
            case "mean":
                out[name] = totals.sum() / weights.sum()
            case "sum":
                out[name] = totals.sum()
            case "min":
                out[name] = totals.amin()
            case _:
                out[name] = totals.amax()
    return out


def _exchange(fabric: Fabric, rows: list[tuple[str, Reduction, Any, float]], names: list[str]) -> Tensor | None:
    """Every rank's (total, weight) pairs, ``(world_size, 2 * len(rows))``; None where the names differ."""
    checksum = float(zlib.crc32("\n".join(names).encode()))
    dtype = torch.float32 if fabric.device.type == "mps" else torch.float64
    head = [checksum, float(len(rows))]
    totals = [torch.as_tensor(total, dtype=dtype, device=fabric.device).reshape(()) for _, _, total, _ in rows]
    weights = torch.tensor([weight for *_, weight in rows], dtype=dtype, device=fabric.device)
    pairs = torch.stack([torch.stack(totals), weights], dim=1).flatten() if rows else weights
    packet = torch.zeros(_PACKET, dtype=dtype, device=fabric.device)
    packet[:2] = torch.tensor(head, dtype=dtype)
    first = pairs[: _PACKET - 2]
    packet[2 : 2 + len(first)] = first
    gathered: Tensor = fabric.all_gather(packet).reshape(fabric.world_size, -1)
    if not bool((gathered[:, :2] == gathered[0, :2]).all()):
        return None
    body = gathered[:, 2 : 2 + len(first)]
    if len(pairs) > len(first):
        rest = fabric.all_gather(pairs[len(first) :]).reshape(fabric.world_size, -1)
        body = torch.cat([body, rest], dim=1)
    return body
