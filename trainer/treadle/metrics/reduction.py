"""Reduce logged scalars over the ranks, all of them in one packed collective."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from treadle.metrics.values import scalar_on, to_floats, vector_on
from treadle_fabric import Fabric, all_gather_objects, rank_zero_warn
from treadle_fabric.data import one_of_each

__all__ = ["Reduced", "Reduction", "Row", "Told", "reduce_over_ranks", "reduction_named"]

Reduction: TypeAlias = Literal["mean", "sum", "min", "max"]
Row: TypeAlias = tuple[str, Reduction | Literal["gather", "count"], Any, float]
_REDUCTIONS: Final[dict[Any, Reduction]] = {
    "mean": "mean", "avg": "mean", torch.mean: "mean", "sum": "sum", torch.sum: "sum", sum: "sum",
    "min": "min", torch.min: "min", min: "min", "max": "max", torch.max: "max", max: "max",
}  # fmt: skip


def reduction_named(reduce_fx: Any) -> Reduction | None:
    """The reduction that an argument of ``self.log`` names, in any case of letters; None for other arguments."""
    return _REDUCTIONS.get(reduce_fx.lower() if isinstance(reduce_fx, str) else reduce_fx)


_PACKET: Final = 131  # doubles in the packed collective: three of the head and 64 pairs; more slots need a second one
_HEAD: Final = 3  # a checksum of the names, their number, and what the rank has of the samples


def _gather_values(fabric: Fabric, values: list[Any], counted: list[int]) -> list[Any]:
    """Gather the values of the counted ranks, in the order of the ranks; the host waits once for the device."""
    numbers = to_floats({str(i): value for i, value in enumerate(values)})
    everywhere = all_gather_objects(fabric, [*numbers.values()])
    return [v for rank in counted for v in everywhere[rank]]


class Told(NamedTuple):
    """What a rank tells the others where the ranks have logged different names."""

    facts: Mapping[str, Any] = {}
    """By the name of a row, what a rank that lacks the row needs to know of it."""
    idle: frozenset[Any] = frozenset()
    """The loaders of which this rank had no batch, so that it could log nothing of them."""
    paths: frozenset[str] = frozenset()
    """The torchmetrics objects of this rank, by path."""


class Reduced(NamedTuple):
    """Values of all ranks by name, and what each rank told; nothing where all ranks logged the same names."""

    values: dict[str, Any] = {}
    told: list[Told] = []


def reduce_over_ranks(fabric: Fabric, rows: list[Row], tell: Callable[[], Told] = Told) -> Reduced:
    """Reduce scalars over all ranks in one collective (two above 64 of them).

    Of ranks that work together on the same samples, and log the same, one counts. Of ranks that have slices of the same
    samples, each counts.

    Args:
        fabric: the Fabric of these ranks.
        rows: for each scalar its name, reduction, total on this rank (for a mean: the weighted sum) and weight.
            "gather" takes a list of numbers in the total's place, and "count" None.
        tell: called where the ranks logged different names; what this rank tells the others then.

    Returns:
        The reduced value of every name that any rank logged, in float64; for "gather" the numbers of
        all ranks, for "count" the number of shares whose rank has the name.
    """
    rows = sorted(rows, key=lambda r: r[0])
    names = [f"{name}:{how}" for name, how, *_ in rows]
    exchanged, told = _exchange(fabric, rows, names), []
    if exchanged is None:  # the ranks logged different names
        facts = all_gather_objects(fabric, (names, tell()))
        everywhere, told = [theirs for theirs, _ in facts], [theirs for _, theirs in facts]
        union = sorted({name for theirs in everywhere for name in theirs})
        for name in union:
            _warn_of_lack(name, everywhere, told)
        mine = dict(zip(names, rows, strict=True))
        for extra in union:
            if extra not in mine:
                name, _, how = extra.rpartition(":")
                neutral: Any = {"min": float("inf"), "max": float("-inf"), "gather": []}.get(how, 0.0)
                mine[extra] = (name, how, neutral, 0.0)  # type: ignore[assignment]
        rows, names = [mine[n] for n in union], union
        exchanged = _exchange(fabric, rows, names)
        assert exchanged is not None
    gathered, counted = exchanged
    out: dict[str, Any] = {}
    counts = gathered[:, 1::2].sum(0).tolist() if any(how == "count" for _, how, *_ in rows) else []
    for i, (name, how, total, _) in enumerate(rows):
        totals, weights = gathered[:, 2 * i], gathered[:, 2 * i + 1]
        match how:
            case "mean":
                rounded = totals.sum().to(total.dtype if isinstance(total, Tensor) else torch.float32)
                out[name] = rounded / weights.sum()
            case "sum":
                out[name] = totals.sum()
            case "count":
                out[name] = int(counts[i])
            case "gather":
                out[name] = _gather_values(fabric, total, counted)
            case "min":
                out[name] = totals.amin()
            case _:
                out[name] = totals.amax()
    return Reduced(out, told)


def _warn_of_lack(name: str, everywhere: list[list[str]], told: list[Told]) -> None:
    """Warn of a name that a rank did not log although it had batches to log it of."""
    row, _, how = name.rpartition(":")
    facts = next((each.facts[row] for each in told if row in each.facts), None)
    without = [
        rank
        for rank, theirs in enumerate(everywhere)
        if name not in theirs and not (facts is not None and facts.in_batch and facts.loader in told[rank].idle)
    ]
    if how == "count" and facts is not None and all(facts.path in each.paths for each in told):
        return  # all ranks compute it, also those that did not log it
    if without:
        over = "it is computed of each rank's own values" if how == "count" else "it is reduced over the other ranks"
        rank_zero_warn(f"{row!r} was not logged on rank {', '.join(map(str, without))}: {over}.")


def _exchange(fabric: Fabric, rows: list[Row], names: list[str]) -> tuple[Tensor, list[int]] | None:
    """Gather the (total, weight) pairs of one rank for each share of the samples, and each slice of a share.

    Returns:
        The pairs, ``(shares, 2 * len(rows))``, and those ranks; None where the names differ.
    """
    checksum = float(zlib.crc32("\n".join(names).encode()))
    dtype = torch.float64
    strategy = fabric.strategy
    part = strategy.data_parallel_rank * strategy.num_slices + strategy.slice_index
    head = [checksum, float(len(rows)), float(part)]
    numbers = [0.0 if how in ("gather", "count") else total for _, how, total, _ in rows]
    totals = [scalar_on(number, dtype, fabric.device) for number in numbers]
    weights = vector_on([weight for *_, weight in rows], dtype, fabric.device)
    pairs = torch.stack([torch.stack(totals), weights], dim=1).flatten() if rows else weights
    packet = torch.zeros(_PACKET, dtype=dtype, device=fabric.device)
    packet[:_HEAD] = vector_on(head, dtype, fabric.device)
    first = pairs[: _PACKET - _HEAD]
    packet[_HEAD : _HEAD + len(first)] = first
    gathered: Tensor = fabric.strategy.all_gather(packet).reshape(fabric.world_size, -1)
    if not bool((gathered[:, :2] == gathered[0, :2]).all()):
        return None
    body, counted = gathered[:, _HEAD : _HEAD + len(first)], list(range(fabric.world_size))
    if len(pairs) > len(first):
        rest = fabric.strategy.all_gather(pairs[len(first) :]).reshape(fabric.world_size, -1)
        body = torch.cat([body, rest], dim=1)
    if strategy.data_parallel_size * strategy.num_slices < fabric.world_size:
        counted = one_of_each(counted, gathered[:, 2].int().tolist())
        body = body[counted]
    return body, counted
