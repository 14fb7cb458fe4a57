"""Tensor parallelism by a plan: which layers are sharded over the ranks, and how, by patterns of their names.

Styles go together in pairs. In a feed-forward block the first layer is ``"colwise"``, so that each rank computes some
of the features, and the last ``"rowwise"``, which adds up what the ranks have. In attention the projections of
queries, keys and values are ``"colwise"``, so that each rank has some of the heads, and the output projection is
``"rowwise"``.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.parameter import is_lazy

from treadle_fabric.batches import map_tensors
from treadle_fabric.errors import MisconfigurationException, near_names
from treadle_fabric.rank_zero import rank_zero_warn
from treadle_fabric.strategies.sharding.broadcast import take_over_from_rank_zero
from treadle_fabric.strategies.sharding.replicated import after_each_gradient
from treadle_fabric.strategies.unwrapping import user_module, with_plain_names

__all__ = ["STYLES", "apply_tensor_parallel", "check_plan", "place_gradients"]

TensorParallelPlan: TypeAlias = Mapping[Any, Any]
"""Patterns of module names (str, or a compiled ``re.Pattern``) and their styles."""

STYLES: Final[dict[str, str]] = {
    "colwise": "Linear: each rank computes some of the output features. Embedding: some of the features.",
    "colwise_gathered": "as colwise, and the output is whole on every rank, such as logits",
    "colwise_logits": "as colwise, and the output is a DTensor, sharded on its last dimension, for loss_parallel",
    "rowwise": "Linear: each rank has some of the input features. Embedding: some of the entries. The output is whole.",
    "rowwise_scattered": "as rowwise, and each rank gets a slice of the sequence (dimension 1) of the output",
    "scattered_colwise": "as colwise, and the input is a slice of the sequence",
    "scattered_colwise_gathered": "as colwise_gathered, and the input is a slice of the sequence",
    "scattered_colwise_logits": "as colwise_logits, and the input is a slice of the sequence",
    "sequence": "a norm or a dropout: works on a slice of the sequence with whole parameters",
    "gather_sequence": "a block, such as attention: its first input is a slice of the sequence, and is made whole",
    "replicate": "every rank has the whole layer, as replicated DTensors",
}
"""The names of styles, and what they are for."""

_HEADS: Final = ("n_heads", "num_heads", "n_head", "nhead", "num_attention_heads", "n_kv_heads", "n_kv_head",
                 "num_kv_heads", "num_key_value_heads")  # fmt: skip
_FUSED: Final = frozenset(
    "qkv qkv_proj to_qkv wqkv c_attn in_proj query_key_value kv kv_proj to_kv gate_up_proj w12".split()
)


@dataclass(frozen=True)
class _Layer:
    """A layer that the plan names."""

    name: str
    module: Module
    pattern: Any
    style: Any
    parent: Module | None

    def __str__(self) -> str:
        return f"{self.name or 'the module itself'!r} ({type(self.module).__name__})"


def check_plan(plan: Any, what: str = "tensor_parallel_plan") -> None:
    """Refuse what is no plan; the names of layers are looked up where the plan is applied.

    Args:
        plan: The plan.
        what: The name of the argument.

    Raises:
        MisconfigurationException: The plan is no mapping of patterns to styles, or a style is unknown.
    """
    if not isinstance(plan, Mapping) or not plan:
        raise MisconfigurationException(
            f"{what}={plan!r}: must be a dict of patterns of module names and their styles, such as"
            " {'layers.*.mlp.up': 'colwise', 'layers.*.mlp.down': 'rowwise'}."
        )
    for pattern, style in plan.items():
        if not isinstance(pattern, (str, re.Pattern)):
            raise MisconfigurationException(
                f"{what}: the pattern {pattern!r} is a {type(pattern).__name__}. Give a name in which * stands for"
                " anything, or a compiled regular expression."
            )
        if isinstance(style, str) and style not in STYLES:
            torch_style = style.endswith(("Parallel", "Input", "Output"))
            raise MisconfigurationException(
                f"{what}: the style {style!r} of {_shown(pattern)} is unknown."
                + (" Pass torch's own styles as objects, such as ColwiseParallel()." if torch_style else "")
                + f" {near_names(style.lower(), STYLES)}"
            )
        if isinstance(style, type) or not (isinstance(style, str) or hasattr(style, "_apply")):
            call = f": call it, {style.__name__}()" if isinstance(style, type) else ""
            raise MisconfigurationException(
                f"{what}: the style {style!r} of {_shown(pattern)} is neither a name nor an object of torch's"
                f" ParallelStyle{call}. Names are: {', '.join(STYLES)}."
            )


def apply_tensor_parallel(module: Module, mesh: Any, plan: TensorParallelPlan, broadcast: bool = True) -> Module:
    """Shard the layers of a module over the ranks of a mesh.

    The parameters of the layers in the plan become DTensors, under the same names; everything else stays as it is.
    Parameters on the meta device are
    distributed there, without values. A mesh of one rank changes nothing.

    Attention sees the heads of its rank only. It must not count on all of them: a projection's output is viewed as
    ``q.view(b, t, -1, head_dim)``, not as ``q.view(b, t, n_heads, head_dim)``. One layer for queries, keys and values
    together must be three.

    Args:
        module: The user's module, or a wrapper; changed in place.
        mesh: A device mesh with one dimension.
        plan: Patterns of names of layers, and the style of each. In a name, ``*`` is anything, dots too; a
            ``re.Pattern`` matches the whole name. A style is a name in :data:`STYLES`, or an object of torch's
            ``ParallelStyle``.
        broadcast: Whether the ranks take over parameters and buffers from the first rank of the mesh; False where they
            are the same already.

    Returns:
        The module.

    Raises:
        MisconfigurationException: A pattern matches nothing, two match one layer, a layer cannot have its style, a size
            or a number of heads does not divide by the number of ranks, or layers that share a weight would shard it
            differently. Nothing is changed then.
    """
    check_plan(plan)
    if mesh.ndim != 1:
        raise MisconfigurationException(
            f"Tensor parallelism over a mesh of {mesh.ndim} dimensions, {mesh.mesh_dim_names}: give the one for"
            " it, such as mesh['tensor_parallel']."
        )
    own = user_module(module)
    _refuse_lazy(own)
    layers = _matched(own, plan)
    for layer in layers:
        _check_layer(layer, mesh.size())
    shared = _shared_parameters(own)
    _check_shared(shared, {id(layer.module): layer for layer in layers})
    if mesh.size() == 1:
        return module
    if broadcast:
        take_over_from_rank_zero(own, torch.device(mesh.device_type), group=mesh.get_group())
    before = {id(each): {**each._parameters} for each in own.modules()}
    for layer in layers:
        _apply(layer, mesh)
    _like_before(own, before)
    _share_again(shared)
    place_gradients(own)
    return module


# Which layers


def _refuse_lazy(own: Module) -> None:
    for name, parameter in with_plain_names(own, own.named_parameters()):
        if is_lazy(parameter):
            raise MisconfigurationException(
                f"The parameter {name!r} has no shape yet, so that layers cannot be sharded: run a batch through the"
                " model first, or give the layer its number of inputs."
            )


def _matched(own: Module, plan: TensorParallelPlan) -> list[_Layer]:
    named = dict(with_plain_names(own, own.named_modules(remove_duplicate=False)))
    layers: dict[int, _Layer] = {}
    for pattern, style in plan.items():
        found = [name for name in named if _matches(pattern, name)]
        if not found:
            raise MisconfigurationException(
                f"The tensor-parallel plan's {_shown(pattern)} matches no layer of {type(own).__name__}."
                f" {near_names(_shown(pattern)[1:-1], (name for name in named if name))}"
            )
        for name in found:
            module = named[name]
            known = layers.get(id(module))
            if known is not None and known.pattern is not pattern:
                raise MisconfigurationException(
                    f"Two patterns of the tensor-parallel plan match {known}: {_shown(known.pattern)} with"
                    f" {known.style!r} and {_shown(pattern)} with {style!r}. Make the patterns exclude each other; *"
                    " matches dots, too."
                )
            parent = named.get(name.rpartition(".")[0]) if name else None
            layers[id(module)] = known or _Layer(name, module, pattern, style, parent)
    return list(layers.values())


def _matches(pattern: Any, name: str) -> bool:
    if isinstance(pattern, str):
        return fnmatch.fnmatchcase(name, pattern)
    return pattern.fullmatch(name) is not None


def _shown(pattern: Any) -> str:
    return repr(pattern if isinstance(pattern, str) else pattern.pattern)


# Whether a layer can have its style


def _check_layer(layer: _Layer, size: int) -> None:
    module, kind = layer.module, _kind(layer.style)
    if isinstance(layer.parent, nn.MultiheadAttention):
        raise MisconfigurationException(
            f"{layer} is a part of torch.nn.MultiheadAttention, which uses the weights of its layers itself, so that"
            " they cannot be sharded. Use an attention with a Linear layer each for queries, keys, values and output."
        )
    if kind not in ("colwise", "rowwise"):
        return
    if not isinstance(module, (nn.Linear, nn.Embedding)):
        inner = [name for name, each in module.named_modules() if name and isinstance(each, (nn.Linear, nn.Embedding))]
        raise MisconfigurationException(
            f"The style {layer.style!r} is for Linear and Embedding layers; {_shown(layer.pattern)} matches {layer}."
            + (f" Name the layers in it: {', '.join(inner[:6])}." if inner else " Leave it out, or use 'replicate'.")
        )
    if any(True for _ in module.children()):
        raise MisconfigurationException(
            f"{layer} has a parametrization or layers of its own, so its weight cannot be sharded by"
            f" {layer.style!r}: apply the plan first, or leave the layer out."
        )
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.sparse):
        raise MisconfigurationException(
            f"{layer} has max_norm={module.max_norm} and sparse={module.sparse}: a sharded embedding has neither a"
            " largest norm nor sparse gradients. Leave it out of the plan, or make it without."
        )
    _check_sizes(layer, kind, size)


def _check_sizes(layer: _Layer, kind: str, size: int) -> None:
    module: Any = layer.module
    linear = isinstance(module, nn.Linear)
    if kind == "colwise":
        what, features = ("out_features", module.out_features) if linear else ("embedding_dim", module.embedding_dim)
        whole = isinstance(layer.style, str) and layer.style.endswith(("_gathered", "_logits"))
        if features % size and not whole:
            raise _uneven(layer, what, features, size)
        if linear and not whole:
            _check_heads(layer, features, size)
            if layer.name.rpartition(".")[2].lower() in _FUSED:
                rank_zero_warn(
                    f"{layer} seems to compute several things at once, such as queries, keys and values. 'colwise'"
                    " gives each rank one contiguous part of the output features: the first rank the queries, say."
                    " Unless the parts of each head lie together, make it several layers."
                )
    elif linear and module.in_features % size:
        raise _uneven(layer, "in_features", module.in_features, size)


def _check_heads(layer: _Layer, features: int, size: int) -> None:
    parent = layer.parent
    for name in _HEADS:
        heads = getattr(parent, name, None)
        if isinstance(heads, int) and not isinstance(heads, bool) and heads > 0 and heads % size:
            raise MisconfigurationException(
                f"{layer} is sharded over {size} ranks, and {type(parent).__name__}.{name}={heads}: {heads} heads"
                f" cannot be shared evenly. Choose a tensor_parallel_size that divides {heads}, or leave the layer out."
            )
    width = getattr(parent, "head_dim", None)
    if isinstance(width, int) and not isinstance(width, bool) and width > 0 and (features // size) % width:
        raise MisconfigurationException(
            f"{layer} has {features} output features, {features // size} on each of {size} ranks, and"
            f" {type(parent).__name__}.head_dim={width}: a head would be cut in two. Choose a tensor_parallel_size that"
            f" divides the {features // width} heads, or leave the layer out."
        )


def _uneven(layer: _Layer, what: str, features: int, size: int) -> MisconfigurationException:
    return MisconfigurationException(
        f"{layer} has {what}={features}, which {size} tensor-parallel ranks cannot share evenly, as {layer.style!r}"
        f" needs it. Choose a tensor_parallel_size that divides {features}, leave the layer out of the plan, or make it"
        f" wider, {-(-features // size) * size} say."
    )


def _kind(style: Any) -> str:
    """What a style does to a layer's parameters; empty where only torch knows."""
    if isinstance(style, str):
        for kind in ("colwise", "rowwise"):
            if kind in style:
                return kind
        return "" if style == "gather_sequence" else "whole"
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel  # heavy

    kinds = {ColwiseParallel: "colwise", RowwiseParallel: "rowwise", SequenceParallel: "whole"}
    return next((kind for cls, kind in kinds.items() if isinstance(style, cls)), "")


# Weights that several layers share


def _shared_parameters(own: Module) -> list[list[tuple[str, Module, str]]]:
    """For each parameter that has several owners: the full name, the owner and the name there."""
    owners: dict[int, list[tuple[str, Module, str]]] = {}
    for path, module in with_plain_names(own, own.named_modules()):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((f"{path}.{name}".lstrip("."), module, name))
    return [each for each in owners.values() if len(each) > 1]


def _check_shared(shared: list[list[tuple[str, Module, str]]], layers: Mapping[int, _Layer]) -> None:
    for owners in shared:
        ways = {}
        for full, module, name in owners:
            layer = layers.get(id(module))
            ways[full] = "" if layer is None else _way(layer, name)
        if len({way for way in ways.values() if way != "?"}) > 1:
            told = "; ".join(f"{full}: {way or 'not sharded'}" for full, way in ways.items())
            raise MisconfigurationException(
                f"Layers share a weight, and the tensor-parallel plan shards it differently: {told}. Shard all alike:"
                " an embedding tied to the head is 'rowwise' where the head is 'colwise', 'colwise_gathered' or"
                " 'colwise_logits'."
            )


def _way(layer: _Layer, name: str) -> str:
    kind = _kind(layer.style)
    if kind in ("", "whole"):
        return "" if layer.style == "gather_sequence" else "replicated" if kind else "?"
    if isinstance(layer.module, nn.Linear):
        dim = 0 if kind == "colwise" else 1
        return "replicated" if name == "bias" and kind == "rowwise" else f"sharded in dimension {dim}"
    return f"sharded in dimension {1 if kind == 'colwise' else 0}"


def _share_again(shared: list[list[tuple[str, Module, str]]]) -> None:
    for owners in shared:
        (first, module, name), *others = owners
        parameter: Any = module._parameters[name]
        for full, other, there in others:
            mine: Any = other._parameters[there]
            if getattr(mine, "placements", None) != getattr(parameter, "placements", None):  # by a style of the user's
                raise MisconfigurationException(
                    f"{first} and {full} are one weight, and were sharded differently: give both layers styles that"
                    " shard the weight alike."
                )
            other.register_parameter(there, parameter)


# Sharding


def _apply(layer: _Layer, mesh: Any) -> None:
    from torch.distributed.tensor.parallel import parallelize_module  # heavy

    if layer.style == "gather_sequence":
        layer.module.register_forward_pre_hook(_gathering(mesh), with_kwargs=True)
    elif layer.style == "replicate":
        _replicate(layer.module, mesh)
    else:
        if isinstance(layer.style, str) and layer.style.endswith("_scattered"):
            layer.module.register_forward_pre_hook(_checking_length(layer, mesh.size()))
        style = _torch_style(layer) if isinstance(layer.style, str) else layer.style
        try:
            parallelize_module(layer.module, mesh, style, src_data_rank=None)  # values are alike already
        except (NotImplementedError, RuntimeError) as error:
            raise MisconfigurationException(f"The style {layer.style!r} cannot be that of {layer}: {error}") from error


def _torch_style(layer: _Layer) -> Any:
    from torch.distributed.tensor import Replicate, Shard  # heavy
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel  # heavy

    name = layer.style
    if name == "sequence":
        return SequenceParallel(use_local_output=True)
    if name.startswith("rowwise"):
        return RowwiseParallel(
            input_layouts=Shard(-1) if isinstance(layer.module, nn.Linear) else Replicate(),
            output_layouts=Shard(1) if name == "rowwise_scattered" else Replicate(),
        )
    return ColwiseParallel(
        input_layouts=Shard(1) if name.startswith("scattered_") else Replicate(),
        output_layouts=Replicate() if name.endswith("_gathered") else Shard(-1),
        use_local_output=not name.endswith("_logits"),
    )


def _gathering(mesh: Any) -> Callable[..., Any]:
    """A hook that makes the first input of a block whole."""
    from torch.distributed.tensor import DTensor, Replicate, Shard  # heavy

    def whole(tensor: Tensor) -> Tensor:
        sliced = DTensor.from_local(tensor, mesh, [Shard(1)], run_check=False)
        gathered: Tensor = sliced.redistribute(placements=[Replicate()]).to_local()
        return gathered

    def gather(module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (whole(args[0]), *args[1:]), kwargs
        name = next(name for name, value in kwargs.items() if isinstance(value, Tensor))
        return args, {**kwargs, name: whole(kwargs[name])}

    return gather


def _checking_length(layer: _Layer, size: int) -> Callable[..., None]:
    def check(module: Module, args: tuple[Any, ...]) -> None:
        length = args[0].shape[1] if args and args[0].dim() > 1 else size
        if length % size:
            raise MisconfigurationException(
                f"{layer} gets sequences of {length} positions, which {size} tensor-parallel ranks cannot share evenly,"
                f" as {layer.style!r} needs it. Pad them to {-(-length // size) * size}."
            )

    return check


def _replicate(module: Module, mesh: Any) -> None:
    from torch.distributed.tensor import DTensor, Replicate  # heavy

    def distribute(value: Any) -> Any:
        return map_tensors(
            value,
            lambda t: t if isinstance(t, DTensor) else DTensor.from_local(t, mesh, [Replicate()], run_check=False),
        )

    def to_local(value: Any) -> Any:
        return map_tensors(
            value, lambda t: t.redistribute(placements=[Replicate()]).to_local() if isinstance(t, DTensor) else t
        )

    module.register_forward_pre_hook(
        lambda _, args, kwargs: (distribute(args), distribute(kwargs)), with_kwargs=True, prepend=True
    )
    module.register_forward_hook(lambda _, args, output: to_local(output))
    for each in module.modules():
        for name, parameter in each._parameters.items():
            if parameter is not None and not isinstance(parameter, DTensor):
                whole = DTensor.from_local(parameter.detach(), mesh, [Replicate()], run_check=False)
                each.register_parameter(name, Parameter(whole, requires_grad=parameter.requires_grad))
        for name, buffer in each._buffers.items():
            if buffer is not None and not isinstance(buffer, DTensor):
                each._buffers[name] = DTensor.from_local(buffer, mesh, [Replicate()], run_check=False)


def _like_before(own: Module, before: Mapping[int, Mapping[str, Parameter | None]]) -> None:
    """Give new parameters what torch's styles do not take over: whether they are frozen, and own attributes."""
    for module in own.modules():
        for name, parameter in module._parameters.items():
            old = before[id(module)].get(name)
            if parameter is not None and old is not None and parameter is not old:
                parameter.requires_grad_(old.requires_grad)
                parameter.__dict__.update(
                    {key: value for key, value in vars(old).items() if not hasattr(parameter, key)}
                )


# Gradients


def place_gradients(module: Module) -> None:
    """Let the gradients of DTensor parameters be sharded as the parameters are, once each is accumulated.

    Torch leaves some as sums that are still to be added up over the ranks, and some whole. Call this again where
    parameters were made anew, as from the meta device.

    Args:
        module: The module, after :func:`apply_tensor_parallel`.
    """
    from torch.distributed.tensor import DTensor  # heavy

    for parameter in module.parameters():
        hooks = parameter._post_accumulate_grad_hooks or {}
        if isinstance(parameter, DTensor) and _place not in hooks.values():
            after_each_gradient(parameter, _place)


def _place(parameter: Any) -> None:
    gradient = parameter.grad
    if gradient is not None and gradient.placements != parameter.placements:
        with torch.no_grad():
            parameter.grad = gradient.redistribute(placements=parameter.placements)
