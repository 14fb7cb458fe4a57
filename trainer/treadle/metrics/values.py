"""Values that can be logged: numbers, tensors, torchmetrics objects, and dictionaries of these."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from treadle_fabric import MisconfigurationException, move_data_to_device, with_plain_names
from treadle_fabric.checkpoint import is_sharded_tensor
from treadle_fabric.loggers import to_numbers

__all__ = [
    "flatten_metrics",
    "is_at_hand",
    "is_metric",
    "metrics_by_path",
    "scalar_on",
    "to_floats",
    "vector_on",
    "whole",
]

_DEEPEST, _LONGEST = 3, 1000  # containers in containers, and entries, among which metrics are looked for


def flatten_metrics(dictionary: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the entries of a dictionary or a torchmetrics collection; nested names are joined by ``/``."""
    if hasattr(dictionary, "compute_groups"):
        items: Iterable[tuple[Any, Any]] = dictionary.items(keep_base=False, copy_state=False)
    elif isinstance(dictionary, Mapping):
        items = dictionary.items()
    else:
        raise MisconfigurationException(
            f"log_dict got {type(dictionary).__name__}; it takes a dictionary of names and values: use `self.log` for"
            " one value."
        )
    for name, value in items:
        if isinstance(value, Mapping) or hasattr(value, "compute_groups"):
            yield from flatten_metrics(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value


def to_floats(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Turn metrics into floats, in one transfer to the host for every device and dtype among the tensors."""
    return {name: float(value) for name, value in to_numbers(metrics).items()}


def is_metric(value: Any) -> bool:
    """Return whether a value is a torchmetrics object, or behaves like one."""
    kind = value if isinstance(value, Module) else type(value)  # a mock has any attribute, and its class has not
    return callable(getattr(kind, "compute", None)) and callable(getattr(kind, "reset", None))


def step_value(metric: Any, compute: Callable[[Any], Any]) -> Any:
    """Return what a torchmetrics object computed of the last batch, or of all so far if it was only updated.

    Args:
        metric: the object.
        compute: computes it, of the values of all ranks or of this rank alone.
    """
    cached = getattr(metric, "_forward_cache", None)
    return compute(metric) if cached is None else cached


def metrics_by_path(module: Module, callbacks: Sequence[Any]) -> dict[str, Any]:
    """Return the torchmetrics objects of a run by names that are the same on all ranks.

    Args:
        module: its submodules are searched, and the lists, tuples and dictionaries that are attributes of them.
        callbacks: their attributes are searched likewise.
    """
    found = {name: each for name, each in with_plain_names(module, module.named_modules()) if is_metric(each)}
    owners = [(name, each) for name, each in module.named_modules() if not is_metric(each)]
    owners += [(f"callback {i} {type(each).__qualname__}", each) for i, each in enumerate(callbacks)]
    known = {id(each) for each in found.values()}
    for owner, holder in owners:
        for attribute, value in vars(holder).items():
            for name, each in _held(attribute, value):
                if is_metric(each) and id(each) not in known:
                    found[f"{owner}: {name}"] = each
                    known.add(id(each))
    return found


def _held(name: str, value: Any, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Yield a value, or what the containers in it hold, with a name for each; long containers hold samples instead."""
    if name in ("_modules", "_parameters", "_buffers"):
        return
    if hasattr(type(value), "compute_groups"):  # an object of another kind, a mock say, may have any attribute
        for key, each in value.items(keep_base=True, copy_state=False):
            yield from _held(f"{name}.{key}", each, depth)
    elif isinstance(value, Module):
        yield from ((f"{name}.{inner}" if inner else name, each) for inner, each in value.named_modules())
    elif isinstance(value, dict | list | tuple):
        if depth < _DEEPEST and len(value) <= _LONGEST:
            for key, each in value.items() if isinstance(value, dict) else enumerate(value):
                yield from _held(f"{name}[{key!r}]", each, depth + 1)
    else:
        yield name, value


def is_at_hand(value: Any) -> bool:
    """Return whether reading the value as a Python number, which is as exact as float64, waits for no device."""
    return not isinstance(value, Tensor) or (value.is_cpu and not value.requires_grad and not value.is_complex())


def whole(value: Tensor) -> Tensor:
    """Return the whole of a tensor that is shared out over ranks (a DTensor): each of these ranks calls this."""
    sharded: Any = value if is_sharded_tensor(value) else None
    return value if sharded is None else sharded.full_tensor()


def scalar_on(value: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a scalar on a device that nobody waits for: a number of the host goes there as an operation's argument."""
    if isinstance(value, Tensor) and (value.device == device or not is_at_hand(value)):
        return value.to(device, dtype, non_blocking=device.type not in ("cpu", "mps")).reshape(())
    return torch.full((), value.item() if isinstance(value, Tensor) else value, dtype=dtype, device=device)


def vector_on(numbers: list[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return numbers as a vector on a device; the copy does not wait for what is queued there."""
    vector: Tensor = move_data_to_device(torch.tensor(numbers, dtype=dtype, device="cpu"), device)
    return vector
