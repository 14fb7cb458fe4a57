"""What a checkpoint keeps so that a resumed run goes on to the last bit.

That is, of each rank: its random state, the position in the data, the gradients of an accumulation that is going on,
and what was logged but not reduced yet.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from treadle.checkpoint.elastic import in_slices, part_of_rank, without_sums
from treadle.checkpoint.loggers import logger_states
from treadle.data.training import TrainingData
from treadle.run.accumulation import Accumulation, Place, decide
from treadle.run.progress import FitProgress, Phase
from treadle.run.run import ReadyRun, Run
from treadle_fabric import (
    CheckpointMismatchError,
    Fabric,
    Strategy,
    all_gather_objects,
    name_in,
    plain_name,
    rank_zero_info,
    rank_zero_warn,
    with_plain_names,
)
from treadle_fabric.checkpoint import PerRank, fingerprint, is_sharded_tensor, placed_like
from treadle_fabric.data import one_of_each, shares_of_ranks
from treadle_fabric.randomness import as_own_rng_states, own_rng_states, set_rng_states
from treadle_fabric.strategies import as_part, from_part, is_elsewhere, stand_in

__all__ = [
    "capture_exact",
    "capture_loggers",
    "keep_own_part",
    "moment",
    "restore_exact",
    "restore_metrics",
    "write_left",
]


def capture_exact(run: ReadyRun, data: TrainingData | None) -> dict[str, Any]:
    """This rank's state, for a checkpoint that holds the states of all ranks; every rank calls this function.

    Args:
        run: the run.
        data: the training batches.

    Returns:
        ``ranks``: this rank's part in tensors and plain containers, marked as :class:`PerRank`; in the middle of an
        accumulation it has gradients, too. ``accumulated``: the place of the next batch in its accumulation, and
        whether the gradients before it were lost, because they had a part of its own.
        ``unwritten``: values of an epoch that ends, which no logger has yet. ``gradients``: where ranks hold parts of
        them. ``shares``: which share of the samples each rank has, where ranks work together on one.
    """
    module, progress = run.module, run.progress
    if progress.epoch_ended:
        run.metrics.keep(run.results)  # the slots in which they would be looked up are gone in the next epoch
    validating = dict(run.before_validation) if progress.phase is Phase.LOGGED else {}
    validating.pop("loggers", None)
    mine: dict[str, Any] = {
        **(validating or moment(run)),
        "data": data.epochs.state_dict(progress.batch) if data is not None else {},
        "results": run.results.state_dict(),
        "metrics": run.metrics.state_dict(),
        "weights": run.loss.state_dict(),
    }
    done, window, _ = progress.accumulation.place(progress.batch, data.stop if data is not None else math.inf)
    done = 0 if progress.is_last_batch and not progress.within_batch else done
    gradients: dict[str, Tensor] = {}
    if done or not module.automatic_optimization:
        if done:
            run.fabric.strategy.settle_gradients(run.engine)
        named = with_plain_names(module, module.named_parameters())
        # of a parameter that is on another rank alone, that rank has the gradient
        held = ((n, p, stand_in(p) if is_elsewhere(p) else p.grad) for n, p in named)
        gradients = {n: as_part(p, gradient.detach()) for n, p, gradient in held if gradient is not None}
    fabric = run.fabric
    shared: dict[str, Any] = {"accumulated": {"done": done, "window": window}}
    if done and run.fabric.strategy.reduce_boolean_decision(progress.within_backward, all=False):
        shared["accumulated"]["mixed"], gradients = True, {}  # on some ranks, with a part of the current batch's
    if done and (layout := run.fabric.strategy.gradient_layout):
        shared["accumulated"]["layout"] = layout
    if progress.epoch_ended:
        shared["unwritten"] = dict(run.unwritten)
    if fabric.strategy.shards_parameters:
        shared["gradients"] = gradients  # each rank holds a part of what is one gradient, averaged over the ranks
    else:
        mine["gradients"] = gradients
    if fabric.world_size == 1 and (state := fabric.strategy.engine_state()):
        mine["engine"] = state
    if fabric.world_size > 1:
        buffers = _buffers(module)
        prints = {name: fingerprint(buffer) for name, buffer in buffers.items()}
        saved = fabric.broadcast(prints)  # the state dict has rank 0's buffers
        mine["buffers"] = {name: b for name, b in buffers.items() if prints[name] != saved.get(name, prints[name])}
        mine["engine"] = fabric.strategy.engine_state()
    if fabric.strategy.data_parallel_size < fabric.world_size:
        shared["shares"] = shares_of_ranks(fabric.strategy)
    if (stages := fabric.strategy.pipeline_stages) > 1:
        shared["stages"] = stages
    if (slices := fabric.strategy.num_slices) > 1:
        shared["slices"] = {"number": slices, "of_ranks": all_gather_objects(fabric, fabric.strategy.slice_index)}
    return {"ranks": PerRank(mine), **shared}


def capture_loggers(run: ReadyRun) -> dict[str, Any]:
    """Write what the loggers hold, and give for a checkpoint which runs they write, and how far; empty but on rank 0.

    A run resumed from the middle of a validation begins that validation anew, and so do its loggers.
    """
    if run.progress.phase is Phase.LOGGED and "loggers" in run.before_validation:
        found: dict[str, Any] = run.before_validation["loggers"]
        return found
    return logger_states(run.loggers) if run.fabric.is_global_zero else {}


def moment(run: Run) -> dict[str, Any]:
    """The part of the state that validation changes: random state, torchmetrics objects, batches validated on."""
    collections, metrics = run.metric_objects
    for collection in collections:  # only here do members of a group get their shared state
        deque(collection.items(keep_base=True, copy_state=False), maxlen=0)
    return {
        "rng": own_rng_states(),
        "validated": dict(run.validated),
        "metric_objects": {n: _metric_state(m) for n, m in metrics.items()},
    }


def keep_own_part(saved: dict[str, Any], strategy: Strategy) -> dict[str, Any]:
    """What a rank keeps of the exact state in a checkpoint, until :func:`restore_exact` or another save.

    Every rank calls this. Ranks that work together on a share of the samples have copies of one state.

    Args:
        saved: the ``treadle`` entry of the checkpoint; of a folder it is best loaded with ``parts_on_demand``.
        strategy: of this run.

    Returns:
        ``saved`` with this rank's part as ``ranks``, marked as it was when it was saved; where another number of
        shares, or of slices of each, was saved, with the list of what this rank needs of the parts of all.
    """
    parts = saved.get("ranks")
    if not parts:
        return saved
    before, now = saved.get("shares") or list(range(len(parts))), shares_of_ranks(strategy)
    rank, share = strategy.global_rank, strategy.data_parallel_rank
    kept = {key: value for key, value in saved.items() if key not in ("ranks", "shares", "stages", "slices")}
    slices = saved.get("slices", {"number": 1, "of_ranks": [0] * len(parts)})
    number = slices["number"]
    if set(before) != set(now) or number != strategy.num_slices:
        of_ranks = [part * number + index for part, index in zip(before, slices["of_ranks"], strict=True)]
        needed = one_of_each(parts, of_ranks)
        return {**kept, "slices": number, "ranks": needed if share == 0 else [without_sums(part) for part in needed]}
    alike = before == now and saved.get("stages", 1) == strategy.pipeline_stages
    if not alike:
        rank = max(
            r for r, index in enumerate(slices["of_ranks"]) if (before[r], index) == (share, strategy.slice_index)
        )
    mine = parts[rank]
    if len(set(now)) < len(now):
        kept["shares"] = now
    if strategy.pipeline_stages > 1:
        kept["stages"] = strategy.pipeline_stages
    if number > 1:
        kept["slices"] = slices
    return {**kept, "ranks": PerRank(mine)}


def restore_exact(run: ReadyRun, saved: dict[str, Any], data: TrainingData, *, accumulate: int) -> None:
    """Put back what :func:`keep_own_part` kept; the random state last, so that the next batch is the next to draw.

    Args:
        run: the run.
        saved: what was kept.
        data: the training batches.
        accumulate: batches of an accumulation now, which need not be the number that the checkpoint was saved with.
    """
    ranks = saved.get("ranks")
    if not ranks:
        return
    fabric, module = run.fabric, run.module
    _check_layout(saved.get("accumulated", {}), fabric.strategy)
    metrics, progress = run.metric_objects[1], run.progress
    elsewhere, begins = not isinstance(ranks, PerRank), not progress.begun
    shares = fabric.strategy.data_parallel_size
    saved_by = len(ranks) // saved["slices"] if elsewhere else shares
    mine = _part_of_rank(run, ranks, saved["slices"]) if elsewhere else ranks.value
    gradients = saved.get("gradients") or mine.get("gradients", {})
    ended = progress.is_last_batch or begins  # nothing is left of the epoch but the end of its last batch
    batch = progress.batch
    resumed = data.epochs.resume(mine["data"], saved_by, batch, begun=progress.begun, ended=ended)
    progress.batch, factor = resumed.batch or 0, 1.0
    mixed = (saved.get("accumulated") or {}).get("mixed", False)
    if resumed.batch is None or mixed:
        if mixed:
            _tell_of_lost(progress.batch, saved["accumulated"])
        begins, gradients = begins or resumed.batch is None, {}
        progress.accumulation = Accumulation(accumulate, progress.batch)
        mine["weights"] = {**mine["weights"], "total": 0, "count": 0} if mine.get("weights") else {}
    elif not ended:
        factor = _go_on_accumulating(progress, saved.get("accumulated"), batch, resumed.size, accumulate, data.stop)
        if mine.get("weights"):  # those are divided where the optimizer steps, by the weights of all ranks
            factor = saved_by / shares if saved.get("gradients") else 1.0
    if elsewhere and not begins:
        rank_zero_info(
            f"Number of processes that share the samples: {shares}, in the checkpoint: {saved_by}. The order of the"
            " samples goes on where it was."
        )
    run.results.load_state_dict(mine["results"], metrics)
    restore_metrics(run, mine["metric_objects"])
    if begins:
        _write_ended(run, saved)
        run.results.reset()  # the epoch is over, and with it what was logged
    parameters = dict(module.named_parameters())
    if fabric.strategy.shards_parameters and "gradients" not in saved:
        named = with_plain_names(module, parameters.items())
        gradients = _means(fabric, gradients, {name: p.shape for name, p in named})
    for name, gradient in gradients.items():
        parameter = parameters[name_in(module, name)]
        if not parameter.is_meta and not gradient.is_meta:
            gradient = from_part(parameter, gradient if factor == 1.0 else gradient * factor)
            parameter.grad = placed_like(gradient, parameter)
    run.loss.load_state_dict(mine.get("weights", {}))
    buffers = _buffers(module)
    for name, buffer in mine.get("buffers", {}).items():
        if (here := buffers.get(plain_name(module, name_in(module, name)))) is not None:
            here.copy_(buffer)
    fabric.strategy.load_engine_state(mine.get("engine", {}))
    run.validated.update(mine["validated"])
    run.metrics.load_state_dict(mine["metrics"])
    set_rng_states(as_own_rng_states(mine["rng"], fabric.global_rank))


def _check_layout(accumulated: dict[str, Any], strategy: Strategy) -> None:
    """Refuse the gradients of a begun accumulation that an engine keeps in another way now."""
    before, now = accumulated.get("layout", ""), strategy.gradient_layout
    if accumulated.get("done") and before != now:
        raise CheckpointMismatchError(
            f"The checkpoint was saved after {accumulated['done']} of the {accumulated['window']} batches of an"
            f" accumulation, with gradients as {before or 'the parameters have them'}, and this run keeps them as"
            f" {now or 'the parameters have them'}. Go on in the same layout, or from a checkpoint that was saved where"
            " the optimizer steps."
        )


def write_left(run: ReadyRun, saved: dict[str, Any]) -> bool:
    """Write what was logged in an epoch that ended in the checkpoint, where nothing is trained after it.

    Args:
        run: the run.
        saved: what :func:`keep_own_part` kept.

    Returns:
        Whether there was something to write.
    """
    ranks = saved.get("ranks")
    if not ranks or "unwritten" not in saved:
        return False
    metrics = run.metric_objects[1]
    elsewhere = not isinstance(ranks, PerRank)
    mine = _part_of_rank(run, ranks, saved["slices"]) if elsewhere else ranks.value
    run.results.load_state_dict(mine["results"], metrics)
    restore_metrics(run, mine["metric_objects"])
    written = _write_ended(run, saved)
    run.results.reset()
    return written


def _part_of_rank(run: ReadyRun, ranks: list[dict[str, Any]], slices: int) -> dict[str, Any]:
    strategy, metrics = run.fabric.strategy, run.metric_objects[1]
    mine = part_of_rank(ranks, strategy.data_parallel_rank, strategy.data_parallel_size, metrics, slices)
    return in_slices(mine, slices, strategy.num_slices, strategy.slice_index)


def _means(fabric: Fabric, gradients: dict[str, Tensor], shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """The means over the ranks of what each accumulated by itself, for parameters of which a rank has a part."""
    found = {}
    for name in sorted({name for names in all_gather_objects(fabric, list(gradients)) for name in names}):
        mine = gradients.get(name)
        mine = torch.zeros(shapes[name]) if mine is None else mine
        found[name] = fabric.strategy.all_reduce(mine.to(fabric.device), reduce_op="mean")
    return found


def _write_ended(run: ReadyRun, saved: dict[str, Any]) -> bool:
    """Write the values of the epoch that ended in the checkpoint and that no logger had; every rank calls this."""
    unwritten = saved.get("unwritten")
    if unwritten is None:
        return False
    late, _ = run.metrics.close_epoch(run.results, local=unwritten["local"])
    values = {**unwritten["values"], **late}
    run.write(values, max(run.progress.logging_step - 1, 0), epoch=run.progress.epoch - 1)
    return bool(values)


def _tell_of_lost(batch: int, place: Mapping[str, Any]) -> None:
    """Warn of gradients that a checkpoint does not have, because they were those of no whole number of batches."""
    rank_zero_warn(
        f"The checkpoint was saved in the backward pass of batch {batch}, or between that and the end of the batch."
        f" {place['done']:g} batch(es) of the same accumulation came before: their gradients could no longer be told"
        f" from those of this batch, and are left out. An accumulation begins with batch {batch}."
    )


def _go_on_accumulating(
    progress: FitProgress, place: Any, batch: int, size: float, accumulate: int, total: float
) -> float:
    """Go on in the middle of an accumulation, or between two.

    Args:
        progress: gets the accumulations of now, for those of the checkpoint.
        place: the place of the next batch in the checkpoint; None where that does not tell.
        batch: the number of that batch in the checkpoint.
        size: the number of batches of now that have the samples of one batch in the checkpoint.
        accumulate: batches of an accumulation now.
        total: the number of batches of the epoch now.

    Returns:
        What the saved gradients are multiplied by.
    """
    saved = progress.accumulation
    if place is None:
        saved = Accumulation(accumulate)
        done = saved.place(batch, total)
    else:
        done = Place(place["done"], place["window"], False)
    now, factor = decide(saved, done, every=accumulate, batch=progress.batch, size=size, total=total)
    if done.done and now != saved:
        rank_zero_warn(
            f"The checkpoint is of the middle of an accumulation of {saved.every} batches, of which {done.done:g} were"
            f" done. Their gradients are kept: the next optimizer step is the mean over their samples and those of the"
            f" next {now.lacking} batch(es). After that, accumulate_grad_batches={accumulate} and the present batch"
            " size hold."
        )
    progress.accumulation = now
    return factor


def restore_metrics(run: Run, states: dict[str, Any]) -> None:
    """Put back the ``metric_objects`` of a :func:`moment`."""
    metrics = run.metric_objects[1]
    for name, state in states.items():
        if name in metrics:
            _restore_metric(metrics[name], state)


def _buffers(module: Module) -> dict[str, Tensor]:
    """The buffers that a state dict has, but for those of which ranks have parts.

    They differ between ranks until DDP's next forward copies those of rank 0.
    """
    return {
        plain_name(module, f"{prefix}.{name}" if prefix else name): buffer.detach()
        for prefix, part in module.named_modules()
        for name, buffer in part.named_buffers(recurse=False)
        if name not in part._non_persistent_buffers_set and not buffer.is_meta and not is_sharded_tensor(buffer)
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
