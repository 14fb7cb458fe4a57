"""Single steps on the way of hyper-parameters to a logger, for loggers of programs that take them one by one."""

from __future__ import annotations

import dataclasses
import inspect
import json
from argparse import Namespace
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from torch import Tensor

__all__ = ["call_functions", "from_namespace", "is_json", "join_names", "to_json_values", "to_scalars"]


def from_namespace(params: Any) -> Any:
    """Turn a ``Namespace`` into a dictionary, and None into an empty one; anything else is returned as it is."""
    if params is None:
        return {}
    return vars(params) if isinstance(params, Namespace) else params


def call_functions(params: dict[str, Any]) -> dict[str, Any]:
    """Replace functions without arguments by what they return, and other functions and classes by their names."""

    def plain(value: Any) -> Any:
        if isinstance(value, type):
            return value.__name__
        if not callable(value):
            return value
        with suppress(Exception):  # of the user's function
            inspect.signature(value).bind()
            if not callable(returned := value()):
                return returned
        return getattr(value, "__name__", type(value).__name__)

    return {name: plain(value) for name, value in params.items()}


def join_names(params: Any, delimiter: str = "/", parent_key: str = "") -> dict[str, Any]:
    """Give the entries of nested mappings, namespaces and dataclasses joined names.

    Example:
        >>> join_names({"a": {"b": 1}})
        {'a/b': 1}
    """
    flat: dict[str, Any] = {}
    for key, value in params.items():
        name = f"{parent_key}{delimiter}{key}" if parent_key else str(key)
        if isinstance(value, Namespace):
            value = vars(value)
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = dataclasses.asdict(value)
        if isinstance(value, Mapping):
            flat.update(join_names(value, delimiter, name))
        else:
            flat[name] = value
    return flat


def to_scalars(params: dict[str, Any]) -> dict[str, Any]:
    """Turn NumPy's scalars into Python's, and what is no number, truth value, string or tensor into a string."""

    def plain(value: Any) -> Any:
        if getattr(value, "shape", None) == () and hasattr(value, "item") and not isinstance(value, Tensor):
            value = value.item()
        return value if isinstance(value, bool | int | float | str | Tensor) else str(value)

    return {name: plain(value) for name, value in params.items()}


def to_json_values(params: dict[str, Any]) -> dict[str, Any]:
    """Turn values that JSON does not have into strings."""
    return {name: value if is_json(value) else str(value) for name, value in params.items()}


def is_json(value: Any) -> bool:
    """Whether JSON has a value."""
    try:
        json.dumps(value)
    except (TypeError, ValueError, OverflowError):
        return False
    return True
