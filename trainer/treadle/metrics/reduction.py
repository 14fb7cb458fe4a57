"""Reduce logged scalars over the ranks, all of them in one packed collective."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import Any, Final, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from treadle.metrics.values import scalar_on, to_floats, vector_on
from treadle_fabric import Fabric, all_gather_objects, rank_zero_warn
from treadle_fabric.data import one_of_each

__all__ = ["Reduced", "Reduction", "Row", "Told", "reduce_over_ranks", "reduction_named"]

Reduction: TypeAlias = Literal["mean", "sum", "min", "max"]


class Kind(IntEnum):
    """What a value is made of on a rank. The ranks send it, and the greatest is that of the value on all ranks."""

    NOTHING = 0
    NUMBER = 1
    """Of Python numbers: exact, as far as double precision is."""
    SINGLE = 2
    DOUBLE = 3


class Row(NamedTuple):
    """A scalar of this rank that is to be reduced."""

    name: str
    how: Reduction | Literal["gather", "count"]
    total: Any
    """For a mean: the weighted sum. "gather" takes a list of numbers, and "count" None."""
    weight: float
    kind: Kind = Kind.NUMBER


_REDUCTIONS: Final[dict[Any, Reduction]] = {
    "mean": "mean", "avg": "mean", torch.mean: "mean", "sum": "sum", torch.sum: "sum", sum: "sum",
    "min": "min", torch.min: "min", min: "min", "max": "max", torch.max: "max", max: "max",
}  # fmt: skip


def reduction_named(reduce_fx: Any) -> Reduction | None:
    """The reduction that an argument of ``self.log`` names, in any case of letters; None for other arguments."""
    return _REDUCTIONS.get(reduce_fx.lower() if isinstance(reduce_fx, str) else reduce_fx)


_PACKET: Final = 195  # doubles in the packed collective: three of the head and 64 triples; more slots need a second one
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
    kinds: dict[str, Kind] = {}
    told: list[Told] = []


def reduce_over_ranks(
    fabric: Fabric, rows: list[Row], tell: Callable[[], Told] = Told, *, rounds: bool = False
) -> Reduced:
    """Reduce scalars over all ranks in one collective (two above 64 of them).

    Of ranks that work together on the same samples, and log the same, one counts. Of ranks that have slices of the same
    samples, each counts.

    Args:
        fabric: the Fabric of these ranks.
        rows: the scalars of this rank.
        tell: called where the ranks logged different names; what this rank tells the others then.
        rounds: whether the sum of a mean is rounded to its kind before it is divided, as in one process.

    Returns:
        The reduced value of every name that any rank logged, the same on all ranks to the last bit: a tensor in the
        precision of its kind, double precision for numbers; for "gather" the numbers of
        all ranks, for "count" the number of shares whose rank has the name.
    """
    rows = sorted(rows, key=lambda row: row.name)
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
                mine[extra] = Row(name, how, neutral, 0.0, Kind.NOTHING)  # type: ignore[arg-type]
        rows, names = [mine[n] for n in union], union
        exchanged = _exchange(fabric, rows, names)
        assert exchanged is not None
    gathered, counted = exchanged
    out: dict[str, Any] = {}
    # in one transfer to the host
    counts, greatest = torch.stack([gathered[:, 1::3].sum(0), gathered[:, 2::3].amax(0)]).tolist()
    kinds = {row.name: Kind(int(kind)) for row, kind in zip(rows, greatest, strict=True)}
    for i, (name, how, total, *_) in enumerate(rows):
        totals, weights = gathered[:, 3 * i], gathered[:, 3 * i + 1]
        dtype = torch.float32 if kinds[name] in (Kind.NOTHING, Kind.SINGLE) else torch.float64
        match how:
            case "mean":
                out[name] = (totals.sum().to(dtype if rounds else torch.float64) / weights.sum()).to(dtype)
            case "sum":
                out[name] = totals.sum().to(dtype)
            case "count":
                out[name] = int(counts[i])
            case "gather":
                out[name] = _gather_values(fabric, total, counted)
            case "min":
                out[name] = totals.amin().to(dtype)
            case _:
                out[name] = totals.amax().to(dtype)
    return Reduced(out, kinds, told)


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
    """Gather the (total, weight, kind) triples of one rank for each share of the samples, and each slice of a share.

    Returns:
        The triples, ``(shares, 3 * len(rows))``, and those ranks; None where the names differ.
    """
    checksum = float(zlib.crc32("\n".join(names).encode()))
    dtype = torch.float64
    strategy = fabric.strategy
    part = strategy.data_parallel_rank * strategy.num_slices + strategy.slice_index
    head = [checksum, float(len(rows)), float(part)]
    numbers = [0.0 if how in ("gather", "count") else total for _, how, total, *_ in rows]
    totals = [scalar_on(number, dtype, fabric.device) for number in numbers]
    of_host = vector_on([number for *_, weight, kind in rows for number in (weight, float(kind))], dtype, fabric.device)
    triples = torch.cat([torch.stack(totals)[:, None], of_host.reshape(-1, 2)], 1).flatten() if rows else of_host
    packet = torch.zeros(_PACKET, dtype=dtype, device=fabric.device)
    packet[:_HEAD] = vector_on(head, dtype, fabric.device)
    first = triples[: _PACKET - _HEAD]
    packet[_HEAD : _HEAD + len(first)] = first
    gathered: Tensor = fabric.strategy.all_gather(packet).reshape(fabric.world_size, -1)
    if not bool((gathered[:, :2] == gathered[0, :2]).all()):
        return None
    body, counted = gathered[:, _HEAD : _HEAD + len(first)], list(range(fabric.world_size))
    if len(triples) > len(first):
        rest = fabric.strategy.all_gather(triples[len(first) :]).reshape(fabric.world_size, -1)
        body = torch.cat([body, rest], dim=1)
    if strategy.data_parallel_size * strategy.num_slices < fabric.world_size:
        counted = one_of_each(counted, gathered[:, 2].int().tolist())
        body = body[counted]
    return body, counted
