"""Apply torch's ``fully_shard`` to a module and its parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from treadle_fabric.batches import map_tensors
from treadle_fabric.errors import MisconfigurationException
from treadle_fabric.precision import Precision
from treadle_fabric.strategies.sharding.arguments import ShardingOptions, dtypes_for
from treadle_fabric.strategies.sharding.engine import ShardedEngine, parameter_groups
from treadle_fabric.strategies.sharding.materialize import give_values
from treadle_fabric.strategies.sharding.recompute import recompute
from treadle_fabric.strategies.sharding.replicated import scalars_of
from treadle_fabric.strategies.sharding.wrapping import check_groups, modules_to_shard
from treadle_fabric.strategies.unwrapping import user_module, with_plain_names

__all__ = ["shard_module", "sharded_by_hand"]


def shard_module(
    module: Module,
    mesh: Any,
    options: ShardingOptions,
    precision: Precision,
    device: torch.device,
    broadcast: Callable[[Any], Any],
) -> ShardedEngine:
    """Shard a module over the processes of a mesh.

    What the user applied ``fully_shard`` to stays as it is; the rest is sharded together.

    Args:
        module: The user's module, or its compiled form.
        mesh: Of one dimension; or of two, along the first of which the processes have copies of the parts.
        options: What is sharded, and how.
        precision: Whose dtypes the gathered parameters have.
        device: Where the parts lie.
        broadcast: Returns what rank 0 has.

    Returns:
        The engine that runs the module.
    """
    from torch.distributed.fsdp import fully_shard  # heavy

    own = user_module(module)
    by_hand = sharded_by_hand(own, mesh)
    ignored = options.ignored_parameters() | by_hand
    parts = [] if by_hand else modules_to_shard(own, options.policy, ignored)
    if options.recomputes:
        recompute(own, options.recompute_policy, options.recompute_saved)
    dtypes = dtypes_for(precision.precision, options.dtypes)
    if dtypes.buffer_dtype is not None:
        _cast_buffers(own, dtypes.buffer_dtype)
    arguments: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": dtypes.policy(),
        "offload_policy": options.offload_policy(device),
        "reshard_after_forward": options.reshard_after_forward,
    }
    scalars = {name: p for name, p in own.named_parameters() if p in scalars_of(own) - ignored}
    empty = {p for p in own.parameters() if not p.numel()}
    if whole := {*ignored, *scalars.values(), *empty, *_never_sharded(own)}:
        arguments["ignored_params"] = whole
        _move(whole, device)  # torch moves what it shards
    check_groups(own, parts, whole)
    for parameter in own.parameters():
        if not parameter.is_contiguous():  # such as `channels_last`
            parameter.data = parameter.data.contiguous()
    engine = ShardedEngine(module)
    for part in (*parts, engine):
        part.register_forward_hook(_free_outputs)
        fully_shard(part, **arguments)
        part.register_forward_pre_hook(_free_inputs, with_kwargs=True)
    engine.sharded()
    give_values(engine, precision, device, broadcast, torch.device("cpu") if options.offload else None)
    if scalars:
        now = dict(own.named_parameters())
        engine.replicate([now[name] for name in scalars], mesh.get_all_groups())
    return engine


def sharded_by_hand(module: Module, mesh: Any) -> set[Tensor]:
    """Return the parameters of all submodules that the user applied torch's ``fully_shard`` to.

    Args:
        module: The user's module.
        mesh: Over whose processes gradients are averaged; None: over none.

    Raises:
        MisconfigurationException: ``fully_shard`` got a mesh of fewer processes than that, so that some of them would
            train apart.
    """
    sharded = [each for each in with_plain_names(module, module.named_modules()) if hasattr(each[1], "_get_fsdp_state")]
    wanted = _processes(mesh) if sharded and mesh is not None else set()
    found: set[Tensor] = set()
    for name, each in sharded:
        found.update(each.parameters())
        for part in (part.sharded_param for group in parameter_groups(each) for part in group.fsdp_params):
            if missing := wanted - _processes(part.device_mesh):
                raise MisconfigurationException(
                    f"fully_shard was applied to {name or 'the module itself'!r} with a mesh that leaves out the ranks"
                    f" {sorted(missing)}, and its gradients have to be averaged over the ranks {sorted(wanted)}. Give"
                    " it the mesh of all data dimensions (mesh['data_parallel'], or for copies of the model"
                    " mesh['data_replicate', 'data_shard']), or leave fully_shard to the strategy."
                )
    return found


def _processes(mesh: Any) -> set[int]:
    return set(mesh.mesh.flatten().tolist())


def _never_sharded(module: Module) -> list[Tensor]:
    """Parameters that torch 2.9 cannot share out, because they cannot require gradients: all ranks keep them whole."""
    from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState  # heavy

    if hasattr(FSDPState(), "_fsdp_param_groups"):  # since the same version
        return []
    return [p for p in module.parameters() if not (p.is_floating_point() or p.is_complex())]


def _cast_buffers(module: Module, dtype: torch.dtype) -> None:
    for each in module.modules():
        for name, buffer in each._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                each._buffers[name] = buffer.to(dtype)


def _move(parameters: Iterable[Tensor], device: torch.device) -> None:
    for parameter in parameters:
        if not parameter.is_meta:
            parameter.data = parameter.data.to(device)


def _free_inputs(module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Let the module change its inputs in place, as it may where it is not sharded."""
    if torch.is_grad_enabled():
        return tuple(map(_no_view, args)), {name: _no_view(value) for name, value in kwargs.items()}
    return None


def _free_outputs(module: Module, args: Any, output: Any) -> Any:
    """Let the outputs be changed in place: a view would lose what torch adds to gather parameters for its gradient."""
    if isinstance(output, Tensor) or not torch.is_grad_enabled():
        return _no_view(output)
    return map_tensors(output, _no_view)


def _no_view(value: Any) -> Any:
    if isinstance(value, Tensor) and value.requires_grad and value._is_view():
        return _Free.apply(value)  # type: ignore[no-untyped-call]
    return value


class _Free(torch.autograd.Function):
    """The same memory as a tensor that is no view, so that a change in place is one operation of its own."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0]
