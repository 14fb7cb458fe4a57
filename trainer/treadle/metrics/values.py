"""What can be logged: numbers, tensors, torchmetrics objects, and dictionaries of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from treadle_fabric import MisconfigurationException
from treadle_fabric.loggers import to_numbers

__all__ = ["flatten_metrics", "is_metric", "to_floats"]


def flatten_metrics(dictionary: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The entries of a dictionary, of nested ones joined by ``/``, or of a torchmetrics collection."""
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
    """The same names and floats, in one transfer to the host for every device and dtype among the tensors."""
    return {name: float(value) for name, value in to_numbers(metrics).items()}


def is_metric(value: Any) -> bool:
    """Whether it is a torchmetrics object, or behaves like one."""
    return callable(getattr(value, "compute", None)) and callable(getattr(value, "reset", None))


def step_value(metric: Any) -> Any:
    """What a torchmetrics object computed of the last batch; of all so far where it was only updated."""
    cached = getattr(metric, "_forward_cache", None)
    return metric.compute() if cached is None else cached
