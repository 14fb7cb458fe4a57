"""A small causal transformer, written as a user would who knows that its layers may be shared out."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from treadle_fabric.strategies.parallelism.sequence import sequence_offset

VOCABULARY, WIDTH, HEADS, LENGTH = 13, 16, 4, 8

# Activations that every rank has whole
PLAN = {
    "embed": "rowwise",
    "blocks.*.attention.[qkv]": "colwise",
    "blocks.*.attention.o": "rowwise",
    "blocks.*.up": "colwise",
    "blocks.*.down": "rowwise",
    "head": "colwise_logits",
}
# Between the layers, slices of the sequence
SLICED_PLAN = {
    "embed": "rowwise_scattered",
    "positions": "rowwise_scattered",
    "blocks.*.norm?": "sequence",
    "blocks.*.attention": "gather_sequence",
    "blocks.*.attention.[qkv]": "colwise",
    "blocks.*.attention.o": "rowwise_scattered",
    "blocks.*.up": "scattered_colwise",
    "blocks.*.down": "rowwise_scattered",
    "norm": "sequence",
    "head": "scattered_colwise_gathered",
}


class Attention(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.n_heads, self.head_dim, self.dropout = HEADS, WIDTH // HEADS, dropout
        # a bias of the keys would have a gradient of nothing but rounding
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.o = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (layer(x).view(b, t, -1, self.head_dim).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout if self.training else 0.0)
        return self.o(y.transpose(1, 2).reshape(b, t, -1))


class Block(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention(0.0)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attention(self.norm1(x)))
        return x + self.drop(self.down(F.gelu(self.up(self.norm2(x)))))


class GPT(nn.Module):
    def __init__(self, *, dropout: float = 0.0, tied: bool = True, frozen: bool = True) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        if frozen:
            self.blocks[0].up.bias.requires_grad_(False)
            self.norm.bias.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Any:
        t = tokens.shape[1]
        x = self.embed(tokens) + self.positions(torch.arange(t)[None] + sequence_offset(t))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def loss(self, tokens: Tensor, targets: Tensor, **options: Any) -> Tensor:
        return F.cross_entropy(self(tokens).flatten(0, 1), targets.flatten(), **options)

    def difference(self, tokens: Tensor, targets: Tensor) -> Tensor:
        logits = self(tokens)
        return logits - targets[..., None]


def batches(count: int, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    """Tokens and those that follow."""
    drawn = torch.randint(VOCABULARY, (count, size, LENGTH + 1), generator=torch.Generator().manual_seed(5))
    return [(each[:, :-1].contiguous(), each[:, 1:].contiguous()) for each in drawn]
