"""What training costs: time, memory, and waits for the device."""

from __future__ import annotations

import gc
import statistics
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import treadle as L
from smoke.place import Model, Place, batches, check, made, same
from treadle.callbacks import LearningRateMonitor
from treadle_fabric import AsyncCheckpointIO, TorchCheckpointIO

OVERHEAD = {"fabric": 1.2, "trainer": 1.5}
"""A step may take so many times that of the hand-written loop, for a model of 4 layers of 1024."""
STALL = 1.3
"""A save in the background may stop training for so many times one copy to pinned memory."""


def deep(at: Place) -> nn.Sequential:
    width = 64 if at.cpu else 1024
    return nn.Sequential(*[layer for _ in range(4) for layer in (nn.Linear(width, width), nn.ReLU())])


class Deep(L.LightningModule):
    def __init__(self, at: Place) -> None:
        super().__init__()
        self.net = deep(at)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-4)


def deep_batches(at: Place, steps: int) -> list[list[Tensor]]:
    shape = (2, 64) if at.cpu else (4096, 1024)
    return [[torch.randn(shape, device=at.device)]] * steps


def raw_run(at: Place, steps: int) -> float:
    net = made(deep, at).to(at.device)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4)
    for step, (x,) in enumerate(deep_batches(at, steps)):
        if step == steps // 4:
            at.wait()
            start = time.perf_counter()
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    at.wait()
    return (time.perf_counter() - start) / (steps - steps // 4)


def fabric_run(at: Place, steps: int) -> float:
    fabric, net = at.fabric(), made(deep, at)
    net, optimizer = fabric.setup(net, torch.optim.Adam(net.parameters(), lr=1e-4))
    for step, (x,) in enumerate(deep_batches(at, steps)):
        if step == steps // 4:
            at.wait()
            start = time.perf_counter()
        optimizer.zero_grad()
        fabric.backward(net(x).square().mean())
        optimizer.step()
    at.wait()
    return (time.perf_counter() - start) / (steps - steps // 4)


class Clock(L.Callback):
    def __init__(self, at: Place, steps: int) -> None:
        self.at, self.first, self.steps = at, steps // 4, steps

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.first:
            self.at.wait()
            self.start = time.perf_counter()

    def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
        self.at.wait()
        self.seconds = (time.perf_counter() - self.start) / (self.steps - self.first)


def trainer_run(at: Place, steps: int) -> float:
    clock = Clock(at, steps)
    at.trainer(callbacks=[clock], max_epochs=1).fit(made(Deep, at), deep_batches(at, steps))
    return clock.seconds


@check("a step costs what that of a raw loop costs")
def overhead(at: Place) -> str:
    steps = 8 if at.cpu else 400
    kinds = {"raw": raw_run, "fabric": fabric_run, "trainer": trainer_run}
    times = {name: [run(at, steps) for _ in range(2 if at.cpu else 5)] for name, run in kinds.items()}
    raw = statistics.median(times["raw"])
    ratios = {name: statistics.median(times[name]) / raw for name in OVERHEAD}
    if not at.cpu:
        assert all(ratios[name] <= bar for name, bar in OVERHEAD.items()), ratios
    told = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
    return f"raw {raw * 1e6:.0f} us; {told} times that"


@check("the peak of memory is that of a raw loop", card="memory of a card")
def peak_memory(at: Place) -> str:
    peaks = {}
    for name, run in {"raw": raw_run, "fabric": fabric_run, "trainer": trainer_run}.items():
        gc.collect()  # what the last run has left in circles is no part of this one
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        run(at, 12)
        peaks[name] = torch.cuda.max_memory_allocated() / 1e6
    assert max(peaks.values()) <= 1.01 * peaks["raw"], peaks
    return ", ".join(f"{name} {peak:.0f} MB" for name, peak in peaks.items())


@contextmanager
def waits_seen(step: Callable[[], int] = lambda: 0) -> Iterator[list[tuple[int, str]]]:
    """The waits for the device, where torch warns of them: in which step, and where."""
    seen: list[tuple[int, str]] = []

    def note(message: Any, *rest: Any) -> None:
        if "synchroniz" in str(message):
            seen.append((step(), "".join(traceback.format_stack(limit=12)[:-1])))

    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = note
            yield seen
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Logging(Model):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.losses.clear()
        self.log("loss", loss, prog_bar=True)
        return loss


@check("200 steps with the defaults wait at the logging steps only", card="waits for a card")
def waits(at: Place) -> str:
    run = L.Trainer(
        accelerator="cuda", devices=1, max_epochs=1, default_root_dir=at.folder, log_every_n_steps=50,
        callbacks=[LearningRateMonitor()], enable_model_summary=False,
    )  # fmt: skip
    with waits_seen(lambda: run.global_step) as seen:
        run.fit(made(Logging), batches(800))
    wrong = [(step, stack) for step, stack in seen if step % 50]
    assert not wrong, f"waits in the steps {[step for step, _ in wrong]}: {wrong[0][1]}"
    return f"{sum(0 < step < 200 for step, _ in seen)} waits in 200 steps, {len(seen)} in the run"


class Weighted(Model):
    """Its losses are weighted by numbers, or by tensors on the device, some of which are 0."""

    def __init__(self, on_device: bool) -> None:
        super().__init__()
        self.on_device = on_device

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        weight = (3.0, 0.0, 5.0, 1.0)[batch_idx % 4]
        loss = super().training_step(batch, batch_idx)
        return {"loss": loss, "weight": torch.full((), weight, device=loss.device) if self.on_device else weight}


@check("weights on the device give what Python weights give, and wait little")
def weights(at: Place) -> str:
    models, waited = [], []
    for on_device in (False, True):
        run, model = at.trainer(max_epochs=1), made(Weighted, on_device)
        with nullcontext([]) if at.cpu else waits_seen(lambda run=run: run.global_step) as seen:
            run.fit(model, batches(800, pin_memory=not at.cpu))
        # the sum is awaited by an event, of which torch does not warn: the host waits for the forward pass only
        waited.append([stack for step, stack in seen if 1 < step < run.global_step])
        models.append(model)
        assert run.global_step == 150, run.global_step
    here, there = (model.state_dict() for model in models)
    far = max(float((a.cpu() - b.cpu()).abs().max()) for a, b in zip(here.values(), there.values(), strict=True))
    assert far < 1e-4, far
    assert not any(waited), next(filter(None, waited))[0]
    return f"within {far:.1e}; no wait in the steps"


@check("pinned batches are copied without a wait", card="pinned memory")
def pinned(at: Place) -> str:
    loader = at.fabric().setup_dataloaders(batches(pin_memory=True))
    with waits_seen() as seen:
        found = [x.device.type for x, _ in loader]
        copied = len(seen)
    assert found == ["cuda"] * 10 and not copied, seen[:1]
    model = made(Model)
    with waits_seen() as seen:
        at.trainer(max_epochs=1).fit(model, batches(pin_memory=True))
    in_steps = [stack for _, stack in seen if "_move" in stack]
    assert not in_steps, in_steps[0]
    return f"0 in {len(found)} batches"


def own_memory() -> float:
    """MB of this process that no other shares."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


@check("a save in the background stops training for one copy")
def stall(at: Place) -> str:
    size = 5 if at.cpu else 250
    state = {f"w{i}": torch.randn(size * 40_000, device=at.device) for i in range(25)}
    kept = {n: torch.empty(t.shape, pin_memory=not at.cpu).zero_() for n, t in state.items()}
    io, copies, saves = AsyncCheckpointIO(), [], []
    before = own_memory()
    for turn in range(5):
        at.wait()
        start = time.perf_counter()
        for name, tensor in state.items():
            kept[name].copy_(tensor, non_blocking=True)
        at.wait()
        copies.append(time.perf_counter() - start)
        start = time.perf_counter()
        io.save_checkpoint(state, at.folder / f"{turn}.ckpt")
        saves.append(time.perf_counter() - start)
        io.wait()
        io.remove_checkpoint(at.folder / f"{turn - 1}.ckpt")
    more = own_memory() - before
    found = TorchCheckpointIO().load_checkpoint(at.folder / "4.ckpt")
    io.teardown()
    assert same(found, state)
    ratio = min(saves[1:]) / min(copies[1:])
    assert at.cpu or ratio <= STALL, f"{ratio:.2f} times a copy"
    return f"{ratio:.2f} times a copy of {4 * size} MB ({min(saves) * 1e3:.0f} ms); keeps {more:.0f} MB"


@check("a checkpoint is mapped while it is restored")
def mapped(at: Place) -> str:
    path, width = at.folder / "a.ckpt", 1000 if at.cpu else 5000
    nets = [nn.Linear(width, width, bias=False) for _ in range(4)]
    at.fabric().save(path, {"net": nn.ModuleList(nets)})
    del nets
    fabric = at.fabric()
    net = fabric.setup_module(nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(4)).to(at.device))
    at.wait()
    before, most, done = own_memory(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            most[0] = max(most[0], own_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    fabric.load(path, {"net": net})
    at.wait()
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    size, more = path.stat().st_size / 2**20, max(most[0], own_memory()) - before
    assert str(path) not in Path("/proc/self/maps").read_text(), "the file is still mapped"
    assert more < 0.25 * size + 8, f"{more:.0f} MB more for a file of {size:.0f} MB"
    return f"{size:.0f} MB in {seconds:.2f} s, {more:.0f} MB of memory of its own"
