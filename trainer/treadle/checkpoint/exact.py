"""What a checkpoint keeps so that a resumed run goes on to the last bit: the random state of every rank, where the data
stand, partial gradients, and what was logged but not yet reduced.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from treadle.checkpoint.elastic import part_of_rank
from treadle.data.training import TrainingData
from treadle.run.progress import Phase
from treadle.run.run import Run
from treadle_fabric import rank_zero_info
from treadle_fabric.randomness import collect_rng_states, set_rng_states

__all__ = ["capture_exact", "moment", "restore_exact", "restore_metrics"]


def capture_exact(run: Run, data: TrainingData | None, *, accumulate: int) -> dict[str, Any]:
    """The state of every rank; every rank calls it.

    Args:
        run: the run.
        data: the training batches.
        accumulate: batches of one optimizer step; between its first and last, gradients are kept too.

    Returns:
        ``ranks``: for every rank its part, as tensors and plain containers.
    """
    module = run.module
    if run.progress.epoch_ended:
        run.metrics.keep(run.results)  # else they are looked up in slots that the next epoch does not have
    validating = run.before_validation if run.progress.phase is Phase.LOGGED else {}
    mine: dict[str, Any] = {
        **(validating or moment(run)),
        "data": data.epochs.state_dict(run.progress.batch) if data is not None else {},
        "results": run.results.state_dict(),
        "metrics": run.metrics.state_dict(),
        "weights": run.weights.state_dict(),
    }
    within = bool(run.progress.batch % accumulate) and not run.progress.is_last_batch
    if within or not module.automatic_optimization:
        mine["gradients"] = {n: p.grad.detach() for n, p in module.named_parameters() if p.grad is not None}
    fabric = run.fabric
    if fabric.world_size == 1:
        return {"ranks": [mine]}
    mine |= {"buffers": _buffers(module), "engine": fabric.strategy.engine_state()}
    ranks = [fabric.broadcast(mine, src=r) for r in range(fabric.world_size)]
    first = ranks[0].pop("buffers")  # the state dict has them
    for other in ranks[1:]:
        other["buffers"] = {n: b for n, b in other["buffers"].items() if not torch.equal(b, first[n].to(b.device))}
    return {"ranks": ranks}


def moment(run: Run) -> dict[str, Any]:
    """What validation changes: random state, torchmetrics objects, how many batches were validated on."""
    collections, metrics = run.metric_objects
    for collection in collections:  # only here do members of a group get their shared state
        deque(collection.items(keep_base=True, copy_state=False), maxlen=0)
    return {
        "rng": collect_rng_states(),
        "validated": dict(run.validated),
        "metric_objects": {n: _metric_state(m) for n, m in metrics.items()},
    }


def restore_exact(run: Run, saved: dict[str, Any], data: TrainingData, *, accumulate: int) -> None:
    """Put back this rank's part, the random state last: nothing may draw between here and the next batch."""
    ranks = saved.get("ranks", [])
    if not ranks:
        return
    fabric, module = run.fabric, run.module
    metrics, progress = run.metric_objects[1], run.progress
    elsewhere, begins = len(ranks) != fabric.world_size, not progress.begun
    if elsewhere:
        mine = part_of_rank(ranks, fabric.global_rank, fabric.world_size, metrics)
    else:
        mine = ranks[fabric.global_rank]
    ended = progress.is_last_batch or begins  # nothing is left of the epoch but the end of its last batch
    there = data.epochs.resume(
        mine["data"], len(ranks), progress.batch, begun=progress.begun, ended=ended, accumulate=accumulate
    )
    if there != progress.batch:
        progress.batch, begins, mine["gradients"] = there or 0, there is None, {}
        mine["weights"] = {**mine["weights"], "total": 0, "count": 0} if mine.get("weights") else {}
    if elsewhere and not begins:
        rank_zero_info(
            f"Number of processes: {fabric.world_size}, in the checkpoint: {len(ranks)}. The order of the samples"
            " goes on where it stood."
        )
    run.results.load_state_dict(mine["results"], metrics)
    restore_metrics(run, mine["metric_objects"])
    if begins:
        run.results.reset()  # the epoch is over, and with it what was logged
    parameters = dict(module.named_parameters())
    for name, gradient in mine.get("gradients", {}).items():
        parameters[name].grad = gradient.to(parameters[name].device)
    run.weights.load_state_dict(mine.get("weights", {}))
    buffers = _buffers(module)
    for name, buffer in mine.get("buffers", {}).items():
        buffers[name].copy_(buffer)
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
    """Those that are saved. Each rank has its own until a forward takes over rank 0's, and validates with them."""
    return {
        f"{prefix}.{name}" if prefix else name: buffer.detach()
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
