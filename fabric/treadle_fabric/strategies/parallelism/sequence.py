"""Sequence parallelism of the Ulysses kind: ranks share a batch, each has a slice of every sequence.

All that works on each position alone runs on the slices. Attention needs whole sequences: an all-to-all exchange gives
each rank the whole sequence of a part of the heads, and another one, after attention, the slice of all heads (Jacobs et
al., "DeepSpeed Ulysses", 2023).

The loss of a rank is the mean over its own positions, and gradients are averaged over the ranks that share a sequence
as they are over those that share a batch: over the data-parallel and sequence-parallel dimensions of the mesh together.
That is the mean over all positions where each rank's slice has the same number of positions that count. Where some are
left out (``ignore_index``), the loss needs its number of positions as a weight.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Collection, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from treadle_fabric.batches import map_tensors
from treadle_fabric.containers import children, leaves
from treadle_fabric.errors import MisconfigurationException

__all__ = [
    "SequenceGroup",
    "attentions_so_far",
    "local_attention",
    "sequence_attention",
    "sequence_functions",
    "sequence_offset",
    "share_sequences",
    "split_sequence",
]


@dataclass(frozen=True)
class SequenceGroup:
    """The ranks that share sequences.

    Args:
        group: The process group; None where the sequences are whole.
        rank: The index of this rank's slice.
        size: The number of slices.
    """

    group: Any = None
    rank: int = 0
    size: int = 1

    @classmethod
    def of(cls, where: Any) -> SequenceGroup:
        """Return the ranks of a one-dimensional mesh or of a process group; None: those of the running strategy."""
        if where is None:
            ranks = _running.ranks
            return ranks if ranks.size == 1 or _is_there(ranks.group) else cls()
        if isinstance(where, SequenceGroup):
            return where
        if hasattr(where, "get_group"):  # a mesh
            if where.ndim != 1:
                raise MisconfigurationException(
                    f"A mesh of {where.ndim} dimensions, {where.mesh_dim_names}: sequences are shared along one. Give"
                    " mesh['sequence_parallel']."
                )
            where = where.get_group()
        return cls(where, dist.get_rank(where), dist.get_world_size(where))


def _is_there(group: Any) -> bool:
    """Whether a process group has not ended."""
    try:
        return bool(dist.get_process_group_ranks(group))
    except (KeyError, ValueError, RuntimeError):
        return False


@dataclass
class _Running:
    """What goes on in this process, in all its threads: the backward pass has some of its own."""

    ranks: SequenceGroup = SequenceGroup()
    attentions: int = 0


_running = _Running()
_within_slice = ContextVar("within_slice", default=False)


def share_sequences(where: Any) -> None:
    """Set the ranks that share sequences in this process, from a strategy's set-up until its end.

    Args:
        where: A one-dimensional mesh or a process group; None: sequences are whole.
    """
    _running.ranks = SequenceGroup() if where is None else SequenceGroup.of(where)


def attentions_so_far() -> int:
    """Return how many attentions over whole sequences this process has computed from slices."""
    return _running.attentions


def sequence_offset(length: int, where: Any = None) -> int:
    """Return the position, in its sequence, of the first token of this rank's slice.

    A model adds it to the positions that it computes, and runs alike with whole sequences, where it is 0:
    ``positions = torch.arange(t, device=x.device) + sequence_offset(t)``. A batch that brings its positions along, as a
    tensor of the tokens' shape, needs no offset: positions are sliced as tokens are.

    Args:
        length: The number of positions of the slice.
        where: The mesh or group of the ranks that share sequences. Default: the running strategy's.
    """
    return SequenceGroup.of(where).rank * length


def split_sequence(batch: Any, where: Any = None, dim: int = 1, names: Collection[str | int] | None = None) -> Any:
    """Give this rank its slice of the sequences of a batch that all ranks of a group have.

    Args:
        batch: Tensors in containers of any kind. Targets that are tokens of other positions, such as the next ones, are
            made before the split.
        where: The mesh or group of the ranks that share sequences. Default: the running strategy's.
        dim: The dimension of the positions. Default: 1, after the batch.
        names: The keys of a batch, the indices of a tuple or the fields of an object whose tensors are sliced. Default:
            every tensor that has as many positions as the first tensor with this dimension.

    Returns:
        The same structure. Sliced tensors are contiguous copies; everything else is the same object.

    Raises:
        MisconfigurationException: No tensor has that dimension, a name is not in the batch, or a length does not divide
            by the number of ranks.
    """
    ranks = SequenceGroup.of(where)
    if ranks.size == 1:
        return batch
    sliced = _sliced(batch, dim, names)

    def cut(tensor: Tensor) -> Tensor:
        if id(tensor) not in sliced:
            return tensor
        length, left = divmod(tensor.shape[dim], ranks.size)
        if left:
            raise MisconfigurationException(
                f"A tensor of shape {tuple(tensor.shape)} has {tensor.shape[dim]} positions in dimension {dim}, which"
                f" {ranks.size} sequence-parallel ranks cannot share evenly. Pad the sequences to"
                f" {math.ceil(tensor.shape[dim] / ranks.size) * ranks.size} positions (targets with the ignore_index of"
                " the loss), or cut them."
            )
        return tensor.narrow(dim, ranks.rank * length, length).contiguous()

    return map_tensors(batch, cut)


def _sliced(batch: Any, dim: int, names: Collection[str | int] | None) -> set[int]:
    """The ids of the tensors to slice."""
    if names is not None:
        parts = dict(children(batch) or ())
        unknown = [name for name in names if name not in parts]
        if unknown:
            raise MisconfigurationException(
                f"names={list(names)!r}: the batch has no {', '.join(map(repr, unknown))}; it has"
                f" {', '.join(map(repr, parts)) or 'nothing'}."
            )
        batch = [parts[name] for name in names]
    tensors = [each for each in leaves(batch, lambda leaf: isinstance(leaf, Tensor)) if each.dim() > dim]
    if not tensors:
        raise MisconfigurationException(
            f"No tensor of the batch has the dimension {dim} of positions that sequence-parallel ranks share. Give the"
            " dimension that has them."
        )
    length = tensors[0].shape[dim]
    return {id(each) for each in tensors if names is not None or each.shape[dim] == length}


def sequence_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    where: Any = None,
    *,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Compute scaled dot-product attention over whole sequences, of which each rank has a slice.

    Args:
        query: Shape ``(..., heads, positions of the slice, features)``.
        key: The same of the keys; fewer heads with ``enable_gqa``.
        value: The same of the values.
        where: The mesh or group of the ranks that share sequences. Default: the running strategy's.
        attn_mask: Of whole sequences: broadcastable to ``(..., heads, all positions, all positions)``.
        dropout_p: Drawn for each rank differently.
        is_causal: Causal over whole sequences.
        scale: Of the logits. Default: ``1 / sqrt(features)``.
        enable_gqa: Keys and values may have fewer heads.

    Returns:
        Shape ``(..., heads, positions of the slice, features of the values)``.

    Raises:
        MisconfigurationException: The heads do not divide by the number of ranks, or the mask is not one of whole
            sequences.
    """
    ranks = SequenceGroup.of(where)
    options: dict[str, Any] = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
    if enable_gqa:
        options["enable_gqa"] = True
    if ranks.size == 1:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, **options)
    _running.attentions += 1
    _check_heads(query, ranks.size)
    key, value = (_repeated(each, query.shape[-3], ranks.size) for each in (key, value))
    mask = _mask_of_heads(attn_mask, query, key, ranks)
    query, key, value = _to_heads([query, key, value], ranks)
    with _drawing_apart(query.device, ranks) if dropout_p else contextlib.nullcontext():
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, **options)
    return _to_slices(attended, ranks)


def _check_heads(query: Tensor, size: int) -> None:
    if query.dim() < 4:
        raise MisconfigurationException(
            f"Attention with a query of shape {tuple(query.shape)}: sequence parallelism shares out heads, in dimension"
            " -3. Give a query of shape (batch, heads, positions, features)."
        )
    if query.shape[-3] % size:
        raise MisconfigurationException(
            f"Attention has {query.shape[-3]} heads, which {size} sequence-parallel ranks cannot share evenly. Choose a"
            " sequence_parallel_size that divides the number of heads (that of a rank, where tensor parallelism shares"
            " out heads, too)."
        )


def _repeated(tensor: Tensor, heads: int, size: int) -> Tensor:
    """Keys or values, with each head as often as it needs to be for the ranks to share them."""
    own = tensor.shape[-3]
    if own % size == 0:
        return tensor
    times = size // math.gcd(own, size)
    if heads % (own * times):
        times = heads // own
    return tensor.repeat_interleave(times, dim=-3)


def _mask_of_heads(mask: Tensor | None, query: Tensor, key: Tensor, ranks: SequenceGroup) -> Tensor | None:
    """The part of a mask for this rank's heads."""
    if mask is None:
        return None
    for dim, tensor, what in ((-2, query, "queries"), (-1, key, "keys")):
        whole = tensor.shape[-2] * ranks.size
        if mask.dim() >= -dim and mask.shape[dim] not in (1, whole):
            raise MisconfigurationException(
                f"The attention mask has the shape {tuple(mask.shape)}, {mask.shape[dim]} {what}. Under sequence"
                f" parallelism attention is over whole sequences, {whole} {what} on {ranks.size} ranks, and so is its"
                " mask: make it of the whole length, and do not slice it with the batch (leave it out of the names"
                " that are split)."
            )
    heads = query.shape[-3]
    if mask.dim() < 3 or mask.shape[-3] != heads or heads == 1:
        return mask
    mine = heads // ranks.size
    return mask.narrow(-3, ranks.rank * mine, mine)


# The exchange: a rank gives each other rank the part that is its own, along a first dimension of the ranks


class _Exchange(torch.autograd.Function):
    """An all-to-all along the first dimension; its gradient is exchanged back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        tensor = tensor.contiguous()
        received = torch.empty_like(tensor)
        dist.all_to_all_single(received, tensor, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _exchange(gradient, ctx.group), None


_exchange: Callable[[Tensor, Any], Tensor] = _Exchange.apply


def _to_heads(tensors: list[Tensor], ranks: SequenceGroup) -> list[Tensor]:
    """Slices of all heads become whole sequences of this rank's heads: in one exchange, where all have one shape."""
    alike = len({(each.dtype, *each.shape[:-3], *each.shape[-2:]) for each in tensors}) == 1
    parts = [_parts(each, -3, ranks) for each in tensors]
    if not alike:
        return [_whole(_exchange(part, ranks.group)) for part in parts]
    counts = [part.shape[-3] for part in parts]
    exchanged = _exchange(torch.cat(parts, dim=-3), ranks.group)
    return [_whole(part) for part in torch.split(exchanged, counts, dim=-3)]


def _parts(tensor: Tensor, dim: int, ranks: SequenceGroup) -> Tensor:
    """Split a dimension, counted from the end, into the parts of the ranks, along a new first dimension."""
    parts: Tensor = tensor.unflatten(dim, (ranks.size, -1))  # type: ignore[no-untyped-call]
    return parts.movedim(dim - 1, 0)


def _whole(parts: Tensor) -> Tensor:
    """Join the slices along the first dimension: ``(ranks, ..., heads, slice, features)``."""
    return parts.movedim(0, -3).flatten(-3, -2)


def _to_slices(tensor: Tensor, ranks: SequenceGroup) -> Tensor:
    """Whole sequences of this rank's heads become its slice of all heads."""
    parts = _parts(tensor, -2, ranks)
    return _exchange(parts, ranks.group).movedim(0, -4).flatten(-4, -3)


# The context of a forward pass


_DROPOUTS: Final = (
    F.dropout, F.alpha_dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.feature_alpha_dropout, torch.dropout
)  # fmt: skip


@contextlib.contextmanager
def local_attention() -> Iterator[None]:
    """A context in which attention is within this rank's slice: it is not about the positions of the sequence.

    Such as attention over channels, or over the frames of each position.
    """
    token = _within_slice.set(True)
    try:
        yield
    finally:
        _within_slice.reset(token)


def sequence_functions(where: Any = None) -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return what takes the place of torch's functions in the forward pass of a rank that has slices of sequences.

    ``F.scaled_dot_product_attention`` is over whole sequences. Dropout is drawn for each rank differently; every other
    random number is the same on all ranks that share sequences, as a noise level of each sample has to be.

    Args:
        where: The mesh or group of the ranks that share sequences. Default: the running strategy's.
    """
    ranks = SequenceGroup.of(where)
    if ranks.size == 1:
        return {}

    def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        kwargs.update(zip(("dropout_p", "is_causal"), args, strict=False))
        if _within_slice.get():
            return F.scaled_dot_product_attention(query, key, value, attn_mask, **kwargs)
        return sequence_attention(query, key, value, ranks, attn_mask=attn_mask, **kwargs)

    dropouts = {each: functools.partial(_drop_apart, each, ranks) for each in _DROPOUTS}
    return {
        F.scaled_dot_product_attention: attend,
        F.multi_head_attention_forward: _refuse_multi_head,
        **dropouts,
    }


def _refuse_multi_head(*args: Any, **kwargs: Any) -> Any:
    raise MisconfigurationException(
        "torch.nn.MultiheadAttention, also that of torch.nn.TransformerEncoderLayer, takes its input for the whole"
        " sequence, and under sequence parallelism it is a slice. Use an attention that projects queries, keys and"
        " values and calls F.scaled_dot_product_attention."
    )


def _drop_apart(function: Callable[..., Tensor], ranks: SequenceGroup, *args: Any, **kwargs: Any) -> Tensor:
    training = kwargs.get("training", args[2] if len(args) > 2 else True)
    if not training:
        return function(*args, **kwargs)
    tensor: Tensor = args[0] if args else kwargs["input"]
    with _drawing_apart(tensor.device, ranks):
        return function(*args, **kwargs)


@contextlib.contextmanager
def _drawing_apart(device: torch.device, ranks: SequenceGroup) -> Iterator[None]:
    """Random numbers drawn inside are this rank's own; those drawn after it are the same on all ranks again.

    The seed is drawn from the generator that the ranks have alike, so that a run resumed exactly draws the same.
    """
    seed = int(torch.randint(2**48, (), device="cpu")) * ranks.size + ranks.rank
    module: Any = torch if device.type == "cpu" else torch.get_device_module(device)
    before = module.get_rng_state()
    (torch.default_generator if device.type == "cpu" else module).manual_seed(seed)
    try:
        yield
    finally:
        module.set_rng_state(before)
