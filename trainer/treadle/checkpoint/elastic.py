"""Turn the states of the ranks of a run into the states of another number of ranks.

Ranks are here those that share the samples out: of those that work together on one share, one stands for all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from treadle.metrics.options import read_options
from treadle.metrics.reduction import reduction_named
from treadle_fabric import rank_zero_warn
from treadle_fabric.randomness import rng_states_of

__all__ = ["in_slices", "part_of_rank", "without_sums"]

_MERGEABLE: Final = ("dim_zero_sum", "dim_zero_max", "dim_zero_min")  # other ranks' initial values change nothing


def part_of_rank(
    ranks: Sequence[dict[str, Any]], rank: int, world_size: int, metrics: Mapping[str, Any], slices: int = 1
) -> dict[str, Any]:
    """The part with which one of ``world_size`` ranks continues a run that had other ranks.

    Rank 0 takes what all ranks had logged and accumulated; the other ranks begin with nothing. A rank that existed
    before keeps its random state, a new rank gets a random state of its own.

    Args:
        ranks: the parts of the ranks that saved; of each share as many as it had slices.
        rank: the new rank.
        world_size: the number of ranks now.
        metrics: the module's torchmetrics objects by path.
        slices: the number of slices of a share.
    """
    first = ranks[0]
    mine = {**first, "rng": rng_states_of([part["rng"] for part in ranks[::slices]], rank)}
    slots = _merged_slots(ranks)
    mine["results"] = {**first["results"], "slots": slots if rank == 0 else _emptied(slots)}
    mine["metric_objects"] = {
        name: _merged_metric(name, metrics[name], [r["metric_objects"][name] for r in ranks] if rank == 0 else [])
        for name in first["metric_objects"]
        if name in metrics
    }
    gradients: dict[str, Tensor] = {}
    for part in ranks if rank == 0 else ():
        for name, gradient in part.get("gradients", {}).items():
            gradients[name] = gradients[name] + gradient if name in gradients else gradient
    # without weights each rank's gradient counts 1 / ranks in the mean that a backward pass makes over them
    weights = [part.get("weights", {}) for part in ranks]
    factor = 1.0 if weights[0] else world_size * slices / len(ranks)
    mine["gradients"] = {name: g * factor for name, g in gradients.items()}
    if weights[0]:
        sums = {key: sum(part[key] for part in weights) if rank == 0 else 0 for key in ("total", "count")}
        mine["weights"] = {**weights[0], **sums}
    return mine


def in_slices(part: dict[str, Any], before: int, now: int, index: int) -> dict[str, Any]:
    """A share's part, for one of the slices of it; the first one takes over what was logged and accumulated.

    Args:
        part: the part, which :func:`part_of_rank` returned.
        before: the number of slices whose samples were counted in the weights of means: each counts all of them.
        now: the number of slices.
        index: which of them the part is for.
    """
    results, weights, factor = part["results"], part.get("weights", {}), now / before
    if index:
        slots = _emptied(results["slots"])
        part = {**part, "metric_objects": {n: _merged_metric(n, None, []) for n in part["metric_objects"]}}
        part = {**part, "weights": {**weights, "total": 0, "count": 0} if weights else weights}
    else:
        slots = [_weighing(entry, factor) if _reduction(entry) == "mean" else entry for entry in results["slots"]]
    return {**part, "results": {**results, "slots": slots}}


def _weighing(entry: dict[str, Any], factor: float) -> dict[str, Any]:
    """A mean of which each value weighs so many times what it did."""
    total = entry["total"]
    scaled = {"weight": entry["weight"] * factor, "weights": [weight * factor for weight in entry["weights"]]}
    return {**entry, **scaled, "total": None if total is None else total * factor}


def without_sums(part: dict[str, Any]) -> dict[str, Any]:
    """A rank's part without what only rank 0 needs of it, which takes over all that was accumulated."""
    return {**part, "gradients": {}, "metric_objects": dict.fromkeys(part["metric_objects"])}


def _merged_slots(ranks: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    merged: dict[Any, dict[str, Any]] = {}
    counts: dict[Any, int] = {}
    for part in ranks:
        for entry in part["results"]["slots"]:
            key = tuple(entry["key"])
            known = merged.get(key)
            if known is None or not known["has_value"]:
                merged[key], counts[key] = dict(entry), 1
            elif entry["has_value"]:
                how = _reduction(entry)
                counts[key] += 1
                one, other = known["value"], entry["value"]
                if isinstance(one, int | float | Tensor) and isinstance(other, int | float | Tensor):
                    mean = one + (other - one) / counts[key]
                    known["value"] = mean if how in ("mean", None) else _merged_total(how, one, other)
                for name in ("pending", "weights", "values"):
                    known[name] = [*known[name], *entry[name]]
                known["total"] = _merged_total(how, known["total"], entry["total"])
                known["weight"] += entry["weight"]
                if entry.get("dtype") == torch.float64:
                    known["dtype"] = torch.float64
    return list(merged.values())


def _reduction(entry: Mapping[str, Any]) -> str | None:
    return reduction_named(read_options(entry["options"]).reduce_fx)


def _merged_total(how: str | None, one: Any, other: Any) -> Any:
    if one is None or other is None:
        return other if one is None else one
    if how in ("min", "max"):
        smaller = bool(one < other)
        return one if smaller == (how == "min") else other
    return one + other


def _emptied(slots: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Slots without what counts for the epoch. The last value is kept, for a step that is still to be logged."""

    def nothing(entry: dict[str, Any]) -> dict[str, Any]:
        value = 0.0 if _reduction(entry) == "sum" else entry["value"]
        return {"value": value, "pending": [], "weights": [], "values": [], "total": None, "weight": 0.0}

    return [{**entry, **nothing(entry), "has_value": False} for entry in slots]


def _merged_metric(name: str, metric: Any, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A torchmetrics object's accumulators, reduced as it would reduce them over ranks."""
    merged: dict[str, Any] = {}
    for key in states[0]["states"] if states else ():
        values = [state["states"][key] for state in states]
        reduce: Any = getattr(metric, "_reductions", {}).get(key)
        if all(isinstance(value, list) for value in values):
            merged[key] = [item for value in values for item in value]
        elif getattr(reduce, "__name__", "") in _MERGEABLE:
            merged[key] = reduce(torch.stack(values))
        else:
            rank_zero_warn(
                f"{key!r} of the metric {name!r} cannot be put together from {len(states)} processes: its epoch value"
                " is of the batches from here on."
            )
            return {"states": {}, "update_count": 0}
    return {"states": merged, "update_count": sum(state["update_count"] for state in states)}
