"""What a checkpoint keeps so that a resumed run goes on to the last bit.

That is, of each rank: its random state, the position in the data, the gradients of an accumulation that is going on,
and what was logged but not reduced yet.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from treadle.checkpoint.elastic import part_of_rank, without_sums
from treadle.data.training import TrainingData
from treadle.run.progress import Phase
from treadle.run.run import ReadyRun, Run
from treadle_fabric import name_in, plain_name, rank_zero_info, with_plain_names
from treadle_fabric.checkpoint import PerRank, fingerprint, placed_like
from treadle_fabric.randomness import collect_rng_states, set_rng_states

__all__ = ["capture_exact", "keep_own_part", "moment", "restore_exact", "restore_metrics"]


def capture_exact(run: ReadyRun, data: TrainingData | None, *, accumulate: int) -> dict[str, Any]:
    """This rank's state, for a checkpoint that holds the states of all ranks; every rank calls this function.

    Args:
        run: the run.
        data: the training batches.
        accumulate: batches of one optimizer step; between its first and last, gradients are kept too.

    Returns:
        ``ranks``: this rank's part in tensors and plain containers, marked as :class:`PerRank`.
    """
    module = run.module
    if run.progress.epoch_ended:
        run.metrics.keep(run.results)  # the slots in which they would be looked up are gone in the next epoch
    validating = run.before_validation if run.progress.phase is Phase.LOGGED else {}
    mine: dict[str, Any] = {
        **(validating or moment(run)),
        "data": data.epochs.state_dict(run.progress.batch) if data is not None else {},
        "results": run.results.state_dict(),
        "metrics": run.metrics.state_dict(),
        "weights": run.loss.state_dict(),
    }
    within = bool(run.progress.batch % accumulate) and not run.progress.is_last_batch
    gradients: dict[str, Tensor] = {}
    if within or not module.automatic_optimization:
        named = with_plain_names(module, module.named_parameters())
        gradients = {n: p.grad.detach() for n, p in named if p.grad is not None}
    fabric, shared = run.fabric, {}
    if fabric.strategy.shards_parameters:
        shared["gradients"] = gradients  # each rank holds a part of what is one gradient, averaged over the ranks
    else:
        mine["gradients"] = gradients
    if fabric.world_size > 1:
        buffers = _buffers(module)
        prints = {name: fingerprint(buffer) for name, buffer in buffers.items()}
        saved = fabric.broadcast(prints)  # the state dict has rank 0's buffers
        mine["buffers"] = {name: b for name, b in buffers.items() if prints[name] != saved[name]}
        mine["engine"] = fabric.strategy.engine_state()
    return {"ranks": PerRank(mine), **shared}


def moment(run: Run) -> dict[str, Any]:
    """The part of the state that validation changes: random state, torchmetrics objects, batches validated on."""
    collections, metrics = run.metric_objects
    for collection in collections:  # only here do members of a group get their shared state
        deque(collection.items(keep_base=True, copy_state=False), maxlen=0)
    return {
        "rng": collect_rng_states(),
        "validated": dict(run.validated),
        "metric_objects": {n: _metric_state(m) for n, m in metrics.items()},
    }


def keep_own_part(saved: dict[str, Any], rank: int, world_size: int) -> dict[str, Any]:
    """What a rank keeps of the exact state in a checkpoint, until :func:`restore_exact` or another save.

    Args:
        saved: the ``treadle`` entry of the checkpoint; of a folder it is best loaded with ``parts_on_demand``.
        rank: this rank.
        world_size: the number of ranks now.

    Returns:
        ``saved`` with this rank's part as ``ranks``, marked as it was when it was saved; where another number of ranks
        saved, with the list of what this rank needs of all their parts.
    """
    parts = saved.get("ranks")
    if not parts:
        return saved
    if len(parts) == world_size:
        return {**saved, "ranks": PerRank(parts[rank])}
    return {**saved, "ranks": list(parts) if rank == 0 else [without_sums(part) for part in parts]}


def restore_exact(run: ReadyRun, saved: dict[str, Any], data: TrainingData, *, accumulate: int) -> None:
    """Put back what :func:`keep_own_part` kept; the random state last, so that the next batch is the next to draw."""
    ranks = saved.get("ranks")
    if not ranks:
        return
    fabric, module = run.fabric, run.module
    metrics, progress = run.metric_objects[1], run.progress
    elsewhere, begins = not isinstance(ranks, PerRank), not progress.begun
    saved_by = len(ranks) if elsewhere else fabric.world_size
    mine = part_of_rank(ranks, fabric.global_rank, fabric.world_size, metrics) if elsewhere else ranks.value
    gradients = saved.get("gradients") or mine.get("gradients", {})
    ended = progress.is_last_batch or begins  # nothing is left of the epoch but the end of its last batch
    there = data.epochs.resume(
        mine["data"], saved_by, progress.batch, begun=progress.begun, ended=ended, accumulate=accumulate
    )
    if there != progress.batch:
        progress.batch, begins, gradients = there or 0, there is None, {}
        mine["weights"] = {**mine["weights"], "total": 0, "count": 0} if mine.get("weights") else {}
    if elsewhere and not begins:
        rank_zero_info(
            f"Number of processes: {fabric.world_size}, in the checkpoint: {saved_by}. The order of the samples goes on"
            " where it was."
        )
    run.results.load_state_dict(mine["results"], metrics)
    restore_metrics(run, mine["metric_objects"])
    if begins:
        run.results.reset()  # the epoch is over, and with it what was logged
    parameters = dict(module.named_parameters())
    for name, gradient in gradients.items():
        parameter = parameters[name_in(module, name)]
        parameter.grad = placed_like(gradient, parameter)
    run.loss.load_state_dict(mine.get("weights", {}))
    buffers = _buffers(module)
    for name, buffer in mine.get("buffers", {}).items():
        buffers[plain_name(module, name_in(module, name))].copy_(buffer)
    fabric.strategy.load_engine_state(mine.get("engine", {}))
    run.validated.update(mine["validated"])
    run.metrics.load_state_dict(mine["metrics"])
    set_rng_states(mine["rng"])


def restore_metrics(run: Run, states: dict[str, Any]) -> None:
    """Put back the ``metric_objects`` of a :func:`moment`."""
    metrics = run.metric_objects[1]
    for name, state in states.items():
        if name in metrics:
            _restore_metric(metrics[name], state)


def _buffers(module: Module) -> dict[str, Tensor]:
    """The buffers that a state dict has. They differ between ranks until DDP's next forward copies those of rank 0."""
    return {
        plain_name(module, f"{prefix}.{name}" if prefix else name): buffer.detach()
        for prefix, part in module.named_modules()
        for name, buffer in part.named_buffers(recurse=False)
        if name not in part._non_persistent_buffers_set
    }


def _metric_state(metric: Any) -> dict[str, Any]:
    """A torchmetrics object's accumulators, which its own state dict leaves out by default."""
    names = getattr(metric, "_defaults", {})
    return {
        "states": {n: _detached(getattr(metric, n)) for n in names},
        "update_count": getattr(metric, "_update_count", 0),
    }


def _detached(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else [v.detach().clone() for v in value]


def _restore_metric(metric: Any, state: dict[str, Any]) -> None:
    device = getattr(metric, "device", torch.device("cpu"))
    for name, value in state["states"].items():
        setattr(metric, name, value.to(device) if isinstance(value, Tensor) else [v.to(device) for v in value])
    metric._update_count = state["update_count"]
    metric._computed = None
