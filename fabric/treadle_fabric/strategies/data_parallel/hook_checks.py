"""Which communication hooks, states, modules and settings of DDP go together; the others are refused with a reason."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Embedding, EmbeddingBag, Module

from treadle_fabric.errors import MisconfigurationException
from treadle_fabric.strategies.unwrapping import user_module, with_plain_names

__all__ = ["check_arguments", "check_module", "is_local_sgd", "is_power_sgd", "sparse_tables"]

_FOLDER = "torch.distributed.algorithms.ddp_comm_hooks"


def _torchs(module: str, *names: str) -> tuple[Any, ...]:
    """Objects of one of torch's modules of hooks; none while nobody has imported the module."""
    loaded = sys.modules.get(f"{_FOLDER}.{module}")
    return tuple(getattr(loaded, name) for name in names if hasattr(loaded, name))


def is_power_sgd(state: Any) -> bool:
    """Whether this is torch's ``PowerSGDState``."""
    return isinstance(state, _torchs("powerSGD_hook", "PowerSGDState"))


def is_local_sgd(state: Any) -> bool:
    """Whether this is torch's ``PostLocalSGDState``."""
    return isinstance(state, _torchs("post_localSGD_hook", "PostLocalSGDState"))


def check_arguments(state: Any, hook: Any, wrapper: Any, averages: bool, static_graph: bool) -> None:
    """Refuse arguments of a DDP strategy that do not fit together.

    Args:
        state: ``ddp_comm_state``.
        hook: ``ddp_comm_hook``.
        wrapper: ``ddp_comm_wrapper``.
        averages: Whether ``model_averaging_period`` is given.
        static_graph: ``static_graph``.

    Raises:
        MisconfigurationException: They do not.
    """
    if hook is not None:
        _check_hook(state, hook)
    for name, value in (("ddp_comm_state", state), ("ddp_comm_wrapper", wrapper)):
        if value is not None and hook is None:
            raise MisconfigurationException(
                f"{name}={_name(value)} has an effect only with a hook: give ddp_comm_hook as well, a function of a"
                f" state and a bucket such as those in {_FOLDER}, or leave {name} out."
            )
    if wrapper is not None and not callable(wrapper):
        raise MisconfigurationException(
            f"ddp_comm_wrapper={wrapper!r} must be a function that makes a hook of a hook, such as"
            f" {_FOLDER}.default_hooks.fp16_compress_wrapper."
        )
    if is_local_sgd(state) and not averages:
        raise MisconfigurationException(
            "ddp_comm_state=PostLocalSGDState without model_averaging_period: the models of the ranks would part for"
            " ever. Give the number of steps between two averages of the parameters, such as model_averaging_period=4."
        )
    if averages and not is_local_sgd(state):
        raise MisconfigurationException(
            "model_averaging_period has an effect only with post-local SGD; otherwise gradients are averaged at each"
            " step, and parameters are alike. Give ddp_comm_state=PostLocalSGDState(...) and"
            " ddp_comm_hook=post_localSGD_hook, or leave model_averaging_period out."
        )
    if is_power_sgd(state) and static_graph:
        raise MisconfigurationException(
            "PowerSGD with static_graph=True: PowerSGD remembers an error for each bucket of gradients, and under"
            " static_graph a resumed run cannot have the same buckets again. Leave static_graph out."
        )


def _check_hook(state: Any, hook: Any) -> None:
    example = f"a function of a state and a bucket, such as {_FOLDER}.default_hooks.fp16_compress_hook"
    if not callable(hook):
        raise MisconfigurationException(f"ddp_comm_hook={hook!r} must be {example}.")
    try:
        inspect.signature(hook).bind(state, None)
    except TypeError as error:
        raise MisconfigurationException(
            f"ddp_comm_hook={_name(hook)} cannot be called with a state and a bucket ({error}): give {example}."
        ) from error
    except ValueError:  # a function without a signature
        pass
    if hook in _torchs("powerSGD_hook", "batched_powerSGD_hook") and not _batched_works():
        raise MisconfigurationException(
            "ddp_comm_hook=batched_powerSGD_hook fails in this version of torch, whose own check of shapes refuses the"
            " matrices of this hook. Give powerSGD_hook with batch_tensors_with_same_shape=True in PowerSGDState."
        )
    takes, fits = None, True
    if hook in _torchs("powerSGD_hook", "powerSGD_hook", "batched_powerSGD_hook"):
        takes, fits = "PowerSGDState(process_group=None, ...)", is_power_sgd(state)
    elif hook in _torchs("post_localSGD_hook", "post_localSGD_hook"):
        takes, fits = "PostLocalSGDState(process_group=None, subgroup=None, ...)", is_local_sgd(state)
    elif hook in _torchs("default_hooks", "allreduce_hook", "fp16_compress_hook", "bf16_compress_hook"):
        takes, fits = "None, or a process group", state is None or isinstance(state, dist.ProcessGroup)
    if not fits:
        raise MisconfigurationException(
            f"ddp_comm_hook={_name(hook)} cannot work with ddp_comm_state={_name(state)}: give ddp_comm_state={takes}."
        )


def _batched_works() -> bool:
    """Whether torch can orthogonalize what its ``batched_powerSGD_hook`` gives it, a matrix."""
    (orthogonalize,) = _torchs("powerSGD_hook", "_orthogonalize") or (None,)
    try:
        return orthogonalize is None or orthogonalize(torch.ones(1, 1)) is None
    except AssertionError:
        return False


def check_module(state: Any, hook: Any, wrapper: Any, module: Module, device: torch.device, scales: bool) -> None:
    """Refuse a module or a precision whose gradients a hook cannot exchange.

    Args:
        state: ``ddp_comm_state``.
        hook: ``ddp_comm_hook``.
        wrapper: ``ddp_comm_wrapper``.
        module: The user's module.
        device: This process's.
        scales: Whether the precision scales losses.

    Raises:
        MisconfigurationException: The hook cannot.
    """
    if hook is None:
        return
    tables = [name for name, _ in sparse_tables(module)]
    halves = hook in _torchs("default_hooks", "fp16_compress_hook") or wrapper in _torchs(
        "default_hooks", "fp16_compress_wrapper"
    )
    if tables and (is_power_sgd(state) or (halves and device.type == "cpu")):
        what = "PowerSGD" if is_power_sgd(state) else "The compression to float16 on the CPU"
        raise MisconfigurationException(
            f"{what} cannot exchange sparse gradients, and {tables[0]!r} has them: make the embedding with"
            " sparse=False, or use another ddp_comm_hook."
        )
    if is_power_sgd(state) and scales and (state.use_error_feedback or state.warm_start):
        raise MisconfigurationException(
            "PowerSGD with a precision that scales losses: the first gradient that overflows would stay in what"
            " PowerSGD remembers, and all later gradients would be NaN. Use precision='bf16-mixed', or"
            " PowerSGDState(..., use_error_feedback=False, warm_start=False)."
        )


def sparse_tables(module: Module) -> Iterator[tuple[str, Tensor]]:
    """Iterate over the names and the weights of embeddings that are trained with sparse gradients.

    Args:
        module: The user's module, or a wrapper.
    """
    own = user_module(module)
    for path, part in with_plain_names(own, own.named_modules()):
        if isinstance(part, (Embedding, EmbeddingBag)) and part.sparse and part.weight.requires_grad:
            yield f"{path}.weight" if path else "weight", part.weight


def _name(value: Any) -> str:
    name = getattr(value, "__name__", None)
    return name if isinstance(name, str) else f"{value!r:.80}"
