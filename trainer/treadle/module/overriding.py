"""Find out whether an object overrides a hook, and whether the hook takes the arguments it will be called with."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from treadle_fabric import MisconfigurationException

__all__ = ["by_name", "check_signature", "overrides", "takes_names", "without_last"]


def overrides(obj: object, name: str, base: type) -> bool:
    """Return whether ``obj`` has its own ``name``, in its class or on the instance, and not the one of ``base``."""
    method = getattr(obj, name, None)
    return method is not None and getattr(method, "__func__", method) is not getattr(base, name, None)


def takes_names(method: Any, before: int, *names: str) -> bool:
    """Return whether a method takes arguments of these names, by name, after ``before`` others by position."""
    try:
        inspect.signature(method).bind(*(None,) * before, **dict.fromkeys(names))
    except (TypeError, ValueError):  # other names, or builtins
        return False
    return True


def by_name(method: Callable[..., Any], before: int, *names: str) -> Callable[..., Any]:
    """Return a function that gives a method its last arguments by name, as Lightning does, where the method has them.

    Args:
        method: the user's.
        before: the number of arguments by position that come first.
        names: of the arguments after those.
    """
    if not takes_names(method, before, *names):
        return method

    def call(*args: Any) -> Any:
        return method(*args[:before], **dict(zip(names, args[before:], strict=True)))

    vars(call)["__self__"] = getattr(method, "__self__", None)  # whose method is measured
    call.__name__ = getattr(method, "__name__", call.__name__)
    return call


def without_last(method: Callable[..., Any], arguments: Sequence[str]) -> Callable[..., Any] | None:
    """Return a function that takes all ``arguments`` and calls a method without the last one; None if it takes it."""
    try:
        signature = inspect.signature(method)
    except (TypeError, ValueError):
        return None
    for given, found in ((arguments, None), (arguments[:-1], lambda *args: method(*args[:-1]))):
        try:
            signature.bind(*given)
        except TypeError:
            continue
        return found
    return None


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
