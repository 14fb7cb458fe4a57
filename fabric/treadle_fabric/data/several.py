"""Tell one loader from several, in what an argument or a hook gives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from treadle_fabric.checks import is_list
from treadle_fabric.containers import children

__all__ = ["several_loaders"]


def several_loaders(given: Any) -> list[Any] | None:
    """The loaders in a list, a tuple or omegaconf's ``ListConfig``.

    Args:
        given: A loader, or several.

    Returns:
        The loaders; ``None`` where ``given`` is one loader: any other iterable, and a list of batches.
    """
    return list(given) if is_list(given) and given and not _is_batch(given[0]) else None


def _is_batch(value: Any) -> bool:
    """Whether it is a plain value, a tensor or a container of tensors, and so no loader."""
    if isinstance(value, (Tensor, bool, int, float, str, bytes, type(None))) or callable(getattr(value, "to", None)):
        return True
    if is_list(value):
        return bool(value) and isinstance(value[0], Tensor)
    if isinstance(value, Iterable) and not isinstance(value, Mapping):
        return False
    return any(isinstance(item, Tensor) for _, item in children(value) or ())
