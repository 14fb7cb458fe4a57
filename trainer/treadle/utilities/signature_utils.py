"""What reads the signature of a hook, where users of a trainer look for it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

__all__ = ["is_param_in_hook_signature"]


def is_param_in_hook_signature(
    hook_fx: Callable[..., Any], param: str, explicit: bool = False, min_args: int | None = None
) -> bool:
    """Whether a hook takes an argument.

    Args:
        hook_fx: A method; its first argument is ``self``.
        param: The name of the argument.
        explicit: Whether ``*args`` does not count, which takes any.
        min_args: A number of arguments that is taken for it whatever their names are.
    """
    spec = inspect.getfullargspec(inspect.unwrap(hook_fx))
    arguments = spec.args[1:]
    return (
        param in arguments
        or (not explicit and spec.varargs is not None)
        or (min_args is not None and len(arguments) >= min_args)
    )
