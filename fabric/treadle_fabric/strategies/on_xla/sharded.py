"""The engine around a module whose parameters torch-xla's FSDP cuts into parts."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module

from treadle_fabric.errors import MisconfigurationException, UnknownArgumentError, near_names
from treadle_fabric.strategies.data_parallel.ddp_engine import MethodForward
from treadle_fabric.strategies.on_xla.exchange import Exchange
from treadle_fabric.strategies.parts import is_part
from treadle_fabric.strategies.unwrapping import inside, plain_name

__all__ = ["XLAShardedEngine", "check_arguments", "clip_parts", "engine_around", "register_wrappers", "shard"]

Policy = Collection[type[Module]] | Callable[..., bool]
_OURS: Final = {
    "flatten_parameters": False,  # one flat vector of all has no names, which other strategies could read
    "shard_param_on_dim_0": True,  # parts that are DTensors for every other strategy
}
_SET: Final = ("module", "sharding_groups", "sharding_rank", "sharding_world_size", "auto_wrapper_callable")


class XLAShardedEngine(Module):
    """Runs a module, or one of its methods, as the forward pass of ``XlaFullyShardedDataParallel``.

    Args:
        sharded: The module in torch-xla's wrapper.
        target: What that wrapper runs.
    """

    def __init__(self, sharded: Module, target: MethodForward) -> None:
        super().__init__()
        self.sharded = sharded
        self.__dict__["target"] = target  # past Module.__setattr__: it is inside already
        self._gathered: list[Any] = []  # wrappers, by what they gathered in the present pass
        self._sequence: list[Any] = []  # and in the longest one, which passes of other processes are like
        for wrapper in _wrappers(sharded):
            wrapper.register_forward_pre_hook(lambda wrapper, args: self._gathered.append(wrapper))

    @property
    def module(self) -> Module:
        """The user's module."""
        module: Module = self.__dict__["target"].module
        return module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's ``forward``, or the method ``treadle_method`` of it."""
        self._gathered.clear()
        output = self.sharded(*args, **kwargs)
        if len(self._gathered) >= len(self._sequence):
            self._sequence = [*self._gathered]
        return output

    def join_forward(self) -> None:
        """Take part, with no batch, in a forward pass of other processes: gather all parameters, and free them."""
        self._gathered.clear()
        self.finish_forward()

    def finish_forward(self) -> None:
        """Gather what the present pass has not gathered, because it ended early here, and free it."""
        for wrapper in (self._sequence or _wrappers(self.sharded))[len(self._gathered) :]:
            wrapper._rebuild_full_params()
            wrapper._free_full_params()
            self._gathered.append(wrapper)


@inside.register
def _(wrapper: XLAShardedEngine) -> Module:
    return wrapper.module


def check_arguments(arguments: dict[str, Any]) -> None:
    """Refuse arguments that ``XlaFullyShardedDataParallel`` does not take, or that Treadle sets.

    Raises:
        MisconfigurationException: There is one.
    """
    from torch_xla.distributed.fsdp import XlaFullyShardedDataParallel  # an extra

    known = {*inspect.signature(XlaFullyShardedDataParallel.__init__).parameters} - {"self", *_SET}
    for name, value in arguments.items():
        if name not in known:
            raise UnknownArgumentError(f"XLAFSDPStrategy({name}=...) is no argument. {near_names(name, known)}")
        if name in _OURS and value != _OURS[name]:
            raise MisconfigurationException(
                f"XLAFSDPStrategy({name}={value!r}): Treadle cuts parameters along their first dimension, so that "
                f"every strategy reads the checkpoints. Leave {name} out."
            )


def shard(
    module: Module,
    exchange: Exchange,
    order: list[int],
    wrap: Policy | None,
    recompute: Policy | None,
    arguments: dict[str, Any],
) -> XLAShardedEngine:
    """Cut the parameters of a module into parts, on the device.

    Args:
        module: On the host, with the same values on every process.
        exchange: How the processes exchange tensors.
        order: PJRT's number for the device of each process.
        wrap: Which submodules are gathered by themselves.
        recompute: Of which submodules activations are computed again in the backward pass.
        arguments: For ``XlaFullyShardedDataParallel``.

    Raises:
        MisconfigurationException: A parameter cannot be cut.
    """
    from torch_xla.distributed.fsdp import XlaFullyShardedDataParallel, checkpoint_module  # an extra
    from torch_xla.distributed.fsdp.wrap import transformer_auto_wrap_policy

    _check_parameters(module)
    for parameter in module.parameters():
        if parameter.dim() == 0:
            parameter._is_sharded = True  # type: ignore[attr-defined] # torch-xla leaves it as it is
    target = MethodForward(module)
    for each in [*module.modules()]:
        if recompute is not None and _applies(recompute, each):
            checkpoint_module(each)
    if wrap is not None and not callable(wrap):
        wrap = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=set(wrap))
    places: Any = {"sharding_groups": [order], "sharding_rank": exchange.rank, "sharding_world_size": exchange.size}
    arguments = {"pin_layout_in_collective_ops": False, **_OURS, **arguments, **places}
    sharded = XlaFullyShardedDataParallel(target, auto_wrap_policy=wrap, **arguments)
    device = sharded.xla_device
    for parameter in module.parameters():
        if not is_part(parameter) and parameter.dim() == 0:
            moved = torch.nn.Parameter(parameter.to(device), parameter.requires_grad)
            torch.utils.swap_tensors(parameter, moved)  # type: ignore[no-untyped-call]
    for wrapper in _wrappers(sharded):
        exchange.place_in(wrapper)
        _put_parts_into_modules(wrapper)
        _leave_out_of_states(wrapper, "_fsdp_wrapped_module")
        _leave_out_of_states(wrapper._fsdp_wrapped_module, "_fpw_module")
    engine = XLAShardedEngine(sharded, target)
    module.__dict__["_treadle_xla_engine"] = engine  # past Module.__setattr__: it contains the module
    return engine


def engine_around(module: Module) -> XLAShardedEngine | None:
    """The engine of a module whose parameters were cut before, in an earlier stage; None if they are whole."""
    engine: XLAShardedEngine | None = module.__dict__.get("_treadle_xla_engine")
    return engine


def _applies(policy: Policy, module: Module) -> bool:
    if callable(policy):
        return bool(policy(module, False, 0))
    return isinstance(module, tuple(policy))


def _check_parameters(module: Module) -> None:
    for name, parameter in module.named_parameters():
        name = plain_name(module, name)
        if parameter.dtype != torch.float32:
            raise MisconfigurationException(
                f"The parameter {name!r} is of dtype {parameter.dtype}, and XLA's FSDP keeps parameters in float32. To "
                "compute in bfloat16, use precision='32-true' and XLAFSDPStrategy(compute_dtype=torch.bfloat16)."
            )


def _wrappers(sharded: Module) -> list[Any]:
    from torch_xla.distributed.fsdp import XlaFullyShardedDataParallel  # an extra

    return [each for each in sharded.modules() if isinstance(each, XlaFullyShardedDataParallel)]


def _put_parts_into_modules(wrapper: Any) -> None:
    """Let the modules list their parts as parameters, under their names; torch-xla lists them in its wrapper only.

    The whole parameters, which the modules compute with, stay plain attributes.
    """
    for (_, owner, name), part in zip(wrapper.full_param_infos, wrapper.sharded_params, strict=True):
        owner._parameters[name] = part
        del wrapper._parameters[part._name]
    for _, _, owner, name, first, first_name in wrapper.shared_full_param_infos:
        owner._parameters[name] = first._parameters[first_name]


def _leave_out_of_states(wrapper: Module, inner: str) -> None:
    """Let state dicts have the names of the module inside of a wrapper; a wrapper's own hooks cannot be called twice.

    Args:
        wrapper: One of torch-xla's.
        inner: The name under which it holds that module.
    """

    def give(wrapper: Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for name in [name for name in state if name.startswith(f"{prefix}{inner}.")]:
            state[prefix + name.removeprefix(f"{prefix}{inner}.")] = state.pop(name)

    def take(wrapper: Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in [name for name in state if name.startswith(prefix) and not name.startswith(f"{prefix}{inner}.")]:
            state[f"{prefix}{inner}.{name.removeprefix(prefix)}"] = state.pop(name)

    wrapper._state_dict_hooks.clear()
    wrapper._load_state_dict_pre_hooks.clear()
    wrapper.register_state_dict_post_hook(give)  # type: ignore[no-untyped-call]
    wrapper.register_load_state_dict_pre_hook(take)  # type: ignore[no-untyped-call]


def register_wrappers() -> None:
    """Let names of parts and modules leave out torch-xla's wrappers."""
    from torch_xla.distributed.fsdp import XlaFullyShardedDataParallel  # an extra
    from torch_xla.distributed.fsdp.xla_flatten_params_wrapper import XlaFlattenParamsWrapper

    inside.register(XlaFullyShardedDataParallel, lambda wrapper: wrapper._fsdp_wrapped_module)
    inside.register(XlaFlattenParamsWrapper, lambda wrapper: wrapper._fpw_module)


def clip_parts(
    parameters: Sequence[Tensor], max_norm: float, norm_type: float, strict: bool, exchange: Exchange
) -> Tensor:
    """Scale gradients of which each process has parts so that their joint norm is at most ``max_norm``; its value."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    device = parameters[0].device
    counted = [p.grad for p in parameters if p.grad is not None and (is_part(p) or exchange.rank == 0)]
    norms = [torch.linalg.vector_norm(g, norm_type) for g in counted]
    local = torch.linalg.vector_norm(torch.stack(norms), norm_type) if norms else torch.zeros((), device=device)
    if norm_type == float("inf"):
        total = exchange.all_reduce(local, dist.ReduceOp.MAX)
    else:
        total = exchange.all_reduce(local**norm_type, dist.ReduceOp.SUM) ** (1.0 / norm_type)
    if strict and not bool(total.isfinite()):
        raise RuntimeError(f"The total norm of order {norm_type} of the gradients is not finite: {float(total)}.")
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factor)
    return total
