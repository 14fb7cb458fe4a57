"""A character-level GPT learns the English of the Python language reference (the text behind `help("for")`).

    python examples/char_gpt.py

Gradient accumulation, bf16-mixed precision, a cosine schedule with warm-up, gradient clipping, and a sample at the end.
"""

from __future__ import annotations

import argparse
import math
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, RandomSampler

import treadle as L


class Characters(Dataset[tuple[Tensor, Tensor]]):
    """Every window of ``length`` characters, and the same window one character later."""

    def __init__(self, codes: Tensor, length: int) -> None:
        self.codes, self.length = codes, length

    def __len__(self) -> int:
        return len(self.codes) - self.length

    def __getitem__(self, start: int) -> tuple[Tensor, Tensor]:
        window = self.codes[start : start + self.length + 1]
        return window[:-1], window[1:]


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.merge = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        # (batch, length, 3 * width) -> three of (batch, heads, length, width / heads)
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.merge(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norm2(x))


class CharGPT(L.LightningModule):
    def __init__(
        self,
        characters: int,
        length: int = 32,
        width: int = 64,
        heads: int = 4,
        layers: int = 2,
        learning_rate: float = 6e-3,
        warmup_steps: int = 30,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.token, self.position = nn.Embedding(characters, width), nn.Embedding(length, width)
        for embedding in (self.token, self.position):
            nn.init.normal_(embedding.weight, std=0.02)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, characters)

    def forward(self, codes: Tensor) -> Tensor:
        """Turn codes of shape (batch, length) into scores of each next character, (batch, length, characters)."""
        positions = torch.arange(codes.shape[1], device=codes.device)
        return self.head(self.norm(self.blocks(self.token(codes) + self.position(positions))))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), prog_bar=True, batch_size=len(batch[0]))

    def loss(self, batch: list[Tensor]) -> Tensor:
        codes, following = batch
        return cross_entropy(self(codes).flatten(0, 1), following.flatten())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.learning_rate, betas=(0.9, 0.98))
        total, warmup = int(self.trainer.estimated_stepping_batches), self.hparams.warmup_steps

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}

    @torch.no_grad()
    def sample(self, prompt: Tensor, count: int, temperature: float = 0.7) -> Tensor:
        """Continue ``prompt``, of shape (length,), by ``count`` codes; return all of them."""
        codes = prompt
        for _ in range(count):
            scores = self(codes[None, -self.hparams.length :])[0, -1]
            codes = torch.cat([codes, torch.multinomial((scores / temperature).softmax(0), 1)])
        return codes


def main(args: argparse.Namespace) -> None:
    L.seed_everything(0)
    text = "\n".join(topics[name] for name in sorted(topics))
    text = "".join(character for character in text if character.isascii())
    alphabet = sorted(set(text))
    code_of = {character: code for code, character in enumerate(alphabet)}
    codes = torch.tensor([code_of[character] for character in text])
    split = int(0.95 * len(codes))

    model = CharGPT(len(alphabet))
    train, val = (Characters(part, model.hparams.length) for part in (codes[:split], codes[split:]))
    micro_batch, accumulate = 16, 2
    batches = args.steps * accumulate * micro_batch
    train_loader = DataLoader(train, micro_batch, sampler=RandomSampler(train, num_samples=batches))
    val_loader = DataLoader(val, 64, sampler=range(0, len(val), len(val) // 512))

    trainer = L.Trainer(
        accelerator=args.accelerator,
        devices=1,
        precision="bf16-mixed",
        max_steps=args.steps,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=args.progress,
        enable_model_summary=args.progress,
    )
    trainer.fit(model, train_loader, val_loader)
    metrics = trainer.callback_metrics
    bits = metrics["val_loss"].item() / math.log(2)
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {trainer.global_step} optimizer steps of", end=" ")
    print(f"{micro_batch * accumulate} windows; validation: {bits:.2f} bits a character", end=" ")
    print(f"(a guess among all {len(alphabet)}: {math.log2(len(alphabet)):.2f})")

    model.eval()
    prompt = torch.tensor([code_of[character] for character in "The "])
    print("sample:", "".join(alphabet[code] for code in model.sample(prompt, 200).tolist()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, default=True)
    main(parser.parse_args())
