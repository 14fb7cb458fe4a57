"""Turn metrics into the names and Python numbers that a logger writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from treadle_fabric.errors import MisconfigurationException

__all__ = ["add_prefix", "check_scalars", "flat", "to_numbers"]


def add_prefix(metrics: Mapping[str, Any], prefix: str, separator: str) -> Mapping[str, Any]:
    """Return the metrics under the names ``prefix + separator + name``; unchanged without a prefix."""
    return {f"{prefix}{separator}{name}": value for name, value in metrics.items()} if prefix else metrics


def flat(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Give the values in nested mappings the names ``outer/inner``."""
    result: dict[str, Any] = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            result.update({f"{name}/{key}": inner for key, inner in flat(value).items()})
        else:
            result[name] = value
    return result


def check_scalars(metrics: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the metrics as they are; no tensor is read.

    Raises:
        MisconfigurationException: A tensor has more or less than one element.
    """
    for name, value in metrics.items():
        if isinstance(value, Tensor) and value.numel() != 1:
            raise MisconfigurationException(
                f"The metric {name!r} has shape {tuple(value.shape)}, and a metric is one number. "
                f"Log a reduction of it, such as its mean()."
            )
        if isinstance(value, Mapping):
            check_scalars(value)
    return metrics


def to_numbers(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Turn every tensor into a Python number, in one transfer for each device and dtype.

    Other values, and the order of the names, stay the same.

    Raises:
        MisconfigurationException: A tensor has more or less than one element.
    """
    numbers = dict(check_scalars(metrics))
    remote: dict[tuple[torch.device, torch.dtype], list[str]] = {}
    for name, value in metrics.items():
        if isinstance(value, Tensor):
            if value.device.type == "cpu":
                numbers[name] = value.item()
            else:
                remote.setdefault((value.device, value.dtype), []).append(name)
        elif isinstance(value, Mapping):
            numbers[name] = to_numbers(value)
    for names in remote.values():
        stacked = torch.stack([metrics[name].detach().reshape(()) for name in names])
        numbers.update(zip(names, map(float, stacked.tolist())))
    return numbers
