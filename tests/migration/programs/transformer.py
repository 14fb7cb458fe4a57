# a small GPT on Python's help texts: bf16, clipping, accumulation, warm-up by step
import json
import math
import os
from functools import partial
from pydoc_data.topics import topics

import lightning.pytorch as pl
import torch
import torch.nn as nn
import torch.nn.functional as F
from lightning.pytorch.utilities import grad_norm
from torch.utils.data import DataLoader, Dataset


class Tokens(Dataset):
    def __init__(self, ids, block):
        self.ids, self.block = ids, block

    def __len__(self):
        return (len(self.ids) - 1) // self.block

    def __getitem__(self, i):
        s = i * self.block
        return self.ids[s : s + self.block], self.ids[s + 1 : s + self.block + 1]


class Block(nn.Module):
    def __init__(self, dim, heads, p):
        super().__init__()
        self.heads, self.p = heads, p
        self.ln1, self.ln2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim), nn.Dropout(p))

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = (z.view(b, t, self.heads, -1).transpose(1, 2) for z in self.qkv(self.ln1(x)).split(d, 2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + F.dropout(self.proj(y.transpose(1, 2).reshape(b, t, d)), self.p, self.training)
        return x + self.mlp(self.ln2(x))


def warmup_cosine(step, warmup, total):
    if step < warmup:
        return (step + 1) / warmup
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


class GPT(pl.LightningModule):
    def __init__(self, vocab, block=32, dim=32, heads=4, depth=2, p=0.1, lr=1e-2, warmup=5):
        super().__init__()
        self.save_hyperparameters()
        self.tok, self.pos = nn.Embedding(vocab, dim), nn.Parameter(torch.zeros(1, block, dim))
        self.blocks = nn.Sequential(*[Block(dim, heads, p) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, vocab, bias=False)
        self.head.weight = self.tok.weight
        self.apply(self._init)
        self.record = {"losses": [], "norms": [], "rates": [], "dtypes": []}

    def _init(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, 0, 0.02)

    def forward(self, idx):
        return self.head(self.norm(self.blocks(self.tok(idx) + self.pos[:, : idx.shape[1]])))

    def step(self, batch):
        logits = self(batch[0])
        return F.cross_entropy(logits.float().flatten(0, 1), batch[1].flatten()), logits.dtype

    def training_step(self, batch, batch_idx):
        loss, dtype = self.step(batch)
        self.log("train/loss", loss, prog_bar=True, on_step=True, on_epoch=True)
        self.record["losses"].append(loss.item().hex())
        self.record["dtypes"].append(str(dtype))
        return loss

    def validation_step(self, batch, batch_idx):
        loss, _ = self.step(batch)
        self.log("val/loss", loss, prog_bar=True)
        self.log("val/bits", loss / math.log(2))

    def on_before_optimizer_step(self, optimizer):
        norms = grad_norm(self, norm_type=2)
        self.record["norms"].append(norms["grad_2.0_norm_total"].item().hex())
        self.record["rates"].append(optimizer.param_groups[0]["lr"].hex())

    def configure_optimizers(self):
        decay = [p for p in self.parameters() if p.dim() >= 2]
        rest = [p for p in self.parameters() if p.dim() < 2]
        opt = torch.optim.AdamW(
            [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
            lr=self.hparams.lr,
            betas=(0.9, 0.95),
        )
        total = self.trainer.estimated_stepping_batches
        self.record["total"] = total
        lambdas = partial(warmup_cosine, warmup=self.hparams.warmup, total=total)
        return {
            "optimizer": opt,
            "lr_scheduler": {
                "scheduler": torch.optim.lr_scheduler.LambdaLR(opt, lambdas),
                "interval": "step",
                "frequency": 1,
                "name": "warmup",
            },
        }


def main(batches, accumulate):
    pl.seed_everything(1337)
    text = topics["assignment"] + topics["function"] + topics["import"]
    chars = sorted(set(text))
    ids = torch.tensor([chars.index(c) for c in text])
    cut = int(0.9 * len(ids))
    model = GPT(len(chars))
    trainer = pl.Trainer(
        max_epochs=2,
        precision="bf16-mixed",
        gradient_clip_val=0.5,
        accumulate_grad_batches=accumulate,
        limit_train_batches=batches,
        val_check_interval=batches // 2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        accelerator="cpu",
    )
    trainer.fit(model, DataLoader(Tokens(ids[:cut], 32), 16, shuffle=True), DataLoader(Tokens(ids[cut:], 32), 16))
    model.record["metrics"] = {k: v.item().hex() for k, v in sorted(trainer.callback_metrics.items())}
    model.record["steps"] = trainer.global_step
    return model.record


if __name__ == "__main__":
    result = {"whole accumulations": main(16, 4), "a shorter accumulation": main(14, 4)}
    json.dump(result, open(os.environ["LOSSES"], "w"))
