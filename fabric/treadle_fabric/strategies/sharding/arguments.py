"""FSDPStrategy's arguments, those of Lightning and of FSDP1 among them, as the options of ``fully_shard``."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Module

from treadle_fabric.errors import MisconfigurationException, UnknownArgumentError, near_names
from treadle_fabric.strategies.sharding.wrapping import Policy

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Dtypes", "ShardingOptions", "dtypes_for", "parse_arguments"]

_STRATEGIES = ("FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD", "_HYBRID_SHARD_ZERO2")


@dataclass(frozen=True)
class Dtypes:
    """What ``torch.distributed.fsdp.MixedPrecisionPolicy`` takes, and the dtype of floating-point buffers."""

    param_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype | None = None
    output_dtype: torch.dtype | None = None
    cast_forward_inputs: bool = False
    buffer_dtype: torch.dtype | None = None

    def policy(self) -> Any:
        """Return torch's policy object."""
        from torch.distributed.fsdp import MixedPrecisionPolicy  # takes a second to import

        return MixedPrecisionPolicy(self.param_dtype, self.reduce_dtype, self.output_dtype, self.cast_forward_inputs)


@dataclass(frozen=True)
class ShardingOptions:
    """How a model is sharded, whatever the names of the arguments were."""

    policy: Policy | None = None
    """Which submodules are groups of their own. None: the blocks that the model repeats."""
    reshard_after_forward: bool | int | None = None
    """Free gathered parameters after the forward pass: True, False, or the number of ranks that keep the parts. None:
    True for all groups but the root's."""
    offload: bool = False
    """Parameters, gradients and optimizer state are in the CPU's memory between the passes."""
    pin_memory: bool = True
    """Whether that memory is pinned, where there is an accelerator."""
    dtypes: Dtypes | None = None
    """The dtypes that the user gave. None: those of the precision."""
    hybrid: bool = False
    """Shard over the ranks of one dimension of the mesh, and replicate over the other."""
    mesh: tuple[int, ...] | DeviceMesh | None = None
    """The sizes of the dimensions, or the mesh itself. None: all ranks; where hybrid, nodes x ranks of a node."""
    state_dict_type: str = "sharded"
    """``"sharded"``: a checkpoint is a folder in which each rank writes its part. ``"full"``: a file, whole tensors."""
    recomputes: bool = False
    """Activation checkpointing."""
    recompute_policy: Policy | None = None
    """Of which submodules. None: the blocks that the model repeats."""
    recompute_saved: tuple[Any, ...] = ()
    """Operators whose results are kept all the same."""
    ignored: tuple[Module | Tensor, ...] = ()
    """Parameters, and modules whose parameters, stay whole on every rank; their gradients are not reduced."""

    def offload_policy(self, device: torch.device) -> Any:
        """Return torch's policy object for a run on this device."""
        from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy  # take a second to import

        if not self.offload:
            return OffloadPolicy()
        return CPUOffloadPolicy(pin_memory=self.pin_memory and device.type != "cpu")  # nothing to copy to is faster

    def ignored_parameters(self) -> set[Tensor]:
        """The parameters among and in :attr:`ignored`."""
        found = set[Tensor]()
        for each in self.ignored:
            found.update(each.parameters() if isinstance(each, Module) else [each])
        return found


def parse_arguments(
    *,
    auto_wrap_policy: Any = None,
    policy: Any = None,
    reshard_after_forward: bool | int | None = None,
    cpu_offload: Any = None,
    mixed_precision: Any = None,
    activation_checkpointing: Any = None,
    activation_checkpointing_policy: Any = None,
    activation_checkpointing_saves: Collection[Any] = (),
    sharding_strategy: Any = "FULL_SHARD",
    state_dict_type: str = "sharded",
    device_mesh: Any = None,
    **others: Any,
) -> ShardingOptions:
    """Translate the arguments of ``FSDPStrategy``.

    Args:
        auto_wrap_policy: Lightning's name of ``policy``.
        policy: Classes of submodules, or a function of a module.
        reshard_after_forward: As ``fully_shard`` takes it.
        cpu_offload: True, or an object of torch's ``CPUOffload`` (FSDP1) or ``CPUOffloadPolicy``.
        mixed_precision: An object of torch's ``MixedPrecisionPolicy``, or of FSDP1's ``MixedPrecision``.
        activation_checkpointing: A class of submodules, a list of classes, or True for the blocks that a model repeats.
        activation_checkpointing_policy: Classes, or a function of a module.
        activation_checkpointing_saves: Operators of torch whose results are kept.
        sharding_strategy: ``"FULL_SHARD"``, ``"SHARD_GRAD_OP"``, ``"HYBRID_SHARD"``, ``"_HYBRID_SHARD_ZERO2"``, or a
            member of torch's enum.
        state_dict_type: ``"sharded"`` or ``"full"``.
        device_mesh: Sizes, or a ``DeviceMesh``.
        **others: Arguments that ``FullyShardedDataParallel`` (FSDP1) or ``fully_shard`` takes.

    Raises:
        MisconfigurationException: An argument contradicts another one, or has no meaning.
        UnknownArgumentError: ``others`` has an unknown name.
    """
    offload, pin_memory = _offload(cpu_offload)
    hybrid, kept = _sharding(sharding_strategy, reshard_after_forward)
    _one_of("auto_wrap_policy", auto_wrap_policy, "policy", policy)
    _one_of(
        "activation_checkpointing",
        activation_checkpointing or None,
        "activation_checkpointing_policy",
        activation_checkpointing_policy,
    )
    if state_dict_type not in ("full", "sharded"):
        raise MisconfigurationException(
            f"state_dict_type={state_dict_type!r}: must be 'sharded', a folder into which each rank writes its part, or"
            " 'full', one file."
        )
    layers = activation_checkpointing if activation_checkpointing_policy is None else activation_checkpointing_policy
    return ShardingOptions(
        policy=auto_wrap_policy if policy is None else policy,
        reshard_after_forward=kept,
        offload=offload,
        pin_memory=pin_memory,
        dtypes=None if mixed_precision is None else _dtypes(mixed_precision),
        hybrid=hybrid,
        mesh=_mesh(device_mesh, hybrid),
        state_dict_type=state_dict_type,
        recomputes=layers not in (None, False) or bool(activation_checkpointing_saves),
        recompute_policy=None if isinstance(layers, bool) else layers,
        recompute_saved=tuple(activation_checkpointing_saves),
        ignored=_others(others),
    )


def dtypes_for(precision: str, given: Dtypes | None = None) -> Dtypes:
    """The dtypes in which parameters are gathered and gradients reduced.

    Args:
        precision: The canonical name of the precision.
        given: Those that the user gave, which go first.
    """
    if given is not None:
        return given
    if precision in ("16-true", "bf16-true", "fp8-true", "transformer-engine", "transformer-engine-float16"):
        # A sum of many half-precision gradients loses what is small beside it: gradients are summed over ranks, and
        # over the batches of an accumulation, in single precision.
        return Dtypes(reduce_dtype=torch.float32)
    # Mixed: autocast picks the dtype of each operation, and has to find weights in single precision. Normalizations,
    # for example, refuse weights in half precision beside activations in single precision, and what autocast leaves in
    # single precision would be rounded. `mixed_precision=MixedPrecisionPolicy(...)` gathers in half precision.
    return Dtypes()


def _one_of(first: str, one: Any, second: str, other: Any) -> None:
    if one is not None and other is not None:
        raise MisconfigurationException(f"{first}={one!r} and {second}={other!r} say the same thing: give one.")


def _offload(given: Any) -> tuple[bool, bool]:
    """Whether to offload, and into pinned memory."""
    if given is None or isinstance(given, bool):
        return bool(given), True
    if hasattr(given, "offload_params"):  # FSDP1's
        return bool(given.offload_params), True
    if type(given).__name__ == "OffloadPolicy":
        return False, True
    if hasattr(given, "pin_memory"):
        return True, bool(given.pin_memory)
    raise MisconfigurationException(f"cpu_offload={given!r}: must be True, False, or torch's CPUOffloadPolicy().")


def _sharding(strategy: Any, reshard: bool | int | None) -> tuple[bool, bool | int | None]:
    """Whether hybrid, and whether gathered parameters are freed after the forward pass."""
    name = str(getattr(strategy, "name", strategy)).upper()
    if name == "NO_SHARD":
        raise MisconfigurationException(
            "sharding_strategy='NO_SHARD': every rank would have the whole model, which is what strategy='ddp' does."
        )
    if name not in _STRATEGIES:
        raise MisconfigurationException(f"sharding_strategy={strategy!r} is unknown. {near_names(name, _STRATEGIES)}")
    if reshard is not None and not (isinstance(reshard, bool) or (isinstance(reshard, int) and reshard > 0)):
        raise MisconfigurationException(
            f"reshard_after_forward={reshard!r}: must be True, False, or the number of ranks that keep the parts."
        )
    if name in ("SHARD_GRAD_OP", "_HYBRID_SHARD_ZERO2"):
        if reshard not in (None, False):
            raise MisconfigurationException(
                f"sharding_strategy={strategy!r} keeps gathered parameters until the backward pass, and"
                f" reshard_after_forward={reshard!r} frees them: leave one of the two out."
            )
        reshard = False
    return "HYBRID" in name, reshard


def _mesh(given: Any, hybrid: bool) -> Any:
    if given is None:
        return None
    wanted = 2 if hybrid else 1
    if hasattr(given, "mesh_dim_names"):
        sizes: Any = tuple(given.mesh.shape)
    elif isinstance(given, (tuple, list)) and all(type(n) is int and n > 0 for n in given) and given:
        given = sizes = tuple(given)
    else:
        raise MisconfigurationException(
            f"device_mesh={given!r}: must be the sizes of its dimensions, such as (2, 4) for 2 replicas of parameters"
            " that 4 ranks share, or a DeviceMesh."
        )
    if hybrid and getattr(given, "mesh_dim_names", ()) is None:
        raise MisconfigurationException(
            "device_mesh has dimensions without names, which a hybrid one needs: init_device_mesh(type, (2, 4),"
            " mesh_dim_names=('data_replicate', 'data_shard'))."
        )
    if len(sizes) != wanted:
        raise MisconfigurationException(
            f"device_mesh={sizes} has {len(sizes)} dimension{'s' * (len(sizes) != 1)}: sharding_strategy="
            + (
                "'HYBRID_SHARD' needs two, (replicate, shard)."
                if hybrid
                else "'FULL_SHARD' needs one, all ranks. For (replicate, shard) use sharding_strategy='HYBRID_SHARD'."
            )
        )
    return given


def _dtypes(given: Any) -> Dtypes:
    if not hasattr(given, "param_dtype") or not hasattr(given, "reduce_dtype"):
        raise MisconfigurationException(
            f"mixed_precision={given!r}: must be torch.distributed.fsdp.MixedPrecisionPolicy(...)."
        )
    if not hasattr(given, "buffer_dtype"):  # FSDP2's
        return Dtypes(given.param_dtype, given.reduce_dtype, given.output_dtype, given.cast_forward_inputs)
    if given.keep_low_precision_grads:
        raise MisconfigurationException(
            "mixed_precision=MixedPrecision(keep_low_precision_grads=True): gradients always have the dtype of the"
            " parameters that the optimizer steps. For gradients in half precision use precision='bf16-true'."
        )
    casts = bool(given.cast_forward_inputs or given.cast_root_forward_inputs)
    return Dtypes(given.param_dtype, given.reduce_dtype, None, casts, given.buffer_dtype)


_ALREADY: Mapping[str, tuple[Any, ...]] = {
    "use_orig_params": (True, None),
    "limit_all_gathers": (True, None),
    "sync_module_states": (True, None),
    "forward_prefetch": (False, None),
    "backward_prefetch": (None,),
    "param_init_fn": (None,),
    "process_group": (None,),
    "device_id": (None,),
    "ignored_modules": (None,),
    "ignored_parameters": (None,),
    "ignored_params": (None,),
    "ignored_states": (None,),
}
"""Arguments of FSDP1, each with the values that ask for what happens anyway."""

_NEW_WAY: Mapping[str, str] = {
    "use_orig_params": "parameters always keep their names and shapes; leave the argument out.",
    "limit_all_gathers": "the memory of gathered parameters is always limited; leave the argument out.",
    "sync_module_states": "all ranks always begin with the weights of rank 0; leave the argument out.",
    "forward_prefetch": "the next group is gathered while the last one computes, without an argument. To gather several"
    " ahead, call block.set_modules_to_forward_prefetch([...]) on the sharded blocks after setup.",
    "backward_prefetch": "the next group is always gathered early; leave the argument out. To gather several ahead,"
    " call block.set_modules_to_backward_prefetch([...]) on the sharded blocks after setup.",
    "param_init_fn": "a module from init_module(empty_init=True) gets its values by its submodules' reset_parameters():"
    " write the initialization there.",
    "process_group": "give device_mesh, the sizes of its dimensions or a DeviceMesh.",
    "device_id": "the device is that of the accelerator: Fabric(devices=...) or Trainer(devices=...).",
}


def _others(given: Mapping[str, Any]) -> tuple[Module | Tensor, ...]:
    """Refuse what has no meaning; returns what is not to be sharded."""
    ignored: list[Module | Tensor] = []
    for name, value in given.items():
        if name not in _ALREADY:
            raise UnknownArgumentError(f"{name}={value!r} is no argument of the strategy. {near_names(name, _known())}")
        if any(value is asked for asked in _ALREADY[name]) or _is_default(name, value):
            continue
        if name in _NEW_WAY:
            raise MisconfigurationException(f"{name}={value!r} is of FSDP1: {_NEW_WAY[name]}")
        found = [value] if isinstance(value, (Module, Tensor)) or not isinstance(value, Iterable) else [*value]
        wrong = next((each for each in found if not isinstance(each, (Module, Tensor))), None)
        if wrong is not None:
            raise MisconfigurationException(f"{name} has {wrong!r}: must be parameters or modules of the model.")
        ignored += found
    return tuple(ignored)


def _known() -> set[str]:
    return {*inspect.signature(parse_arguments).parameters, *_ALREADY} - {"others"}


def _is_default(name: str, value: Any) -> bool:
    """FSDP1 gathers the next group before it reduces the last one, as FSDP2 does."""
    return name == "backward_prefetch" and getattr(value, "name", None) == "BACKWARD_PRE"
