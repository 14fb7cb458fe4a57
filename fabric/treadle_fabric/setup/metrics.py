"""The states of torchmetrics objects, gathered over ranks that had different numbers of batches.

A torchmetrics object gathers its states over the ranks when it is computed: tensor by tensor, and element by element
where a state is a list, so that ranks with lists of different lengths wait for one another for ever. From the set-up of
a run with several ranks on, all states of an object travel in one message from each rank, and are reduced as the object
says. This holds for every object of the class, whoever holds it: a module, a callback, another metric, a dictionary.

Torchmetrics is never imported here. Its classes are recognized by their methods, among the submodules of what is set
up, and by their name where the user has imported torchmetrics.
"""

from __future__ import annotations

import functools
import sys
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module

from treadle_fabric.batches import map_tensors, move_data_to_device
from treadle_fabric.coordination import all_gather_objects
from treadle_fabric.errors import MisconfigurationException
from treadle_fabric.rank_zero import rank_zero_warn
from treadle_fabric.strategies import Strategy

__all__ = ["compute_alone", "forget_computed", "gather_metrics"]

_METHODS = {"sync", "unsync", "_sync_dist", "add_state"}  # of the base class, in all releases since 0.11
_NEUTRAL = {"dim_zero_sum", "dim_zero_max", "dim_zero_min", "dim_zero_mean"}
"""Reductions to which a rank without any update adds nothing."""
_NOT_UPDATED = r"The ``compute`` method of metric \w+ was called before the ``update`` method"

_strategy: Callable[[], Strategy | None] = lambda: None  # noqa: E731
"""The strategy that was set up last, while it lives."""
_alone = False


def gather_metrics(strategy: Strategy, *modules: Module) -> None:
    """Have all torchmetrics objects gather their states so that any numbers of batches on the ranks are right.

    It changes nothing where one process runs, nothing for objects with a ``dist_sync_fn`` of the user's, and nothing
    for classes of the user's that override ``_sync_dist``.

    Args:
        strategy: Whose ranks gather.
        *modules: Modules in which objects of other libraries like torchmetrics are looked for.
    """
    global _strategy
    if strategy.world_size == 1:
        return
    _strategy = weakref.ref(strategy)
    kinds = {type(each) for module in modules for each in module.modules()}
    kinds.add(getattr(sys.modules.get("torchmetrics"), "Metric", Module))
    for base in {found for kind in kinds if (found := _base_of_metrics(kind)) is not None}:
        if not hasattr(base.sync, "_gathers_together"):
            base.sync = _gathering(base, base.sync)
            # true of a rank without samples, and no fault there; where it is true of all ranks, they say so
            warnings.filterwarnings("ignore", message=_NOT_UPDATED)


def compute_alone(metric: Any) -> Any:
    """Compute a torchmetrics object of this rank's values alone, without the other ranks.

    Args:
        metric: A torchmetrics object, or one that behaves like it; it keeps nothing of the result.

    Returns:
        What its ``compute`` returns.
    """
    global _alone
    before, _alone = _alone, True
    syncs = getattr(metric, "_to_sync", False)
    metric._to_sync = False
    try:
        forget_computed(metric)
        return metric.compute()
    finally:
        _alone, metric._to_sync = before, syncs
        forget_computed(metric)


def forget_computed(metric: Any) -> None:
    """Have a torchmetrics object compute anew: it keeps results, also one of this rank alone, or of other samples."""
    for part in metric.modules() if isinstance(metric, Module) else [metric]:
        if getattr(part, "_computed", None) is not None:
            part._computed = None


def _base_of_metrics(kind: type) -> Any:
    """The class that a kind of metric has its gathering from; None for other classes."""
    return next((base for base in reversed(kind.__mro__) if base.__dict__.keys() >= _METHODS), None)


def _gathering(base: type, own: Callable[..., None]) -> Callable[..., None]:
    """The method ``sync`` of torchmetrics' base class, with another way to gather."""

    @functools.wraps(own)
    def sync(self: Any, dist_sync_fn: Any = None, *args: Any, **kwargs: Any) -> None:
        if _alone:
            return
        strategy = _strategy()
        if dist_sync_fn is not None or strategy is None or not _gathers_as_its_base(type(self), base):
            own(self, dist_sync_fn, *args, **kwargs)
            return
        # The object's own method sees to all else. An attribute that is there only now is in no copy and no file.
        self.__dict__["_sync_dist"] = functools.partial(_gather, self, strategy)
        try:
            own(self, dist_sync_fn, *args, **kwargs)
        finally:
            del self.__dict__["_sync_dist"]

    sync._gathers_together = True  # type: ignore[attr-defined]
    return sync


def _gathers_as_its_base(kind: type, base: type) -> bool:
    """Whether the library wrote how this kind gathers; a class of the user's that overrides that gathers by itself."""
    owner = next(each for each in kind.__mro__ if "_sync_dist" in each.__dict__)
    return owner.__module__.partition(".")[0] == base.__module__.partition(".")[0]


class _Part(NamedTuple):
    """What one rank has of an object."""

    states: dict[str, Any]
    updates: int
    untouched: bool
    """Whether the states are as after a reset."""
    share: int
    """Which share of the samples, or slice of that, the rank has. Of ranks that work together on one, those of the last
    stage of a pipeline have the most updates; elsewhere all have the same states."""


def _gather(metric: Any, strategy: Strategy, dist_sync_fn: Any = None, process_group: Any = None) -> None:
    """Give the object the states of all ranks, reduced; what ``_sync_dist`` of torchmetrics does."""
    reductions = metric._reductions
    if not reductions:  # such as a wrapper, whose inner objects gather
        return
    states, updates = {name: getattr(metric, name) for name in reductions}, int(getattr(metric, "_update_count", 0))
    mine = _Part(states, updates, updates == 0 and all(_is_default(metric, *each) for each in states.items()), 0)
    mine = mine._replace(share=strategy.data_parallel_rank * strategy.num_slices + strategy.slice_index)
    sent = mine._replace(states=map_tensors(dict(states), _to_send))
    group = process_group or metric.process_group
    if group is None:
        parts, rank = all_gather_objects(strategy, sent), strategy.global_rank
    else:
        rank = dist.get_rank(group)
        parts = [sent] * dist.get_world_size(group)
        dist.all_gather_object(parts, sent, group=group)
    parts = [mine if i == rank else _on_device_of(metric, mine, part) for i, part in enumerate(parts)]
    by_share: dict[int, _Part] = {}
    for part in sorted(parts, key=lambda part: -part.updates):
        by_share.setdefault(part.share, part)
    parts = [by_share[share] for share in sorted(by_share)]
    if all(part.untouched for part in parts):
        rank_zero_warn(
            f"The ``compute`` method of metric {type(metric).__name__} was called before the ``update`` method on any"
            " rank: its states are empty."
        )
    for name, reduction in reductions.items():
        setattr(metric, name, _reduced(metric, name, reduction, parts))


def _to_send(tensor: Tensor) -> Tensor:
    """A tensor on the CPU, without the rest of the memory that it is a view of."""
    tensor = tensor.detach().cpu()
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


def _is_default(metric: Any, name: str, value: Any) -> bool:
    default = metric._defaults.get(name)
    if isinstance(default, Tensor) and isinstance(value, Tensor):
        return default.shape == value.shape and bool((default.to(value.device) == value).all())
    return isinstance(value, list) and not value


def _on_device_of(metric: Any, mine: _Part, part: _Part) -> _Part:
    """Another rank's states, where this rank has its own."""

    def device(name: str) -> torch.device:
        own = mine.states[name]
        first = next((each for each in (own if isinstance(own, list) else [own]) if isinstance(each, Tensor)), None)
        if first is None and getattr(metric, "compute_on_cpu", False):
            return torch.device("cpu")
        found: torch.device = getattr(metric, "device", torch.device("cpu")) if first is None else first.device
        return found

    moved = {name: move_data_to_device(value, device(name)) for name, value in part.states.items()}
    return part._replace(states=moved)


def _reduced(metric: Any, name: str, reduction: Any, parts: Sequence[_Part]) -> Any:
    """One state of all ranks, in their order.

    The elements of lists are put into one list. Tensors are stacked along a new first dimension. Ranks without any
    update add nothing to a sum, mean, minimum, maximum or concatenation; where the ranks' tensors themselves are the
    state, or a function of the user's reduces them, those of ranks without any update come last. A mean is weighted by
    the number of updates, so that it is the mean over the updates of all ranks.
    """
    values = [part.states[name] for part in parts]
    busy = [part for part in parts if not part.untouched] or list(parts)
    how = getattr(reduction, "__name__", "")
    if any(isinstance(value, list) for value in values) or how == "dim_zero_cat":
        items = [item for part in busy for item in _as_list(part.states[name])]
        return items if reduction is None or not items else reduction(items)
    if how not in _NEUTRAL:
        busy += [part for part in parts if part.untouched and all(part is not each for each in busy)]
    values = [part.states[name] for part in busy]
    if len({value.shape for value in values}) > 1:
        shapes = ", ".join(str(tuple(value.shape)) for value in values)
        raise MisconfigurationException(
            f"{type(metric).__name__}: the state {name!r} has the shapes {shapes} on different ranks, and only tensors"
            " of one shape can be stacked. Use a list as the state, with dist_reduce_fx='cat' for a concatenation."
        )
    stacked = torch.stack(values)
    counts = [part.updates for part in busy]
    if how == "dim_zero_mean" and len(set(counts)) > 1 and all(counts):
        weights = torch.tensor(counts, device=stacked.device).reshape(-1, *[1] * (stacked.ndim - 1))
        return (stacked * weights).sum(0) / sum(counts)
    return stacked if reduction is None else reduction(stacked)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
