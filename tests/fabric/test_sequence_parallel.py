"""Sequences shared out over ranks: attention over the whole, random numbers, slices of batches."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.tensor.parallel  # heavy; the forks inherit it
import torch.nn.functional as F
from tests.fabric.gpt import GPT, LENGTH, batches
from tests.processes import run_in_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

from treadle_fabric import MisconfigurationException
from treadle_fabric.strategies.parallelism.sequence import (
    SequenceGroup,
    attentions_so_far,
    local_attention,
    sequence_attention,
    sequence_functions,
    sequence_offset,
    share_sequences,
    split_sequence,
)
from treadle_fabric.strategies.parallelism.substitution import Substitution


def _in_ranks(function: Callable[..., None], devices: int = 2) -> None:
    def run() -> None:
        dist.init_process_group("gloo", rank=int(os.environ["LOCAL_RANK"]), world_size=devices)
        try:
            function(init_device_mesh("cpu", (devices,), mesh_dim_names=("sequence_parallel",)))
        finally:
            share_sequences(None)
            dist.destroy_process_group()

    run_in_ranks(run, devices=devices)


def _drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _slice(tensor: Tensor, ranks: SequenceGroup, dim: int = -2) -> Tensor:
    return tensor.chunk(ranks.size, dim)[ranks.rank].contiguous()


def _attentions(mesh: Any) -> None:
    ranks = SequenceGroup.of(mesh)
    b, h, t, e = 2, 4, 8, 5
    bias = _drawn(b, h, t, t, seed=9)
    for kv_heads, value_width, options in (
        (h, e, {}),
        (h, 3, {"is_causal": True}),
        (h, e, {"attn_mask": bias, "scale": 0.3}),
        (h, e, {"attn_mask": bias[0, 0] > 0}),
        (h, e, {"attn_mask": bias[:, :1, :1] > 0}),
        (2, e, {"is_causal": True, "enable_gqa": True}),
        (1, e, {"enable_gqa": True}),
    ):
        whole = [_drawn(b, h, t, e), _drawn(b, kv_heads, t, e, seed=1), _drawn(b, kv_heads, t, value_width, seed=2)]
        slices = [_slice(each, ranks).requires_grad_() for each in whole]
        whole = [each.requires_grad_() for each in whole]
        expected = F.scaled_dot_product_attention(*whole, **options)
        attended = sequence_attention(*slices, mesh, **options)
        assert attended.shape == (b, h, t // ranks.size, value_width)
        torch.testing.assert_close(attended, _slice(expected, ranks))
        expected.square().sum().backward()
        attended.square().sum().backward()
        for mine, of_all in zip(slices, whole, strict=True):
            torch.testing.assert_close(mine.grad, _slice(of_all.grad, ranks))
    with pytest.raises(MisconfigurationException, match=f"has 3 heads, which {ranks.size} sequence-parallel ranks"):
        sequence_attention(*[_drawn(1, 3, 4, 2)] * 3, mesh)
    q = _drawn(1, h, t // ranks.size, e)
    with pytest.raises(MisconfigurationException, match=rf"\(4, 4\), 4 queries.*whole sequences, {t} queries"):
        sequence_attention(q, q, q, mesh, attn_mask=torch.ones(4, 4))
    with pytest.raises(MisconfigurationException, match="shape \\(4, 4, 5\\)"):
        sequence_attention(*[_drawn(h, 4, e)] * 3, mesh)
    _in_context(mesh, ranks)


def _in_context(mesh: Any, ranks: SequenceGroup) -> None:
    """What a model calls while the context is there."""
    assert sequence_offset(4) == 0
    share_sequences(mesh)
    assert sequence_offset(4) == 4 * ranks.rank
    x = _drawn(1, 4, LENGTH, 4)
    mine, before = _slice(x, ranks), attentions_so_far()
    causal = F.scaled_dot_product_attention(x, x, x, is_causal=True)
    with Substitution(sequence_functions()):
        attended = F.scaled_dot_product_attention(mine, mine, mine, None, 0.0, True)
        torch.testing.assert_close(attended, _slice(causal, ranks))
        assert attentions_so_far() == before + 1
        with local_attention():
            alone = F.scaled_dot_product_attention(mine, mine, mine, is_causal=True)
        assert attentions_so_far() == before + 1
        with pytest.raises(MisconfigurationException, match="nn.MultiheadAttention"):
            nn.MultiheadAttention(4, 2)(mine[0], mine[0], mine[0])
        # dropout differs; every other number does not, nor does it after a dropout
        torch.manual_seed(7)
        dropped = nn.Dropout()(torch.ones(64))
        attended = F.scaled_dot_product_attention(mine, mine, torch.ones_like(mine), dropout_p=0.5)
        common = torch.rand(4)
        unchanged = nn.Dropout()(torch.ones(4)) if ranks is None else F.dropout(torch.ones(4), training=False)
    assert unchanged.equal(torch.ones(4)) and len(set(dropped.tolist())) == 2 and len(set(attended[0, 0, :, 0])) > 1
    torch.testing.assert_close(alone, F.scaled_dot_product_attention(mine, mine, mine, is_causal=True))
    for tensor, same in ((dropped, False), (common, True)):
        gathered = [torch.empty_like(tensor) for _ in range(ranks.size)]
        dist.all_gather(gathered, tensor)
        assert all(gathered[0].equal(each) for each in gathered[1:]) == same
    torch.manual_seed(7)
    with Substitution(sequence_functions()):
        assert nn.Dropout()(torch.ones(64)).equal(dropped)


class Checkpointed(GPT):
    def forward(self, tokens: Tensor) -> Any:
        t = tokens.shape[1]
        x = self.embed(tokens) + self.positions(torch.arange(t)[None] + sequence_offset(t))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(self.norm(x))


def _equals_one_process(mesh: Any) -> None:
    """Losses and weights, with accumulation, clipping, recomputed activations and targets that do not count."""
    share_sequences(mesh)
    ranks = SequenceGroup.of(mesh)
    torch.manual_seed(1)
    reference = Checkpointed()
    model = copy.deepcopy(reference)
    data = batches(6)
    for _, targets in data:
        targets[:, -3:] = -100
    share_sequences(None)
    expected = _train(reference, data, SequenceGroup())
    share_sequences(mesh)
    losses = _train(model, data, ranks)
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.state_dict(), reference.state_dict(), atol=1e-5, rtol=0)


def _train(model: GPT, data: Any, ranks: SequenceGroup) -> list[float]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1, 0.9)
    losses, context = [], Substitution(sequence_functions(ranks))
    context.follow(model.modules())
    for index, batch in enumerate(data):
        tokens, targets = split_sequence(batch, ranks)
        counts = (batch[1] != -100).sum() / ranks.size
        with context:
            # a sum over the mean number of targets of a rank: the mean of the ranks' gradients is that of the mean
            loss = model.loss(tokens, targets, reduction="sum") / counts / 2
            if index % 2:  # in the context, as in manual optimization
                loss.backward()
        if not index % 2:
            loss.backward()
        whole = loss.detach().clone()
        if ranks.size > 1:
            dist.all_reduce(whole)
        losses.append(whole.item() / ranks.size)
        if index:
            for p in model.parameters():
                if p.grad is not None and ranks.size > 1:
                    dist.all_reduce(p.grad)
                    p.grad /= ranks.size
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
    return losses


def test_attention_over_whole_sequences() -> None:
    _in_ranks(_attentions)


def test_heads_of_four_ranks() -> None:
    _in_ranks(_attentions, devices=4)


def test_equals_one_process() -> None:
    _in_ranks(_equals_one_process)


@dataclass
class Record:
    tokens: Tensor
    labels: Tensor
    sizes: Tensor


def test_slices_of_a_batch() -> None:
    tokens, mask, features = torch.arange(12).view(2, 6), torch.ones(2, 1, 6, 6), torch.rand(2, 3)
    ranks = SequenceGroup(None, 1, 2)
    x, y, name, other, size = split_sequence((tokens, tokens + 1, "name", features, torch.tensor([6, 6])), ranks)
    assert x.tolist() == [[3, 4, 5], [9, 10, 11]] and x.is_contiguous() and (y - x).eq(1).all()
    assert name == "name" and other is features and size.tolist() == [6, 6]
    batch = {"ids": tokens, "mask": mask, "square": torch.ones(2, 6, 6), "embedded": torch.rand(2, 6, 4)}
    parts = split_sequence(batch, ranks, names=["ids", "embedded"])
    assert [tuple(each.shape) for each in parts.values()] == [(2, 3), (2, 1, 6, 6), (2, 6, 6), (2, 3, 4)]
    record = split_sequence(Record(tokens, tokens, torch.ones(2)), ranks)
    assert isinstance(record, Record) and record.labels.shape == (2, 3) and record.sizes.shape == (2,)
    assert split_sequence([tokens, features], ranks, names=[0])[0].shape == (2, 3)
    assert split_sequence(tokens.T, ranks, dim=0).tolist() == [[3, 9], [4, 10], [5, 11]]
    assert split_sequence(batch, SequenceGroup()) is batch
    with pytest.raises(MisconfigurationException, match=r"\(2, 7\) has 7 positions.*2 sequence.*Pad .* to 8 positions"):
        split_sequence(torch.ones(2, 7), ranks)
    with pytest.raises(MisconfigurationException, match="no 'id'; it has 'ids', 'mask'"):
        split_sequence(batch, ranks, names=["id"])
    with pytest.raises(MisconfigurationException, match="No tensor of the batch has the dimension 1"):
        split_sequence([torch.ones(3)], ranks)
