"""Which arguments a user's step takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from treadle_fabric import MisconfigurationException

__all__ = ["step_arguments"]


def step_arguments(step: Callable[..., Any], given: tuple[str, ...]) -> tuple[int, bool]:
    """How many of ``given`` a step takes by position, and whether it wants the iterator (``dataloader_iter``)."""
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
    if len(required) > len(given) or any(p.kind is p.KEYWORD_ONLY and p.default is p.empty for p in parameters):
        name = getattr(step, "__name__", "step")
        raise MisconfigurationException(
            f"`{name}{inspect.signature(step)}` asks for more than the trainer gives, which is ({', '.join(given)}): "
            f"define `{name}(self, {', '.join(given[:2])})`."
        )
    if not positional:
        name = getattr(step, "__name__", "step")
        raise MisconfigurationException(f"`{name}` takes no batch: define `{name}(self, {', '.join(given[:2])})`.")
    return min(len(known), len(given)), False


def evaluation_arguments(step: Callable[..., Any], *, several: bool) -> tuple[int, bool]:
    """As :func:`step_arguments`; ``dataloader_idx`` goes to a step that insists, or where there are several loaders."""
    takes, wants_iterator = step_arguments(step, ("batch", "batch_idx", "dataloader_idx"))
    if takes == 3 and not several:
        parameter = inspect.signature(step).parameters.get("dataloader_idx")
        takes = 3 if parameter is not None and parameter.default is parameter.empty else 2
    return takes, wants_iterator
