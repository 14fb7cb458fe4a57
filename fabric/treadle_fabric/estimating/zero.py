"""What DeepSpeed's ZeRO adds and takes away: arithmetic, because its engine runs on tensors with values only."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from math import ceil
from typing import Any, Final, NamedTuple

from treadle_fabric.estimating.collectives import wire_bytes
from treadle_fabric.estimating.results import Estimate, Traffic
from treadle_fabric.precision.deepspeed import DeepSpeedPrecision

__all__ = ["Sizes", "Zero", "precision_alone", "share_out", "zero_of"]

NOTE: Final = (
    "DeepSpeed: by the arithmetic of its ZeRO, from a step on one device: one parameter group, in the stages 1 and 2"
    " with one bucket of gradients; what it keeps for a short time is of the sizes of its config."
)
_BUCKET: Final = 500_000_000  # numbers: DeepSpeed's default of reduce_bucket_size
_PERSISTENT: Final = 100_000  # numbers: DeepSpeed's default of stage3_param_persistence_threshold
_REUSED: Final = 1_000_000_000  # numbers: DeepSpeed's default of stage3_max_reuse_distance
_PREFETCHED: Final = 50_000_000  # numbers: DeepSpeed's default of stage3_prefetch_bucket_size
_ALIGNMENT: Final = 2  # the stages 1 and 2 make the parts of a flat parameter a multiple of so many numbers
_SINGLE: Final = 4  # bytes of a number of the copies that the optimizer steps, in every precision


class Zero(NamedTuple):
    """What of a DeepSpeed config decides about memory."""

    stage: int
    offload_optimizer: bool = False
    offload_parameters: bool = False
    bucket: int = _BUCKET
    """The numbers of the buffer in which gradients are reduced."""
    persistent: int = _PERSISTENT
    """Parameters of at most so many numbers stay gathered in stage 3."""
    reused: int = _REUSED
    """Parameters stay gathered in stage 3 that are used again after at most so many numbers of others."""


class Sizes(NamedTuple):
    """The parameters of a model, in order."""

    trained: tuple[int, ...]
    """The numbers of each that is trained."""
    frozen: tuple[int, ...]
    """The numbers of each that is not."""
    largest: int
    """The bytes of the largest set of parameters that is gathered at a time in stage 3."""


class _Shares(NamedTuple):
    """The bytes that a rank has."""

    parameters: int
    gradients: int
    state: int


def zero_of(strategy: Any) -> Zero | None:
    """The ZeRO settings of a strategy, by its config; None where it is another one."""
    config = getattr(strategy, "config", None)
    if not isinstance(config, Mapping) or not type(strategy).__name__.startswith("DeepSpeed"):
        return None
    zero = config.get("zero_optimization", {})
    return Zero(
        int(zero.get("stage", 0)),
        _is_given(zero.get("offload_optimizer")),
        _is_given(zero.get("offload_param")),
        _number(zero.get("reduce_bucket_size"), _BUCKET),
        _number(zero.get("stage3_param_persistence_threshold"), _PERSISTENT),
        max(
            _number(zero.get("stage3_max_reuse_distance"), _REUSED),
            _number(zero.get("stage3_prefetch_bucket_size"), _PREFETCHED),
        ),
    )


def precision_alone(name: str) -> str:
    """The precision of one device in which memory is as under DeepSpeed, which casts the weights in mixed ones, too."""
    return DeepSpeedPrecision(name).precision.replace("mixed", "true")


def share_out(
    alone: Estimate, zero: Zero, name: str, precision: str, world_size: int, num_nodes: int, sizes: Sizes
) -> Estimate:
    """Make an estimate under ZeRO of one on a single device.

    Stage 1 shares out the optimizer's state, with a copy of the parameters in single precision that the optimizer
    steps (in every precision); stage 2 the gradients, too; stage 3 the parameters as well. The parts are those of
    DeepSpeed 0.19.

    Args:
        alone: Of the model on one device.
        zero: The settings.
        name: The strategy's.
        precision: The name of the run's precision.
        world_size: The number of ranks.
        num_nodes: The number of machines.
        sizes: Of the parameters.
    """
    memory, n = alone.memory, world_size
    whole, width = memory.parameters, max(1, round(memory.parameters / max(alone.parameters, 1)))
    shares = _shares(zero, memory.optimizer_state, width, n, sizes)
    communication = zero.bucket * width if n > 1 and zero.stage else 0
    if zero.stage == 3:
        used = 2 * sizes.largest  # what is used, and what is fetched meanwhile
        communication += min(max(used, zero.reused // 2 * width), whole)  # the backward pass begins with the last
    # on one device the activations have gradients that are not reduced yet beside them
    parts = {
        "parameters": 0 if zero.offload_parameters else shares.parameters,
        "buffers": memory.buffers,
        "gradients": 0 if zero.offload_optimizer else shares.gradients,
        "optimizer_state": 0 if zero.offload_optimizer else shares.state,
        "inputs": memory.inputs,
        "communication": communication,
        "activations": memory.activations,
    }
    return dataclasses.replace(
        alone,
        strategy=name,
        precision=precision,
        world_size=world_size,
        num_nodes=num_nodes,
        memory=dataclasses.replace(
            memory,
            parameters=shares.parameters,
            gradients=shares.gradients,
            optimizer_state=shares.state,
            communication=communication,
            peak=sum(parts.values()),
            peak_parts=parts,
            peak_phase="backward",
            host=sum(shares) - sum(parts[each] for each in ("parameters", "gradients", "optimizer_state")),
        ),
        traffic=_traffic(zero, width, n, num_nodes, sizes),
        notes=(*alone.notes, NOTE),
    )


def _shares(zero: Zero, state: int, width: int, ranks: int, sizes: Sizes) -> _Shares:
    trained, frozen = sum(sizes.trained), sum(sizes.frozen)
    if zero.stage == 0:
        return _Shares((trained + frozen) * width, trained * width, _state_of(state, trained, width, trained, width))
    if zero.stage == 3:
        own = [ceil(count / ranks) for count in (*sizes.trained, *sizes.frozen)]
        kept = [part * ranks for part in own if part * ranks <= zero.persistent] if ranks > 1 else []
        part = sum(own[: len(sizes.trained)])
        stepped = _state_of(state, trained, width, part, _SINGLE) + part * _SINGLE
        return _Shares((sum(own) + sum(kept)) * width, part * width, stepped)
    flat = _flat(sizes, ranks)
    part = flat // ranks
    gradients = trained
    if zero.stage == 2:  # of each parameter that has a number in the first rank's part
        gradients, counts = 0, iter(sizes.trained)
        while gradients < min(part, trained):
            gradients += next(counts)
    stepped = _state_of(state, trained, width, part, _SINGLE) + part * _SINGLE
    return _Shares((flat + frozen) * width, gradients * width, stepped)


def _state_of(state: int, trained: int, width: int, part: int, wide: int) -> int:
    """The bytes of an optimizer's state for a flat part of the parameters.

    Args:
        state: For all parameters, one by one.
        trained: Their numbers.
        width: The bytes of a number.
        part: The numbers of the part.
        wide: The bytes of a number in it.
    """
    tensors, rest = divmod(state, max(trained * width, 1))
    if not tensors:  # less than a number for each
        return ceil(state * part * wide / max(trained * width, 1))
    return tensors * part * wide + (_SINGLE if rest else 0)  # the number of steps


def _flat(sizes: Sizes, ranks: int) -> int:
    """The numbers of the flat parameter of the stages 1 and 2, with what makes its parts equal."""
    unit = _ALIGNMENT * ranks
    return ceil(sum(sizes.trained) / unit) * unit


def _traffic(zero: Zero, width: int, ranks: int, num_nodes: int, sizes: Sizes) -> dict[str, Traffic]:
    """Gradients are reduced once; parameters are gathered after the step, or before forward and backward (stage 3)."""
    if ranks == 1:
        return {}
    trained = sum(sizes.trained) * width
    calls = max(1, ceil(sum(sizes.trained) / max(zero.bucket, 1)))
    if zero.stage == 3:
        gathered = [ceil(count / ranks) * ranks for count in (*sizes.trained, *sizes.frozen)]
        fetched = sum(count for count in gathered if count > zero.persistent) * width
        kept = sum(count for count in gathered if count <= zero.persistent) * width
        reduced = sum(gathered[: len(sizes.trained)]) * width
        again = max(0, fetched - zero.reused // 2 * width)  # those that the backward pass comes to too late
        messages = {"all_gather": (fetched + again + kept, 2 * calls), "reduce_scatter": (reduced, calls)}
    else:
        messages = {"all_reduce": (trained, calls)}
        if zero.stage:
            messages["all_gather"] = (_flat(sizes, ranks) * width, 1)
    found = {}
    for kind, (payload, times) in messages.items():
        sent = round(wire_bytes(kind, payload, ranks))
        found[kind] = Traffic(times, payload, sent, sent if num_nodes > 1 else 0)
    return found


def _number(given: Any, default: int) -> int:
    return int(given) if isinstance(given, int | float) else default


def _is_given(offload: Any) -> bool:
    return isinstance(offload, Mapping) and offload.get("device", "none") != "none"
