"""What Fabric and the Trainer cost over an engine used by hand (part of ``make bench``): DDP, FSDP and DeepSpeed,
two processes. DeepSpeed is skipped where it is not installed.

A small GPT is trained by hand, with Fabric and with the Trainer in the same two processes, in blocks of a few steps
that take turns, so that a busy moment of the machine hits all of them. Of each pair of neighbouring blocks the ratio of
times is taken; the median over the pairs is printed, and must be at most 3 % over 1.

    python benchmarks/engines.py [--pairs 20] [--steps 8] [--engines ddp fsdp deepspeed] [--output FILE] [--check]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

import treadle as L
from treadle_fabric import Fabric, find_free_port
from treadle_fabric.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy

MOST = 0.03
VOCABULARY, WIDTH, LAYERS, LENGTH, BATCH = 256, 128, 4, 64, 8
BY_HAND, WITH_FABRIC, WITH_TRAINER = "by hand", "Fabric", "Trainer"


class GPT(nn.Module):
    """A transformer that predicts the next byte."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(LENGTH, WIDTH)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, 0.0, batch_first=True, norm_first=True)
            for _ in range(LAYERS)
        )
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.positions.weight
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=True)
        logits: Tensor = self.head(x)
        return logits


class Module(L.LightningModule):
    """The GPT for the Trainer, which begins a block of steps with each call of ``turn``."""

    def __init__(self, turn: Callable[[], None], steps: int) -> None:
        super().__init__()
        self.gpt, self.turn, self.steps = GPT(), turn, steps

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if batch_idx % self.steps == 0:
            self.turn()
        return loss_of(self.gpt, batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Tokens(Dataset[Tensor]):
    """Sequences of bytes, the same in each process."""

    def __init__(self, number: int) -> None:
        self.tokens = torch.randint(VOCABULARY, (64, LENGTH), generator=torch.Generator().manual_seed(1))
        self.number = number

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> Tensor:
        return self.tokens[index % 64]


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    return cross_entropy(model(tokens)[:, :-1].reshape(-1, VOCABULARY), tokens[:, 1:].reshape(-1))


def by_hand(engine: str) -> nn.Module:
    model = GPT()
    if engine == "ddp":
        return DistributedDataParallel(model)
    for layer in model.layers:
        fully_shard(layer)
    return fully_shard(model)


def zero_by_hand(model: nn.Module) -> Any:
    """DeepSpeed's engine, with ZeRO 2, set up as Fabric does."""
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": ZERO,
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)[0]


ZERO = {"stage": 2, "overlap_comm": False}
STRATEGIES: dict[str, Callable[[], Any]] = {
    "ddp": DDPStrategy,
    "fsdp": lambda: FSDPStrategy(policy={nn.TransformerEncoderLayer}),
    "deepspeed": lambda: DeepSpeedStrategy(config={"zero_optimization": ZERO}),
}


def compare(engine: str, pairs: int, steps: int) -> dict[str, float]:
    """In each of two processes: time the blocks; returns the median ratios to the steps by hand, less 1."""
    strategy = STRATEGIES[engine]
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy())
    fabric.launch()
    torch.manual_seed(0)
    tokens = Tokens(BATCH * steps)
    batches = [torch.stack([tokens[i * BATCH + j] for j in range(BATCH)]) for i in range(steps)]
    ours = GPT()
    model, optimizer = fabric.setup(ours, torch.optim.AdamW(ours.parameters(), lr=1e-3))
    raw = zero_by_hand(GPT()) if engine == "deepspeed" else by_hand(engine)
    plain = torch.optim.AdamW(raw.parameters(), lr=1e-3) if engine != "deepspeed" else None
    loader = fabric.setup_dataloaders(DataLoader(Tokens(2 * BATCH * steps), batch_size=BATCH))
    times: dict[str, list[float]] = {BY_HAND: [], WITH_FABRIC: [], WITH_TRAINER: []}

    def hand() -> None:
        for batch in batches:
            if plain is None:
                raw.backward(loss_of(raw, batch))
                raw.step()
                continue
            plain.zero_grad()
            loss_of(raw, batch).backward()  # type: ignore[no-untyped-call]
            plain.step()

    def through_fabric() -> None:
        for batch in loader:
            optimizer.zero_grad()
            fabric.backward(loss_of(model, batch))
            optimizer.step()

    def timed(name: str, block: Callable[[], None]) -> None:
        dist.barrier()
        begin = time.perf_counter()
        block()
        dist.barrier()
        times[name].append((time.perf_counter() - begin) / steps)

    begun = 0.0

    def turn() -> None:
        """Between two blocks of the Trainer's steps."""
        nonlocal begun
        dist.barrier()
        if begun:
            times[WITH_TRAINER].append((time.perf_counter() - begun) / steps)
        timed(BY_HAND, hand)
        timed(WITH_FABRIC, through_fabric)
        dist.barrier()
        begun = time.perf_counter()

    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy(),
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    warm = 2
    trainer.fit(Module(turn, steps), DataLoader(Tokens(2 * BATCH * steps * (pairs + warm + 1)), batch_size=BATCH))
    base = times[BY_HAND][warm:]
    return {
        name: statistics.median(t / b for t, b in zip(times[name][warm:], base, strict=False)) - 1
        for name in (WITH_FABRIC, WITH_TRAINER)
    } | {BY_HAND: statistics.median(base) * 1e3}


def run(engine: str, pairs: int, steps: int) -> dict[str, float]:
    """Start the two processes, and return what rank 0 found."""
    port = str(find_free_port())
    command = [sys.executable, __file__, "--engines", engine, "--pairs", str(pairs), "--steps", str(steps), "--rank"]
    ranks = [subprocess.Popen([*command, str(rank), port], stdout=subprocess.PIPE, text=True) for rank in range(2)]
    said = [rank.communicate(timeout=900)[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise SystemExit(f"{engine}: a process failed")
    found: dict[str, float] = json.loads(said[0].strip().splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20, help="pairs of blocks (default: 20)")
    parser.add_argument("--steps", type=int, default=8, help="steps of a block (default: 8)")
    parser.add_argument("--engines", nargs="+", default=list(STRATEGIES), choices=list(STRATEGIES))
    parser.add_argument("--output", type=Path, help="a file for the numbers, as JSON")
    parser.add_argument("--check", action="store_true", help="exit with status 1 if a bar is missed")
    parser.add_argument("--rank", nargs=2, metavar=("RANK", "PORT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        import os

        rank, port = options.rank
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0"}
        os.environ |= {"WORLD_SIZE": "2", "LOCAL_RANK": rank}
        torch.set_num_threads(1)
        print(json.dumps(compare(options.engines[0], options.pairs, options.steps)))
        return
    if "deepspeed" in options.engines and find_spec("deepspeed") is None:
        print("deepspeed: skipped, because DeepSpeed is not installed (pip install treadle[deepspeed])")
        options.engines.remove("deepspeed")
    found = {engine: run(engine, options.pairs, options.steps) for engine in options.engines}
    missed = False
    for engine, costs in found.items():
        for name in (WITH_FABRIC, WITH_TRAINER):
            missed |= costs[name] > MOST
            print(
                f"{engine:9} {name:8} {costs[name]:+.2%} of a step by hand of {costs[BY_HAND]:.1f} ms (bar: {MOST:.0%})"
            )
    if options.output is not None:
        options.output.write_text(json.dumps(found, indent=1) + "\n")
    if options.check and missed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
