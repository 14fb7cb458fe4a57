"""Activation checkpointing: what a forward pass computed is computed again in the backward pass, instead of kept."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Collection, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from treadle_fabric.errors import MisconfigurationException
from treadle_fabric.precision.precision import default_dtype
from treadle_fabric.strategies.sharding.wrapping import Policy, repeated_blocks, select_modules
from treadle_fabric.strategies.unwrapping import uncompiled

__all__ = ["recompute"]


def recompute(module: Module, policy: Policy | None = None, saved: Collection[Any] = ()) -> list[Module]:
    """Make submodules compute their activations again in the backward pass. Call this before sharding.

    The names of parameters stay what they are: only the submodule's ``forward`` is replaced, inside of its hooks, so
    that a sharded submodule is gathered once for both. Random numbers (dropout), autocast and the default dtype are
    those of the forward pass.

    Args:
        module: The user's module, which is itself not affected.
        policy: Which submodules: classes, or a function of a module. Default: the blocks that the model repeats.
        saved: Operators of torch, such as ``torch.ops.aten.mm.default``, whose results are kept all the same.

    Returns:
        The submodules.

    Raises:
        MisconfigurationException: The policy finds nothing, or ``saved`` has something else than operators.
    """
    operators = _operators(saved)
    chosen = repeated_blocks(module) if policy is None else select_modules(module, policy)
    if not chosen:
        raise MisconfigurationException(
            f"Activation checkpointing has no submodule of {type(module).__name__} to work on. Name the classes of the"
            " layers: activation_checkpointing_policy={Block}."
        )
    for each in chosen:
        if not isinstance(each.forward, _Recomputed):
            each.forward = _Recomputed(each, operators)
    return chosen


class _Recomputed:
    """The forward of a module, whose activations are computed again for the backward pass."""

    def __init__(self, module: Module, saved: list[str]) -> None:
        self._forward = module.forward
        self._saved = saved
        self._name = type(uncompiled(module)).__name__
        functools.update_wrapper(self, module.forward)  # for those who ask for the signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._forward(*args, **kwargs)
        extra: dict[str, Any] = {}
        if self._saved:
            operators = [attrgetter(name)(torch.ops) for name in self._saved]
            extra["context_fn"] = functools.partial(create_selective_checkpoint_contexts, operators)
        # as two arguments: torch looks there for the devices whose random numbers it has to repeat
        run = functools.partial(self._run, torch.get_default_dtype(), _function_modes())
        before = [(value, value._version) for value in (*args, *kwargs.values()) if _has_version(value)]
        result = checkpoint(run, args, kwargs, use_reentrant=False, **extra)
        if any(value._version != version for value, version in before):
            raise MisconfigurationException(
                f"{self._name} changes its inputs in place, so its activations cannot be computed again from them. Use"
                " operations that are not in place, such as x = x * 2 instead of x *= 2, or leave the layer out of"
                " activation checkpointing."
            )
        return result

    def _run(self, dtype: torch.dtype, modes: Sequence[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with contextlib.ExitStack() as stack:
            if dtype != torch.get_default_dtype():  # a precision's context is over when the backward pass begins
                stack.enter_context(default_dtype(dtype))
            for mode in modes[len(_function_modes()) :]:  # autograd takes none along
                stack.enter_context(mode)
            return self._forward(*args, **kwargs)


def _has_version(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_inference()


def _function_modes() -> list[Any]:
    """The contexts of this thread in which functions of torch mean something else, from the outside."""
    return list(_get_current_function_mode_stack())  # type: ignore[no-untyped-call]


def _operators(saved: Collection[Any]) -> list[str]:
    """The names of operators in ``torch.ops``: the operators cannot be copied with a module."""
    found: list[str] = []
    for each in saved:
        if isinstance(each, torch._ops.OpOverload):
            found.append(str(each))
        elif isinstance(each, torch._ops.OpOverloadPacket):
            found += [f"{each}.{name}" for name in each.overloads()]  # type: ignore[no-untyped-call]
        else:
            raise MisconfigurationException(
                f"Activation checkpointing keeps the results of operators of torch, and {each!r} is none. Such are"
                " torch.ops.aten.mm.default and torch.ops.aten._scaled_dot_product_flash_attention.default."
            )
    return found
