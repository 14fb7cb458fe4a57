"""Reduce logged scalars over the ranks, all of them in one packed collective."""

from __future__ import annotations

import zlib
from typing import Any, Final, Literal, TypeAlias

import torch
from torch import Tensor

from treadle_fabric import Fabric, all_gather_objects, rank_zero_warn

__all__ = ["REDUCTIONS", "Reduction", "Row", "compute_alone", "reduce_over_ranks"]

Reduction: TypeAlias = Literal["mean", "sum", "min", "max"]
Row: TypeAlias = tuple[str, Reduction | Literal["gather", "count"], Any, float]
REDUCTIONS: Final[dict[Any, Reduction]] = {
    "mean": "mean", "avg": "mean", torch.mean: "mean", "sum": "sum", torch.sum: "sum", sum: "sum",
    "min": "min", torch.min: "min", min: "min", "max": "max", torch.max: "max", max: "max",
}  # fmt: skip
_PACKET: Final = 130  # doubles in the packed collective: a checksum, a count and 64 pairs; more slots need a second one


def _gather_values(fabric: Fabric, values: list[Any]) -> list[Any]:
    """Gather the values of all ranks, in the order of the ranks."""
    return [v for theirs in all_gather_objects(fabric, [float(v) for v in values]) for v in theirs]


def compute_alone(metric: Any) -> Any:
    """Compute a torchmetrics object of this rank's values alone: a collective would wait for ranks that lack it."""
    before = getattr(metric, "_to_sync", False)
    metric._to_sync = False
    try:
        return metric.compute()
    finally:
        metric._to_sync = before


def reduce_over_ranks(fabric: Fabric, rows: list[Row]) -> dict[str, Any]:
    """Reduce scalars over all ranks in one collective (two above 64 of them).

    Args:
        fabric: the Fabric of these ranks.
        rows: for each scalar its name, reduction, total on this rank (for a mean: the weighted sum) and weight.
            "gather" takes a list of numbers in the total's place, and "count" None.

    Returns:
        The reduced value of every name that any rank logged, in float64; for "gather" the numbers of
        all ranks, for "count" the number of ranks that have the name.
    """
    rows = sorted(rows, key=lambda r: r[0])
    names = [f"{name}:{how}" for name, how, *_ in rows]
    gathered = _exchange(fabric, rows, names)
    if gathered is None:  # the ranks logged different names
        everywhere = all_gather_objects(fabric, names)
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
                neutral: Any = {"min": float("inf"), "max": float("-inf"), "gather": []}.get(how, 0.0)
                mine[extra] = (name, how, neutral, 0.0)  # type: ignore[assignment]
        rows, names = [mine[n] for n in union], union
        gathered = _exchange(fabric, rows, names)
        assert gathered is not None
    out: dict[str, Any] = {}
    for i, (name, how, total, _) in enumerate(rows):
        totals, weights = gathered[:, 2 * i], gathered[:, 2 * i + 1]
        match how:
            case "mean":
                out[name] = totals.sum() / weights.sum()
            case "sum":
                out[name] = totals.sum()
            case "count":
                out[name] = int(weights.sum().item())
            case "gather":
                out[name] = _gather_values(fabric, total)
            case "min":
                out[name] = totals.amin()
            case _:
                out[name] = totals.amax()
    return out


def _exchange(fabric: Fabric, rows: list[Row], names: list[str]) -> Tensor | None:
    """Gather the (total, weight) pairs of all ranks, ``(world_size, 2 * len(rows))``; None where the names differ."""
    checksum = float(zlib.crc32("\n".join(names).encode()))
    dtype = torch.float64
    head = [checksum, float(len(rows))]
    numbers = [0.0 if how in ("gather", "count") else total for _, how, total, _ in rows]
    totals = [torch.as_tensor(number, dtype=dtype, device=fabric.device).reshape(()) for number in numbers]
    weights = torch.tensor([weight for *_, weight in rows], dtype=dtype, device=fabric.device)
    pairs = torch.stack([torch.stack(totals), weights], dim=1).flatten() if rows else weights
    packet = torch.zeros(_PACKET, dtype=dtype, device=fabric.device)
    packet[:2] = torch.tensor(head, dtype=dtype)
    first = pairs[: _PACKET - 2]
    packet[2 : 2 + len(first)] = first
    gathered: Tensor = fabric.strategy.all_gather(packet).reshape(fabric.world_size, -1)
    if not bool((gathered[:, :2] == gathered[0, :2]).all()):
        return None
    body = gathered[:, 2 : 2 + len(first)]
    if len(pairs) > len(first):
        rest = fabric.strategy.all_gather(pairs[len(first) :]).reshape(fabric.world_size, -1)
        body = torch.cat([body, rest], dim=1)
    return body
