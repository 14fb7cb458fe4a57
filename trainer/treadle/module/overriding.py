"""Find out whether an object overrides a hook, and whether the hook takes the arguments it will be called with."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from treadle_fabric import MisconfigurationException

__all__ = ["check_signature", "overrides"]


def overrides(obj: object, name: str, base: type) -> bool:
    """Return whether ``obj`` has its own ``name``, in its class or on the instance, and not the one of ``base``."""
    method = getattr(obj, name, None)
    return method is not None and getattr(method, "__func__", method) is not getattr(base, name, None)


def check_signature(method: Callable[..., Any], name: str, arguments: Sequence[str], owner: str) -> None:
    """Refuse a hook that cannot take the arguments it will be called with.

    Raises:
        MisconfigurationException: the message has the hook, its signature and the right signature.
    """
    try:
        signature = inspect.signature(method)
    except (TypeError, ValueError):  # builtins and mocks
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        raise MisconfigurationException(
            f"`{owner}.{name}{signature}` cannot be called as the trainer calls it ({error}): "
            f"define `{name}({', '.join(('self', *arguments))})`."
        ) from None
