"""Which arguments a user's step takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Final

from treadle_fabric import MisconfigurationException

__all__ = ["EVALUATION_ARGUMENTS", "TRAINING_ARGUMENTS", "bind_step", "is_param_in_hook_signature"]

TRAINING_ARGUMENTS: Final = ("batch", "batch_idx")
EVALUATION_ARGUMENTS: Final = ("batch", "batch_idx", "dataloader_idx")
"""``dataloader_idx`` goes to a step that insists, or where there are several loaders."""


def bind_step(
    step: Callable[..., Any], call: Callable[..., Any], given: tuple[str, ...], *, several: bool = False
) -> tuple[Callable[..., Any], bool]:
    """Make a user's step a function of all that a loop gives.

    Args:
        step: the module's method; its signature counts.
        call: what runs that method.
        given: the names of the arguments that the loop gives.
        several: whether there are several loaders.

    Returns:
        A function of exactly ``given``, and whether the step draws its batches itself (``dataloader_iter``).

    Raises:
        MisconfigurationException: the step asks for more than ``given``, or takes no batch.
    """
    takes, wants_iterator = _count(step, given)
    if takes == 3 and not several:
        parameter = inspect.signature(step).parameters.get("dataloader_idx")
        takes = 3 if parameter is not None and parameter.default is parameter.empty else 2
    if takes == len(given):
        return call, wants_iterator
    if takes == 2:
        return lambda batch, batch_idx, dataloader_idx: call(batch, batch_idx), wants_iterator
    return lambda batch, *_: call(batch), wants_iterator


def _count(step: Callable[..., Any], given: tuple[str, ...]) -> tuple[int, bool]:
    """How many of ``given`` a step takes by position, and whether it wants the iterator."""
    try:
        parameters = list(inspect.signature(step).parameters.values())
    except (TypeError, ValueError):
        return len(given), False
    if any(p.name == "dataloader_iter" for p in parameters):
        return 1, True
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return len(given), False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in positional if p.default is p.empty]
    known = [p for p in positional if p.name in given or p.default is p.empty]
    name = getattr(step, "__name__", "step")
    if len(required) > len(given) or any(p.kind is p.KEYWORD_ONLY and p.default is p.empty for p in parameters):
        raise MisconfigurationException(
            f"`{name}{inspect.signature(step)}` asks for more than the trainer gives, which is ({', '.join(given)}): "
            f"define `{name}(self, {', '.join(given[:2])})`."
        )
    if not positional:
        raise MisconfigurationException(f"`{name}` takes no batch: define `{name}(self, {', '.join(given[:2])})`.")
    return min(len(known), len(given)), False


def is_param_in_hook_signature(
    hook_fx: Callable[..., Any], param: str, explicit: bool = False, min_args: int | None = None
) -> bool:
    """Return whether a hook takes an argument.

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
