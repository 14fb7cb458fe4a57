"""Values that can be logged: numbers, tensors, torchmetrics objects, and dictionaries of these."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from treadle_fabric import MisconfigurationException
from treadle_fabric.loggers import to_numbers

__all__ = ["flatten_metrics", "is_metric", "to_floats"]


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
    return callable(getattr(value, "compute", None)) and callable(getattr(value, "reset", None))


def step_value(metric: Any) -> Any:
    """Return what a torchmetrics object computed of the last batch, or of all so far if it was only updated."""
    cached = getattr(metric, "_forward_cache", None)
    return metric.compute() if cached is None else cached
