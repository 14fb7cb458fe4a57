"""A causal transformer whose layers, or whose sequences, two CPU processes share; on GPUs only `accelerator` changes.

python examples/model_parallel_cpu.py                # each process has half of the heads and features
python examples/model_parallel_cpu.py --sequence 2   # each process has half of every sequence
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import treadle_fabric as tf

PLAN = {
    "embed": "rowwise",
    "blocks.*.[qkv]": "colwise",
    "blocks.*.o": "rowwise",
    "blocks.*.up": "colwise",
    "blocks.*.down": "rowwise",
    "head": "colwise_logits",
}


class Block(nn.Module):
    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        # -1: as many heads as this process has
        q, k, v = (p(y).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, letters: int, length: int, width: int = 32, head_dim: int = 8) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(letters, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, head_dim) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, letters, bias=False)
        self.head.weight = self.embed.weight

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        t = tokens.shape[1]
        positions = torch.arange(t, device=tokens.device) + tf.sequence_offset(t)
        logits = self.head(self.norm(self.blocks(self.embed(tokens) + self.positions(positions))))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def main(args: argparse.Namespace) -> None:
    tensor = args.devices // args.sequence
    strategy = tf.ModelParallelStrategy(
        data_parallel_size=1,
        tensor_parallel_size=tensor,
        sequence_parallel_size=args.sequence,
        tensor_parallel_plan=PLAN,
        loss_parallel=True,
    )
    fabric = tf.Fabric(accelerator=args.accelerator, devices=args.devices, strategy=strategy)
    fabric.launch()
    fabric.seed_everything(0, verbose=False)
    text = "the weaver minds the cloth and the treadle does the lifting " * 20
    letters = sorted(set(text))
    rows = torch.tensor([letters.index(each) for each in text]).unfold(0, 33, 8)
    model = GPT(len(letters), 32)
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    model.mark_forward_method("loss")
    loader = fabric.setup_dataloaders(DataLoader(TensorDataset(rows[:, :-1], rows[:, 1:]), 32, shuffle=True))
    for epoch in range(args.epochs):
        for tokens, targets in loader:
            loss = model.loss(tokens, targets)
            fabric.backward(loss)
            fabric.clip_gradients(model, optimizer, max_norm=1.0)
            optimizer.step()
            optimizer.zero_grad()
        fabric.print(f"epoch {epoch + 1}: loss {fabric.all_reduce(loss.detach()):.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--sequence", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=10)
    main(parser.parse_args())
